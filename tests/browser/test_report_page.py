"""The report of hostile records in a real browser: nothing runs, nothing is fetched, nothing is complained of."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from curator.store.engine import begin, read
from curator.views import page
from curator.views.report import report
from tests.store.read_world import populate

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")

RUN = "document.title='taken';console.error('ran')"
HOSTILE = [
    f"<script>{RUN}</script>",
    f'<img src=x onerror="{RUN}">',
    f'"><svg onload="{RUN}"></svg>',
    f"</td></table><style>*{{display:none}}</style><iframe srcdoc='<script>{RUN}</script>'></iframe>",
    f"{{{{ '{RUN}' }}}} <a href=\"javascript:{RUN}\">x</a>",
    "=cmd|' /C calc'!A0 \u202egnp.exe\u202c \u2066hidden\u2069 \x1b[31m",
]


@dataclass(frozen=True)
class Seen:
    """What the browser made of a page, and what it complained of."""

    title: str
    dom: str
    console: list[str]


def shown(file: Path, profile: Path) -> Seen:
    done = subprocess.run(
        [
            *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions"),
            *("--enable-logging=stderr", f"--user-data-dir={profile}", "--host-resolver-rules=MAP * ~NOTFOUND"),
            *("--dump-dom", file.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Seen(title.group(1) if title else "", done.stdout, console)


@pytest.fixture
def hostile(engine: Engine, tmp_path: Path) -> Path:
    """The page of a world whose flags, sources and refusals attack their reader."""
    world = populate(engine, examples=60, trusted=6)
    with begin(engine) as connection:
        for number, words in zip(world.flagged, HOSTILE, strict=False):
            record = {"text": words, "label": words, "meta": {"who": words}}
            connection.execute(
                text("UPDATE curator.examples SET record = CAST(:r AS json), external_id = :w WHERE id = :id"),
                {"r": json.dumps(record), "w": words[:200], "id": number},
            )
        connection.execute(text("UPDATE curator.sources SET name = :w WHERE id = 1"), {"w": HOSTILE[1]})
        connection.execute(text("UPDATE curator.quarantine SET detail = :w"), {"w": HOSTILE[2]})
    out = tmp_path / "report.html"
    with read(engine) as connection:
        page.write(report(connection, HOSTILE[0], by="who"), out)
    return out


def test_a_hostile_report_runs_nothing_in_a_browser(hostile: Path, tmp_path: Path) -> None:
    seen = shown(hostile, tmp_path / "profile")
    assert seen.console == []
    assert seen.title.endswith("curator report")
    assert not re.search(r"<(script|img|iframe|a|object|embed|link|form)\b", seen.dom)
    assert seen.dom.count("<style") == 1
    assert seen.dom.count("&lt;script&gt;") >= 2
    assert not set(seen.dom) & {"\u202e", "\u2066", "\x1b"}


def test_the_same_words_would_have_run_unescaped(tmp_path: Path) -> None:
    """Else the test above could not fail."""
    bare = tmp_path / "bare.html"
    bare.write_text(f"<title>curator report</title>{HOSTILE[0]}", encoding="utf-8")
    seen = shown(bare, tmp_path / "profile")
    assert seen.title == "taken"
    assert seen.console

"""Six sources of text for a small language model: two sorts of manual, code, scripture, mail, a dictionary.

Nothing of it is kept here: Debian packages are read where they were installed, or under CURATOR_BENCHMARK_ROOT, where
``apt-get download`` and ``dpkg-deb -x`` put them without being root.
"""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from curator.demo import mails

PACKAGES = "manpages manpages-de bible-kjv bible-kjv-text trans-de-en"
INSTALL = (
    f"apt-get install {PACKAGES}; or without being root: apt-get download {PACKAGES}, "
    "dpkg-deb -x each of them into a folder, and set CURATOR_BENCHMARK_ROOT to it"
)
LETTERS = 3_000_000
"""Of a source that are looked at."""
SHORTEST, LONGEST = 180, 420
"""Letters of a passage."""

ROFF = re.compile(r"\\f[A-Z]|\\f\(..|\\[&,/|]|\\\*\(..|^\.[A-Za-z]{1,3}\b ?|^['.].*\\\".*$", re.MULTILINE)
VERSE = re.compile(r"^\S+?\d+:\d+ ", re.MULTILINE)


def root() -> Path:
    return Path(os.environ.get("CURATOR_BENCHMARK_ROOT", "/"))


def manuals(folder: str) -> Iterator[str]:
    """Pages without their typesetting, so that it does not tell manuals from the rest."""
    for page in sorted((root() / "usr/share/man" / folder).glob("man[14578]/*.gz")):
        yield ROFF.sub("", gzip.decompress(page.read_bytes()).decode("utf-8", "replace")).replace("\\-", "-")


def english() -> Iterator[str]:
    return manuals("")


def german() -> Iterator[str]:
    return manuals("de")


def code() -> Iterator[str]:
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield file.read_text(encoding="utf-8")


def scripture() -> Iterator[str]:
    command = [root() / "usr/bin/bible", "-p", root() / "usr/lib", "-f", "gen1:1-rev22:21"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    yield VERSE.sub("", said)


def letters() -> Iterator[str]:
    for mail in mails.read():
        yield mail.text


def dictionary() -> Iterator[str]:
    yield (root() / "usr/share/trans/de-en").read_text(encoding="utf-8")


SOURCES: dict[str, Callable[[], Iterator[str]]] = {
    "English manuals": english,
    "German manuals": german,
    "Python": code,
    "scripture": scripture,
    "mail": letters,
    "dictionary": dictionary,
}
NEEDED = ("usr/share/man/man7", "usr/share/man/de/man1", "usr/bin/bible", "usr/share/trans/de-en")


def missing() -> str:
    """What to install, or nothing."""
    gone = [name for name in NEEDED if not (root() / name).exists()]
    return f"{', '.join(gone)} not under {root()}: {INSTALL}" if gone else ""


def passages(source: str) -> list[str]:
    """A source cut at blanks into passages of any length from SHORTEST to LONGEST letters, in a fixed random order."""
    rng = np.random.Generator(np.random.Philox(0))
    whole = list(SOURCES[source]())
    if len(whole) > 1:
        whole = [whole[i] for i in rng.permutation(len(whole))]
    found: list[str] = []
    left = LETTERS
    for text in whole:
        found += _cut(text[:left], rng)
        left -= len(text)
        if left <= 0:
            break
    found = list(dict.fromkeys(found))
    return [found[i] for i in rng.permutation(len(found))]


def _cut(text: str, rng: np.random.Generator) -> Iterator[str]:
    at = 0
    while at + SHORTEST <= len(text):
        end = at + int(rng.integers(SHORTEST, LONGEST))
        end = text.find(" ", end) if " " in text[end : end + 40] else end
        if passage := text[at:end].strip():
            yield passage
        at = end

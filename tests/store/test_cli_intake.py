"""``curator ingest``: what it says of a file, how it exits, and what becomes of standard input."""

import gzip
import json
import stat
import sys
from pathlib import Path

import pytest
import zstandard

from curator import arrivals
from tests.store.conftest import Curator

GOOD = '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n'


def test_refused_lines_alone_leave_it_0(new_curator: Curator, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD + "{broken\n")
    result = new_curator("ingest", str(tmp_path / "a.jsonl"))
    said = (
        "1 record was refused: curator quarantine list\nnext: curator drain, or curator up: the daemon is not running\n"
    )
    assert (result.exit_code, result.stderr) == (0, said)


def test_a_damaged_file_is_a_finding(new_curator: Curator, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(GOOD.encode() * 5_000, 0)[:-200])
    result = new_curator("ingest", str(tmp_path / "a.jsonl.gz"), "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)[0]["state"] == "damaged"
    assert "a.jsonl.gz is damaged and was not read to its end" in result.stderr


@pytest.mark.parametrize("content", ["", "{broken\n"])
def test_a_file_that_gives_nothing_is_a_finding_beside_one_that_does(
    new_curator: Curator, tmp_path: Path, content: str
) -> None:
    (tmp_path / "good.jsonl").write_text(GOOD)
    (tmp_path / "none.jsonl").write_text(content)
    assert new_curator("ingest", str(tmp_path / "good.jsonl")).exit_code == 0
    result = new_curator("ingest", str(tmp_path / "good.jsonl"), str(tmp_path / "none.jsonl"))
    assert result.exit_code == 1
    assert f"nothing in {tmp_path / 'none.jsonl'} could be taken in" in result.stderr


def test_what_was_taken_in_before_is_known(new_curator: Curator, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD)
    assert new_curator.rows("ingest", str(tmp_path / "a.jsonl"))[0]["state"] == "complete"
    result = new_curator("ingest", str(tmp_path / "a.jsonl"), "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)[0]["state"] == "known"
    assert result.stderr == f"{tmp_path / 'a.jsonl'} was taken in before; nothing is new\n"


def test_a_directory_is_for_watch(new_curator: Curator, tmp_path: Path) -> None:
    result = new_curator("ingest", str(tmp_path))
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"error CUR-INP-002: {tmp_path} is a directory." in result.stderr
    assert f"`curator watch {tmp_path}`" in result.stderr


def test_standard_input_goes_by_that_name_and_leaves_no_copy(new_curator: Curator) -> None:
    piped = new_curator("ingest", "-", "--json", stdin=GOOD + "{broken\n")
    [row] = json.loads(piped.stdout)
    assert (row["source"], row["file"], row["accepted"], row["refused"]) == ("stdin", "stdin", 2, 1)
    assert new_curator.rows("quarantine", "list")[0]["origin"] == "stdin"
    spool = new_curator.project / ".curator" / "spool"
    assert list(spool.iterdir()) == []
    assert stat.S_IMODE(spool.stat().st_mode) == 0o700
    again = new_curator("ingest", "-", "--json", stdin=GOOD + "{broken\n")
    assert json.loads(again.stdout)[0]["state"] == "known"
    assert again.stderr == "stdin was taken in before; nothing is new\n"
    assert list(spool.iterdir()) == []


def test_the_copy_of_standard_input_is_its_owner_s(new_curator: Curator, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    def look(opened: object, given: list[arrivals.Given]) -> list[object]:
        modes.extend(stat.S_IMODE(file.path.stat().st_mode) for file in given)
        raise KeyboardInterrupt

    monkeypatch.setattr("curator.arrivals.open_all", look)
    assert new_curator("ingest", "-", stdin=GOOD).exit_code == 130
    assert modes == [0o600]


# --- formats, dry runs, fields under other names, URLs -------------------------------------------------------


def test_a_file_of_any_format_is_taken_in_by_its_content(new_curator: Curator, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(GOOD.encode()))
    (tmp_path / "b.csv").write_text("label,text\nx,a\ny,b\n")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c")
    found = new_curator.rows("ingest", *(str(tmp_path / name) for name in ("a.jsonl.zst", "b.csv", "c")))
    assert [(row["source"], row["accepted"], row["duplicates"]) for row in found] == [
        ("a", 2, 0), ("b", 0, 2), ("c", 0, 2),
    ]  # fmt: skip
    assert "no checksums" in found[2]["detail"]


def test_a_dry_run_says_what_would_happen_and_writes_nothing(new_curator: Curator, tmp_path: Path) -> None:
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    old.write_text('{"text": "a", "label": "x"}\n')
    new_curator("ingest", str(old))
    new.write_text(
        GOOD + '{"prompt": "p", "completion": "c"}\n{broken\n{"words": 1}\n{broken\n'
        '{"text": "b", "label": "y", "id": 7}\n{"text": "z", "text": "z"}\n'
    )
    found = new_curator.rows("ingest", "--dry-run", str(new))
    assert [(row["outcome"], row["what"], row["records"], row["first"]) for row in found] == [
        ("accepted", "text,label", 1, 2),
        ("accepted", "prompt,completion", 1, 3),
        ("accepted", "text", 1, 8),
        ("duplicate", "text,label", 2, 1),
        ("repaired", "CUR-TXT-102", 1, 8),
        ("refused", "CUR-TXT-002", 2, 4),
        ("refused", "CUR-TXT-010", 1, 5),
    ]
    [row] = new_curator.rows("ingest", str(new))
    assert (row["state"], row["accepted"], row["duplicates"], row["refused"]) == ("complete", 3, 2, 3)


def test_fields_under_other_names_are_mapped_by_source(new_curator: Curator, tmp_path: Path) -> None:
    (new_curator.project / "curator.toml").write_text(
        '[sources]\nfields = {text = "body"}\n[sources.acme]\nfields = {text = "mail.plain", label = "class"}\n'
    )
    (tmp_path / "acme.jsonl").write_text('{"mail": {"plain": "a"}, "class": "x", "at": 3}\n{"text": "own"}\n')
    (tmp_path / "other.jsonl").write_text('{"body": "b"}\n')
    found = new_curator.rows("ingest", str(tmp_path / "acme.jsonl"), str(tmp_path / "other.jsonl"))
    assert [(row["accepted"], row["refused"]) for row in found] == [(2, 0), (1, 0)]
    assert new_curator.rows("sql", "SELECT 1 AS one")


def test_trusted_records_are_mapped_as_arrivals_are(new_curator: Curator, tmp_path: Path) -> None:
    """Or the same record would be two examples, and no leak would be seen."""
    (new_curator.project / "curator.toml").write_text('[sources]\nfields = {text = "body"}\n')
    lines = [json.dumps({"body": f"mail {n % 8}", "label": "xy"[n % 2], "sent": n}) for n in range(9)]
    (tmp_path / "trusted.jsonl").write_text("\n".join(lines))
    added = new_curator("validation", "add", "trusted", str(tmp_path / "trusted.jsonl"))
    assert added.exit_code == 0
    assert "of 9 records 1 is a repeat: each example counts once" in added.stderr
    result = new_curator("ingest", str(tmp_path / "trusted.jsonl"))
    assert "8 records are also in a validation set in use" in result.stderr


@pytest.mark.parametrize("fields", ["3", "{text = 3}", '["body"]'])
def test_a_mapping_that_is_none_is_refused_at_once(new_curator: Curator, fields: str) -> None:
    (new_curator.project / "curator.toml").write_text(f"[sources.acme]\nfields = {fields}\n")
    assert "CUR-CFG-003" in new_curator("status").stderr


def allow(curator: Curator, *prefixes: str, options: str = "") -> None:
    (curator.project / "curator.toml").write_text(f"[sources]\nurls = {json.dumps(prefixes)}\n{options}")


def test_a_url_is_read_only_below_what_is_allowed(new_curator: Curator, tmp_path: Path) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    (inside / "good.jsonl").write_text(GOOD)
    (tmp_path / "secret.jsonl").write_text(GOOD)
    (inside / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    url = f"file://{inside}"
    assert "CUR-INP-005" in new_curator("ingest", f"{url}/good.jsonl").stderr, "nothing is allowed by default"
    allow(new_curator, url)
    for bad in (
        *(f"file://{tmp_path}/secret.jsonl", f"{url}/../secret.jsonl", f"{url}/link.jsonl", f"{url}x/good.jsonl"),
        *("http://169.254.169.254/latest", f"simplecache::{url}/good.jsonl", f"{url}/good.jsonl?x", "s3://u:p@b/c"),
    ):
        result = new_curator("ingest", bad)
        assert (result.exit_code, result.stdout) == (2, ""), bad
    [row] = new_curator.rows("ingest", f"{url}/good.jsonl")
    assert (row["file"], row["source"], row["accepted"]) == (f"{url}/good.jsonl", "good", 2)
    assert new_curator.rows("ingest", f"{url}/good.jsonl")[0]["state"] == "known"
    assert list((new_curator.project / ".curator" / "spool").iterdir()) == []
    assert "CUR-FIL-001" in new_curator("ingest", f"{url}/gone.jsonl").stderr


def test_an_object_of_a_real_s3_server_is_read(new_curator: Curator, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        store = s3fs.S3FileSystem(endpoint_url=endpoint)
        store.call_s3("create_bucket", Bucket="bucket")
        store.pipe("bucket/day/mail.jsonl.gz", gzip.compress(GOOD.encode()))
        allow(new_curator, "s3://bucket/day", options=f'url_options = {{s3 = {{endpoint_url = "{endpoint}"}}}}\n')
        [row] = new_curator.rows("ingest", "s3://bucket/day/mail.jsonl.gz")
        assert (row["file"], row["source"], row["accepted"]) == ("s3://bucket/day/mail.jsonl.gz", "mail", 2)
        assert "CUR-FIL-001" in new_curator("ingest", "s3://bucket/day/none.jsonl").stderr
        assert "CUR-INP-005" in new_curator("ingest", "s3://bucket/night/mail.jsonl.gz").stderr
    finally:
        server.stop()


def test_without_pyarrow_the_command_that_installs_it_is_said(
    new_curator: Curator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a").write_bytes(b"PAR1....PAR1")
    result = new_curator("ingest", str(tmp_path / "a"))
    assert (result.exit_code, "CUR-WRK-009" in result.stderr) == (2, True)
    assert "pip install 'gradient-curator[tables]'" in result.stderr
    (tmp_path / "b.csv").write_text("text\na\n")
    assert new_curator.rows("ingest", str(tmp_path / "b.csv"))[0]["accepted"] == 1, "nothing else needs it"


def test_of_several_splits_the_one_to_train_on_is_asked_for(new_curator: Curator, tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    result = new_curator("ingest", str(tmp_path))
    assert (result.exit_code, "CUR-FIL-009" in result.stderr) == (2, True)
    assert f"{tmp_path}/train" in result.stderr

"""Tables are read row by row in bounded memory; what is broken in one ends it where it is broken."""

import json
import os
import subprocess
import sys

import pytest

from curator.errors import DamagedTable, NotADataset, OutsideFolder, SeveralSplits, Unreadable
from curator.settings import Limits
from curator.sources import files, tables
from curator.types import Refusal

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

LIMITS = Limits()
ROWS = [{"text": f"mail {n}", "label": n % 3} for n in range(1000)]
TALKS = [
    {"messages": [{"role": "user", "content": f"hi {n}", "tool_calls": None}, {"role": "assistant", "content": "yes"}]}
    for n in range(50)
]


def parquet(path, rows, **options):
    pq.write_table(pa.Table.from_pylist(rows), path, **{"write_page_checksum": True, **options})
    return path


def arrow(path, rows, kind=None):
    table = pa.Table.from_pylist(rows)
    with (kind or pa.ipc.new_stream)(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    return path


def saved(folder, rows):
    """A folder as ``Dataset.save_to_disk`` writes it."""
    folder.mkdir()
    half = len(rows) // 2
    for number, part in enumerate([rows[:half], rows[half:]]):
        arrow(folder / f"data-{number:05d}-of-00002.arrow", part)
    names = sorted(path.name for path in folder.iterdir())
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def read(path, limits=LIMITS, after=0):
    return list(files.open_records(path, limits, after))


MAKERS = {
    "parquet": lambda path, rows: parquet(path, rows, row_group_size=300),
    "stream": arrow,
    "file": lambda path, rows: arrow(path, rows, pa.ipc.new_file),
    "folder": saved,
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("rows", [ROWS, TALKS], ids=["flat", "talks"])
def test_a_row_is_the_example_its_line_of_json_is(tmp_path, kind, rows):
    lines = tmp_path / "lines"
    lines.write_text("\n".join(map(json.dumps, rows)))
    assert [item.digest for item in read(MAKERS[kind](tmp_path / "x", rows))] == [item.digest for item in read(lines)]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("after", [0, 1, 300, 301, 999, 1000, 2000])
def test_reading_after_a_row_gives_the_tail_of_a_full_read(tmp_path, kind, after):
    path = MAKERS[kind](tmp_path / "x", ROWS)
    whole = read(path)
    assert [item.position for item in whole] == list(range(1, 1001))
    assert read(path, after=after) == whole[after:]


def test_a_broken_row_costs_itself_and_nothing_else(tmp_path):
    rows = [
        {"text": "a", "x": 1.0},
        {"text": "b", "x": float("nan")},
        {"text": None, "x": 1.0},
        {"text": "d", "x": 1.0},
    ]
    found = read(parquet(tmp_path / "x", rows))
    assert [item.code if isinstance(item, Refusal) else "" for item in found] == ["", "CUR-TXT-005", "CUR-TXT-010", ""]
    assert b"NaN" in found[1].raw


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_a_truncated_file_ends_at_the_point_of_damage(tmp_path, kind):
    path = MAKERS[kind](tmp_path / "x", ROWS)
    whole = read(path)
    os.truncate(path, path.stat().st_size * 2 // 3)
    taken = []
    with pytest.raises(DamagedTable):
        taken.extend(files.open_records(path, LIMITS))
    assert taken == whole[: len(taken)]


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_found_where_pages_have_checksums(tmp_path):
    path = parquet(tmp_path / "x", ROWS, compression="none", use_dictionary=False)
    assert files.remark(path) is None
    flip(path, path.read_bytes().index(b"mail 500"))
    with pytest.raises(DamagedTable, match=r"CRC|checksum"):
        read(path)


def test_a_file_without_checksums_is_said_to_have_none(tmp_path):
    path = parquet(tmp_path / "x", ROWS, compression="none", use_dictionary=False, write_page_checksum=False)
    assert files.remark(path) == tables.UNCHECKED
    flip(path, path.read_bytes().index(b"mail 500"))
    assert len(read(path)) == 1000, "this is why it is said"


BOMBS = {
    "one long text many times": lambda: pa.table({"text": pa.DictionaryArray.from_arrays([0] * 20_000, ["x" * 10**6])}),
    "within lists": lambda: pa.table({"messages": _long_talks(), "text": ["a"] * 20}),
}


def _long_talks():
    """Twenty talks of a hundred turns, each the same megabyte."""
    said = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), ["x" * 10**6])
    turns = pa.StructArray.from_arrays([pa.array(["user"] * 2000), said], ["role", "content"])
    return pa.ListArray.from_arrays(pa.array(range(0, 2001, 100), pa.int32()), turns)


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_stopped_in_bounded_memory(tmp_path, kind):
    path = tmp_path / "bomb"
    code = f"import sys; sys.path[:0] = {sys.path!r}\n" + (
        "import pathlib, re\n"
        # Not getrusage: what that says is never below what the parent had when it forked.
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1])\n"
        "from curator.errors import Bomb\nfrom curator.settings import Limits\nfrom curator.sources import files\n"
        "import pyarrow.parquet, pyarrow.compute\n"
        "before = peak()\n"
        "n = 0\n"
        "try:\n"
        f"    for item in files.open_records(pathlib.Path({str(path)!r}), Limits()): n += 1\n"
        "except Bomb: print('bomb', end=' ')\n"
        "print(n, (peak() - before) // 1024)\n"
    )
    pq.write_table(BOMBS[kind](), path, compression="zstd")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    *ended, n, megabytes = done.stdout.split()
    assert int(megabytes) < 400, done.stderr
    assert ended == ["bomb"] or int(n) == 20


def test_a_saved_dataset_stays_within_its_folder(tmp_path):
    folder = saved(tmp_path / "d", TALKS)
    arrow(tmp_path / "secret.arrow", TALKS)
    for name in ("../secret.arrow", str(tmp_path / "secret.arrow"), "link.arrow"):
        if name == "link.arrow":
            (folder / name).symlink_to(tmp_path / "secret.arrow")
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        with pytest.raises(OutsideFolder):
            read(folder)


def test_a_folder_that_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(NotADataset):
        read(tmp_path)
    (tmp_path / "state.json").write_text("[")
    with pytest.raises(NotADataset):
        read(tmp_path)
    (tmp_path / "state.json").write_text('{"_data_files":[{"filename":"gone.arrow"}]}')
    with pytest.raises(Unreadable):
        read(tmp_path)


def test_of_several_splits_one_has_to_be_named(tmp_path):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(SeveralSplits, match="train, test"):
        read(tmp_path)


def test_a_saved_dataset_is_known_by_its_content(tmp_path):
    one, two = saved(tmp_path / "a", TALKS), saved(tmp_path / "b", TALKS)
    assert files.digest(one) == files.digest(two) != files.digest(saved(tmp_path / "c", TALKS[1:]))

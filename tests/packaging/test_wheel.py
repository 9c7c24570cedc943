"""The wheel: what is in it, and that it works where there is no checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

import curator
import workers
from curator import __version__

ROOT = Path(__file__).parents[2]
DISTRIBUTION = "gradient-curator"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the checkout, with the build backend of this environment: nothing is fetched."""
    folder = tmp_path_factory.mktemp("wheel")
    argv = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def names(wheel: Path) -> frozenset[str]:
    with zipfile.ZipFile(wheel) as archive:
        return frozenset(archive.namelist())


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of an environment that has this wheel, and its dependencies from the one the tests run in."""
    environment = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=60)
    python = environment / "bin" / "python"
    site = subprocess.check_output(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    argv = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--quiet", str(wheel)]
    subprocess.run(argv, check=True, timeout=110, capture_output=True)
    # A .pth within a folder that a .pth names is not read, so an editable install does not come along.
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


def test_it_holds_the_packages_the_migrations_and_the_page(names: frozenset[str]) -> None:
    expected = {"curator/__main__.py", "curator/views/page.html", "workers/celery.py", "workers/drain.py"}
    shipped = {
        f"curator/_migrations/{path.relative_to(ROOT / 'migrations')}"
        for path in (ROOT / "migrations").rglob("*")
        if path.suffix in (".py", ".sql", ".mako")
    }
    assert len(shipped) >= 5
    assert names >= expected | shipped


def test_it_holds_every_file_of_the_packages(names: frozenset[str]) -> None:
    """Data too: a pattern that forgets the demo's mails is found here and not by a user."""
    ours = {
        str(path.relative_to(ROOT))
        for package in ("curator", "workers")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert ours - names == set()


def test_it_holds_nothing_else(names: frozenset[str]) -> None:
    info = f"gradient_curator-{__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"curator", "workers", info}
    assert f"{info}/licenses/LICENSE" in names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".toml")]


def test_its_version_is_the_package_s() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == __version__ == distribution(DISTRIBUTION).version


def test_the_command_works_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    assert _run(installed, tmp_path, str(installed.with_name("curator")), "--version") == (
        f"curator, version {__version__}"
    )
    where = _run(installed, tmp_path, str(installed), "-c", "import curator, workers; print(curator.__file__)")
    assert where.startswith(str(installed.parents[1]))


def test_the_migrations_are_found_inside_it(installed: Path, tmp_path: Path) -> None:
    code = "from curator.store import migrate; print(migrate.scripts(), migrate.needed_revision())"
    folder, revision = _run(installed, tmp_path, str(installed), "-c", code).split()
    assert Path(folder).parts[-2:] == ("curator", "_migrations")
    assert revision


def test_celery_finds_the_workers(installed: Path, tmp_path: Path) -> None:
    """``celery -A workers``, as the README has it, in a project and without a server to answer."""
    (tmp_path / "curator.toml").write_text("", encoding="utf-8")
    urls = {"CURATOR_BROKER_URL": "redis://127.0.0.1:1/0", "CURATOR_DATABASE_URL": "postgresql://127.0.0.1:1/none"}
    said = _run(installed, tmp_path, str(installed), "-m", "celery", "-A", "workers", "report", **urls)
    assert "software -> celery:" in said
    assert "127.0.0.1:1/0" in said
    assert "Queue model" in said


def _run(python: Path, folder: Path, *argv: str, **environment: str) -> str:
    # safe_path off: this environment has no checkout near it, and a user would not set it
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        argv, cwd=folder, env={"PATH": path, **environment}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_tests_run_against_what_is_installed() -> None:
    """Else only a user would find a file that the wheel forgets. An editable install is the checkout."""
    origin = json.loads(distribution(DISTRIBUTION).read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        pytest.skip("an editable install is the checkout")
    code = "import curator, workers; print(curator.__file__, workers.__file__)"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {str(curator.__file__), str(workers.__file__), *child.stdout.split()}
    assert not loaded & {str(ROOT / package / "__init__.py") for package in ("curator", "workers")}

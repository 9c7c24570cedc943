"""One noun a stage, everywhere; claim, compute, record; short functions; the environment read in one place."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from curator.types import Stage
from tests.house_rules.checkout import ROOT, dotted, files, functions, is_ignored, length, modules, place, tree

TOP_LEVEL = {
    *("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "compose.yaml", ".gitignore"),
    *("curator", "workers", "migrations", "tests", "docs", ".ci"),
}
LONGEST_FUNCTION = 60
LONGEST_TASK = 25  # one screen
# The layers that may look at the environment: they build Settings or start processes.
READS_ENVIRONMENT = ("curator/settings.py", "curator/runtime.py", "curator/cli/", "curator/demo", "workers/")


@pytest.mark.parametrize("stage", list(Stage))
@pytest.mark.parametrize("folder", ["curator/stages", "curator/store", "workers"])
def test_a_stage_has_the_same_name_in_every_layer(stage: Stage, folder: str) -> None:
    assert (ROOT / folder / f"{stage}.py").is_file()


@pytest.mark.parametrize("stage", list(Stage))
def test_a_stage_is_claim_load_compute_record(stage: Stage) -> None:
    body = tree(ROOT / "curator/stages" / f"{stage}.py").body
    names = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    assert [name for name in names if name in ("claim", "load", "compute", "record")] == [
        *("claim", "load", "compute", "record")
    ]


def test_nothing_computes_with_a_connection_in_hand() -> None:
    """No transaction is open while the GPU works."""
    for where, node in functions("curator/stages"):
        if node.name == "compute":
            arguments = {a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
            assert not arguments & {"connection", "session", "engine"}, where


def test_workers_hold_thin_tasks_and_little_else() -> None:
    names = {path.stem for path in modules("workers")}
    names_of_processes = {"aside", "check", "drain", "explain", "plan", "scheduler"}
    assert names == {*Stage, *names_of_processes, "__init__", "base", "celery", "upkeep"}


def test_a_task_fits_one_screen() -> None:
    tasks = [
        (where, node)
        for where, node in functions("workers")
        if any(dotted(decorator).endswith(("shared_task", ".task")) for decorator in node.decorator_list)
    ]
    assert len(tasks) >= len(Stage)
    assert [where for where, node in tasks if length(node) > LONGEST_TASK] == []


def test_functions_are_short() -> None:
    assert [where for where, node in functions("curator", "workers") if length(node) > LONGEST_FUNCTION] == []


def test_nothing_is_called_utils_or_helpers() -> None:
    bad = ("util", "utils", "helper", "helpers", "common", "misc")
    assert [path for path in files() if path.stem in bad] == []


def test_no_class_manages_helps_or_handles() -> None:
    bad = ("Manager", "Helper", "Handler", "Util", "Utils")
    found = [
        f"{place(path, node)} {node.name}"
        for path in modules("curator", "workers")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ClassDef) and node.name.endswith(bad)
    ]
    assert found == []


def test_only_the_edges_read_the_environment() -> None:
    found = [
        place(path, node)
        for path in modules("curator", "workers")
        if not str(path.relative_to(ROOT)).startswith(READS_ENVIRONMENT)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.expr) and dotted(node) in ("os.environ", "os.getenv", "environ", "getenv")
        if not _is_parameter(path, node)
    ]
    assert found == []


def _is_parameter(path: Path, node: ast.expr) -> bool:
    """Whether a bare ``environ`` is the argument of a function: then whoever calls it read the environment."""
    return isinstance(node, ast.Name) and any(
        isinstance(argument, ast.arg) and argument.arg == node.id for argument in ast.walk(tree(path))
    )


def test_no_module_holds_a_connection() -> None:
    makers = ("make_engine", "create_engine", "sessionmaker", "connect", "Runtime", "Redis", "from_url", "acquire")
    found = [
        place(path, node)
        for path in modules("curator", "workers")
        for node in tree(path).body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and node.value is not None
        and any(dotted(part).split(".")[-1] in makers for part in ast.walk(node.value) if isinstance(part, ast.Call))
    ]
    assert found == []


def test_only_the_store_s_engine_opens_and_ends_transactions() -> None:
    found = [
        place(path, node)
        for path in modules("curator", "workers")
        if path != ROOT / "curator/store/engine.py"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and dotted(node).endswith((".commit", ".rollback"))
    ]
    assert found == []


def test_the_top_level_holds_what_was_agreed() -> None:
    assert {path.name for path in ROOT.iterdir() if not is_ignored(path)} <= TOP_LEVEL


def test_commands_views_store_and_runtime_start_without_torch() -> None:
    """The import contract sees statements; this sees what really gets loaded, other packages' doings included."""
    folders = ("curator/cli", "curator/views", "curator/store")
    names = [
        str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        for path in modules(*folders)
    ]
    code = f"import sys, importlib\nfor name in {[*names, 'curator.runtime']!r}: importlib.import_module(name)\n"
    check = "print([name for name in ('torch', 'transformers', 'celery', 'pydantic') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr

"""What must not be in the source: code from data, errors swallowed, traces of the machine it was built on."""

from __future__ import annotations

import ast
import re

from tests.house_rules.checkout import ROOT, SHIPPED, calls, dotted, files, modules, place, tree

RUNS_DATA = {"eval", "exec", "torch.load", "yaml.load", "os.system", "os.popen", "marshal.loads"}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}
UNSAFE_FLAGS = {"shell", "trust_remote_code"}

# Brackets keep these from finding themselves.
ELSEWHERE = re.compile(r"(?<![\w.])/(?:[w]ork|[o]pt/(?:wheels|pypi)|[t]mp/w|[f]arm|[r]oot/)(?![\w-])")
REGISTRIES = re.compile(
    r"\b(?:pypi[.]org|pythonhosted[.]org|download[.]pytorch[.]org|ghcr[.]io|quay[.]io|docker[.]io|registry[.]npmjs[.]org)"
)


def test_data_never_becomes_code() -> None:
    found = [place(path, call) for path in modules(*SHIPPED) for call in calls(path) if dotted(call) in RUNS_DATA]
    assert found == []


def test_no_pickle() -> None:
    found = [
        place(path, node)
        for path in modules(*SHIPPED)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        if name.split(".")[0] in UNSAFE_MODULES
    ]
    assert found == []


def test_no_shell_and_no_remote_code() -> None:
    found = [
        place(path, call)
        for path in modules(*SHIPPED)
        for call in calls(path)
        for keyword in call.keywords
        if keyword.arg in UNSAFE_FLAGS and not (isinstance(keyword.value, ast.Constant) and not keyword.value.value)
    ]
    assert found == []


def test_vectors_of_half_precision_are_never_added_up() -> None:
    """pgvector's sum and avg of halfvec overflow at 65,504."""
    added = re.compile(r"\b(?:sum|avg)\s*\(\s*(?:\w+\.)?vector\b", re.IGNORECASE)
    sources = [path for folder in SHIPPED for path in files(ROOT / folder) if path.suffix in (".py", ".sql")]
    found = [path.name for path in sources if added.search(path.read_text(encoding="utf-8"))]
    assert added.search("SELECT avg(b.vector)")
    assert found == []


def test_no_error_is_swallowed() -> None:
    """Who catches everything does something with it: a log line or `pass` is nothing."""
    found = [
        place(path, handler)
        for path in modules(*SHIPPED)
        for handler in ast.walk(tree(path))
        if isinstance(handler, ast.ExceptHandler)
        if handler.type is None or dotted(handler.type) in ("Exception", "BaseException")
        if all(_is_nothing(statement) for statement in handler.body)
    ]
    assert found == []


def test_nothing_suppresses_everything() -> None:
    found = [
        place(path, call)
        for path in modules(*SHIPPED)
        for call in calls(path)
        if dotted(call).endswith("suppress")
        if any(dotted(argument) in ("Exception", "BaseException") for argument in call.args)
    ]
    assert found == []


def _is_nothing(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Pass | ast.Continue):
        return True
    if isinstance(statement, ast.Return):
        return statement.value is None
    return isinstance(statement, ast.Expr) and dotted(statement.value).startswith(
        ("log.", "logger.", "logging.", "print")
    )


def test_no_file_knows_the_machine_it_was_written_on() -> None:
    assert _found(ELSEWHERE) == []


def test_no_file_names_a_registry() -> None:
    """Where packages and images come from is the user's configuration."""
    assert _found(REGISTRIES) == []


def _found(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in files()
        for match in pattern.finditer(path.read_text(encoding="utf-8", errors="replace"))
    ]

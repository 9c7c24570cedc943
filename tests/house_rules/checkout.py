"""The files of the checkout and their syntax trees, for rules about how the project is written."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHIPPED = ("curator", "workers", "migrations")
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def ignored_names() -> tuple[str, ...]:
    """What git does not see, by name; git itself need not be installed."""
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    return (".git", *(line.strip("/") for line in lines))


def is_ignored(path: Path) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in ignored_names())


def files(folder: Path = ROOT) -> Iterator[Path]:
    """Every file that belongs to the project."""
    for path in sorted(folder.iterdir()):
        if is_ignored(path):
            continue
        if path.is_dir():
            yield from files(path)
        else:
            yield path


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def modules(*folders: str) -> list[Path]:
    return [path for folder in folders for path in files(ROOT / folder) if path.suffix == ".py"]


def functions(*folders: str) -> Iterator[tuple[str, Function]]:
    """(file:line name, function) of everything defined in these folders."""
    for path in modules(*folders):
        for node in ast.walk(tree(path)):
            if isinstance(node, Function):
                yield f"{place(path, node)} {node.name}", node


def place(path: Path, node: ast.stmt | ast.expr | ast.excepthandler) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def length(node: Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of an expression made of names; a call counts as what it calls; "" for anything else."""
    if isinstance(node, ast.Call):
        return dotted(node.func)
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.Call))

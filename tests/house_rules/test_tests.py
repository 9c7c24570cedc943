"""Fakes are classes and Postgres is real, so hardly anything needs to be patched."""

from __future__ import annotations

import ast

from tests.house_rules.checkout import dotted, modules, place, tree

PATCHES = 10


def test_hardly_anything_is_patched() -> None:
    found = [
        place(path, node)
        for path in modules("tests")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and _patches(dotted(node).split("."))
    ]
    assert len(found) < PATCHES, found


def _patches(names: list[str]) -> bool:
    return "patch" in names or names[0] in ("mock", "mocker")


def test_every_folder_of_tests_is_a_package() -> None:
    """Two files of one name in two folders are two modules only then."""
    folders = {path.parent for path in modules("tests")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []

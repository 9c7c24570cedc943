"""Every fault of docs/faults.md names tests that there are."""

from __future__ import annotations

import ast
import re

from tests.house_rules.checkout import ROOT, modules, tree

PAGE = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")


def test_every_fault_is_shown_by_tests_that_exist() -> None:
    there = {
        node.name for path in modules("tests") for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)
    }
    named = re.findall(r"`(test_\w+)`", PAGE)
    assert [name for name in named if name not in there] == []
    assert [int(number) for number in re.findall(r"^\| (\d+)\.", PAGE, re.MULTILINE)] == list(range(1, 46))

"""Every refusal has a code, a sentence and a fix, and whoever raises it brings the facts for both."""

from __future__ import annotations

import ast
import re
import string
from collections import Counter
from collections.abc import Iterator

import pytest

from curator import errors
from curator.errors import CuratorError, DataError, DependencyDown, UsageError
from tests.house_rules.checkout import calls, dotted, modules, place, tree

CODE = re.compile(r"CUR-[A-Z]+-\d{3}")


def leaves(branch: type[CuratorError] = CuratorError) -> Iterator[type[CuratorError]]:
    for child in branch.__subclasses__():
        if child.__module__ != errors.__name__:
            continue
        if child in (UsageError, DependencyDown, DataError):
            yield from leaves(child)
        else:
            yield child


LEAVES = list(leaves())


def facts(leaf: type[CuratorError]) -> set[str]:
    """The names that the message and the fix leave open."""
    parsed = [*string.Formatter().parse(leaf.template()), *string.Formatter().parse(leaf.hint)]
    return {name for _, name, _, _ in parsed if name}


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.__name__)
def test_a_leaf_is_documented_where_it_is_defined(leaf: type[CuratorError]) -> None:
    assert CODE.fullmatch(leaf.code)
    assert leaf.__doc__
    assert leaf.hint
    assert leaf.__subclasses__() == []
    assert "code" in vars(leaf), "a code is a leaf's own"


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.__name__)
def test_a_leaf_formats_with_its_facts(leaf: type[CuratorError]) -> None:
    error = leaf(**dict.fromkeys(facts(leaf), 3))
    for said in (str(error), error.fix):
        assert said == " ".join(said.split())
        assert "{" not in said


def test_a_code_means_one_thing() -> None:
    used = Counter(leaf.code for leaf in LEAVES)
    twice = {code: [leaf.__name__ for leaf in LEAVES if leaf.code == code] for code, n in used.items() if n > 1}
    assert twice == {}


def test_whoever_raises_brings_every_fact() -> None:
    known = {leaf.__name__: facts(leaf) for leaf in LEAVES}
    missing = [
        f"{place(path, call)} {name} lacks {sorted(known[name] - given)}"
        for path in modules("curator", "workers", "migrations")
        for call in calls(path)
        if (name := dotted(call).split(".")[-1]) in known
        if None not in (given := {keyword.arg for keyword in call.keywords})  # None is **facts
        if not known[name] <= given
    ]
    assert missing == []


def test_every_leaf_is_used() -> None:
    names = {
        node.id if isinstance(node, ast.Name) else node.attr
        for path in modules("curator", "workers")
        if path.name != "errors.py"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Name | ast.Attribute)
    }
    assert [leaf.__name__ for leaf in LEAVES if leaf.__name__ not in names] == []

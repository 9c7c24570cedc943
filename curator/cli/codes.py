"""``curator explain``: every way curator can refuse, from the tree of errors itself."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

import click

from curator import errors
from curator.cli.output import Form, facts, rows_options, show


@dataclass(frozen=True, slots=True)
class Code:
    """What one code means."""

    code: str
    message: str
    fix: str
    exit_code: int
    kind: str


KINDS = {
    errors.UsageError: "the operator asked for something that cannot be; never retried",
    errors.DependencyDown: "a dependency does not answer; retried with backoff",
    errors.DataError: "one record, file or checkpoint is at fault; the others go on",
}


def codes() -> dict[str, Code]:
    """Every code, in order."""
    found = {leaf.code: _code(leaf) for leaf in _leaves(errors.CuratorError)}
    return dict(sorted(found.items()))


def _leaves(error: type[errors.CuratorError]) -> Iterator[type[errors.CuratorError]]:
    if error.__dict__.get("code"):
        yield error
    for child in error.__subclasses__():
        yield from _leaves(child)


def _code(leaf: type[errors.CuratorError]) -> Code:
    kind = next((words for branch, words in KINDS.items() if issubclass(leaf, branch)), "one of a kind")
    return Code(leaf.code, leaf.template(), leaf.hint, leaf.exit_code, kind)


@click.command()
@click.argument("code", required=False)
@rows_options
def explain(code: str | None, form: Form) -> None:
    """Explain an error code; without CODE, list all of them."""
    known = codes()
    if code is None:
        show(known.values(), form, columns=("code", "message"))
        return
    if (found := known.get(code.upper())) is None:
        near = difflib.get_close_matches(code.upper(), known, n=1)
        raise errors.UnknownCode(given=code, suggestion=f" Did you mean {near[0]}?" if near else "")
    if form is Form.TEXT:
        facts(
            {"code": found.code, "means": found.message, "fix": found.fix, "exit": found.exit_code, "kind": found.kind}
        )
    else:
        show([found], form)

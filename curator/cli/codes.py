"""``curator explain``: every way curator can refuse, from the tree of errors itself."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import click

from curator import errors
from curator.cli.output import Form, facts, rows_options, show
from curator.views.text import nearest


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


_FAMILY = "CUR"


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
    return Code(leaf.code, _in_words(leaf.template()), _in_words(leaf.hint), leaf.exit_code, kind)


def _in_words(template: str) -> str:
    """A message with NAME for what is only known when it is raised; a suggestion is not always made."""
    spaced = template.replace("}{", "} {").replace(" {suggestion}", "").replace("{suggestion}", "")
    return re.sub(r"\{(\w+)[^}]*\}", lambda field: field[1].upper(), spaced)


def known_code(given: str) -> Code:
    """The code a user means, in capitals or not.

    Raises:
        UnknownCode: there is none, with the nearest that there is.
    """
    known = codes()
    if found := known.get(given.upper()):
        return found
    near = _near(given, known)
    raise errors.UnknownCode(given=given, suggestion=f" Did you mean {near}?" if near else "")


def _near(given: str, known: Iterable[str]) -> str | None:
    """The code that was probably meant: by its family first, since in all else codes are alike."""
    stem, _, number = given.upper().removeprefix(f"{_FAMILY}-").partition("-")
    family = nearest(stem, {code.split("-")[1] for code in known})
    return nearest(f"{_FAMILY}-{family}-{number}", (code for code in known if code.split("-")[1] == family))


@click.command()
@click.argument("code", required=False)
@rows_options
def explain(code: str | None, form: Form) -> None:
    """Explain an error code; without CODE, list all of them."""
    if code is None:
        show(codes().values(), form, columns=("code", "message"))
        return
    found = known_code(code)
    if form is Form.TEXT:
        facts(
            {"code": found.code, "means": found.message, "fix": found.fix, "exit": found.exit_code, "kind": found.kind}
        )
    else:
        show([found], form)

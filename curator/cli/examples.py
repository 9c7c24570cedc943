"""``curator why`` and ``curator neighbours``: one example, and what drove the verdict on it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from curator.cli.invocation import Invocation, pass_invocation
from curator.cli.output import Form, cell, facts, rows_options, show
from curator.views.text import counted

if TYPE_CHECKING:
    from curator.runtime import Runtime
    from curator.views.examples import Why
    from curator.views.pulls import Driven, Pull, Side, Words

_CONTROLS = ("loss", "calibrated_loss", "gradient_norm", "self_influence", "length")
_SCORES = (
    "slice", "normalised_influence", "exact_influence", "influence", "stderr", "percentile", "harm", "p_value",
    "embedding_similarity", "bm25",
)  # fmt: skip

_LAYERS, _WORDS = 12, 16
_INGREDIENTS = ("slice", "evidence", "value", "deviations", "weight", "part")


@click.command()
@click.argument("example")
@click.option("--pulls", type=click.IntRange(0), default=5, show_default=True, help="Validation examples a side.")
@click.option("--neighbours", type=click.IntRange(0), default=5, show_default=True, help="Similar arrivals.")
@click.option("--tokens", is_flag=True, help="Which words, too: loads the model, which takes its time.")
@rows_options
@pass_invocation
def why(here: Invocation, example: str, pulls: int, neighbours: int, tokens: bool, form: Form) -> None:
    """Show what drove the verdict on EXAMPLE.

    EXAMPLE is an example_id, the record's own id, or id:NUMBER where the two could be confused.

    Under each slice, the pulls of all validation examples add up to the normalised influence: negative ones say
    that training on EXAMPLE raises their loss. No single one decides; a share is of all that pulls the same way. Their
    labels and the layers divide the same sum in two other ways. --tokens says where in the text it lies: at a token
    that the model sees, the agreement of the gradient there, which is not always where the mistake was typed; with a
    model that sees no tokens, what leaving the word out changes.

    Harm adds up several kinds of evidence, each in deviations from trusted examples: the part is deviations by weight,
    and the largest part is what carried the harm. Values are as they are added: influence with its sign turned, the
    logarithm of self-influence, and the log-odds against the record at its calibrated loss.
    """
    from curator.store import engine
    from curator.views import examples

    with here.runtime() as opened:
        with engine.read(opened.engine) as connection:
            found = examples.why(connection, examples.find(connection, example), pulls=pulls, neighbours=neighbours)
        if tokens and found.driven_by:
            found = _with_words(opened, found)
    if form is Form.TEXT:
        _print(found)
    else:
        show([found], form)


@click.command()
@click.argument("example")
@click.option("--limit", type=click.IntRange(1), default=10, show_default=True)
@rows_options
@pass_invocation
def neighbours(here: Invocation, example: str, limit: int, form: Form) -> None:
    """List the arrivals whose gradients are most like that of EXAMPLE."""
    from curator.views import examples

    with here.reading() as connection:
        show(examples.similar(connection, examples.find(connection, example), limit), form)


def _with_words(opened: Runtime, found: Why) -> Why:
    from curator.views import tokens

    return tokens.explain(found, opened.settings.project, {**os.environ, "CURATOR_DATABASE_URL": opened.database_url})


def _print(why: Why) -> None:
    verdict, cut = why.verdict or "none", why.controls.get("cut_tokens")
    facts(
        {
            "example": f"{why.example_id} ({why.external_id or 'without an id of its own'})",
            "source": why.source,
            "arrived": why.arrived_at,
            "times": why.occurrences,
            "verdict": f"{verdict}: {why.reason}" if why.reason else verdict,
            "review": why.review,
            "q value": why.q_value,
            "state": why.state,
            **({"not seen": f"{counted(int(cut), 'token')} behind the limit"} if cut else {}),
            "text": why.preview,
        }
    )
    several = len({score["validation_set"] for score in why.scores}) > 1
    of_set = ("validation_set",) if several else ()
    _section("Scores (positive helps, negative harms)")
    show(why.scores, Form.TEXT, (*of_set, *_SCORES))
    if why.harm_from:
        _section("What the harm is made of (deviations from trusted examples, higher is worse; the largest part leads)")
        show(why.harm_from, Form.TEXT, (*of_set, *_INGREDIENTS))
    _section("Controls (percentile: share of arrivals below it; length in bytes, among the latest 1,000)")
    show(({"control": n, "value": why.controls.get(n), "percentile": why.controls.get(f"{n}_percentile")}
          for n in _CONTROLS), Form.TEXT)  # fmt: skip
    for driven in why.driven_by:
        _print_driven(driven)
    for words in why.words:
        _print_words(words)
    _section("Most similar arrivals, in gradient space")
    show(why.neighbours, Form.TEXT)
    _section("Decisions")
    show(why.history, Form.TEXT)


def _print_driven(driven: Driven) -> None:
    _section(f"What drove slice {driven.slice} of {driven.validation_set}: {cell(driven.total)} in all")
    for side, word in ((driven.down, "down"), (driven.up, "up")):
        if side.n:
            click.echo(_summary(side, driven.n, word))
    rows = [
        *map(_row, driven.down.named),
        *_rest(driven.down),
        *_rest(driven.up),
        *map(_row, reversed(driven.up.named)),
    ]
    show(rows, Form.TEXT)
    if driven.by_label:
        _section("The same by the label of the validation example")
        show(driven.by_label, Form.TEXT)
    if driven.by_layer:
        _section("The same by layer (share: of the sizes of all layers' pulls)")
        show(driven.by_layer[:_LAYERS], Form.TEXT)
        _say_rest("layer", [layer.pull for layer in driven.by_layer[_LAYERS:]])


def _print_words(words: Words) -> None:
    meaning = {
        "position": "parts of the exact normalised influence, which they add up to",
        "removal": "the normalised influence, less that without the word",
    }
    _section(f"The words that weigh most on slice {words.slice} ({meaning[words.how]})")
    weightiest = sorted(words.tokens, key=lambda token: -abs(token.pull))[:_WORDS]
    show([token for token in words.tokens if token in weightiest], Form.TEXT)
    if words.how == "position":
        _say_rest("word", [token.pull for token in words.tokens if token not in weightiest])


def _say_rest(what: str, pulls: Sequence[float]) -> None:
    """What a table leaves out, so that its column adds up."""
    if pulls:
        click.echo(f"and {counted(len(pulls), f'other {what}')}, {cell(sum(pulls))} together")


def _summary(side: Side, n: int, word: str) -> str:
    strongest = "strongest is" if len(side.named) == 1 else f"{len(side.named)} strongest are"
    named = f"; the {strongest} {side.named_share:.1%} of that" if side.named else ""
    pull = "pulls" if side.n == 1 else "pull"
    return f"{side.n} of {counted(n, 'validation example')} {pull} it {word}, by {cell(side.total)} together{named}"


def _row(pull: Pull) -> dict[str, object]:
    return {
        "pull": pull.pull,
        "share": f"{pull.share:.1%}",
        "id": pull.external_id or pull.validation_example_id,
        "preview": pull.preview,
    }


def _rest(side: Side) -> list[dict[str, object]]:
    others = side.n - len(side.named)
    if not others:
        return []
    way = "down" if side.total < 0 else "up"
    share = f"{1 - side.named_share:.1%}"
    named = counted(others, "other that pulls", "others that pull")
    return [{"pull": side.rest, "share": share, "id": "", "preview": f"{named} {way}"}]


def _section(title: str) -> None:
    click.echo(f"\n{cell(title)}")

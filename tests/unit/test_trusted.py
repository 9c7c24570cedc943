"""Trusted data that cannot be a yardstick: none at all, a slice that is empty or too small, or that says nothing."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from curator.errors import EmptyValidation, MissingSliceField, NotMeasurable, TooFewTrusted
from curator.influence.attribution import Attributor, RecipeSpec
from curator.stages import directions, trusted
from curator.stages.instrument import Instrument, Room
from curator.store.validation import ValidationExample
from curator.types import Lease, Record, Stage
from curator.views.obstacles import reach


def records(*slices: str | None) -> list[Record]:
    rows = [{"x": n} | ({"topic": name} if name is not None else {}) for n, name in enumerate(slices)]
    return [Record(n, b"%d" % n, "", json.dumps(row)) for n, row in enumerate(rows, start=1)]


def test_a_validation_set_without_a_record_is_refused() -> None:
    with pytest.raises(EmptyValidation):
        trusted.examples("trusted", "", [], [], 0.5)


@pytest.mark.parametrize("nothing", [None, ""])
def test_a_record_without_a_slice_is_named(nothing: str | None) -> None:
    with pytest.raises(MissingSliceField, match="Line 6"):
        trusted.examples("trusted", "topic", records(*["maths"] * 5, nothing), [], 0.5)


def test_a_slice_that_is_too_small_to_be_split_is_named() -> None:
    with pytest.raises(TooFewTrusted, match=r"'safety'.* needs 4 distinct examples and has 3"):
        trusted.examples("trusted", "topic", records(*["maths"] * 5, *["safety"] * 3), [], 0.5)


def labelled(*slices: str) -> list[Record]:
    rows = [{"text": str(n), "label": n % 3, "topic": name} for n, name in enumerate(slices)]
    return [Record(n, b"%d" % n, "", json.dumps(row)) for n, row in enumerate(rows, start=1)]


def test_faults_are_rehearsed_on_a_part_of_what_is_no_reference() -> None:
    given = labelled(*["maths"] * 100, *["safety"] * 80)
    rows = trusted.examples("trusted", "topic", given, [], 0.5)
    assert trusted.roles(rows) == {"maths": (38, 50, 0, 12), "safety": (30, 40, 0, 10)}
    again = trusted.examples("trusted", "topic", given[::-1], [], 0.5)
    assert sorted(rows, key=repr) == sorted(again, key=repr), "by digest, in whatever order"


@pytest.mark.parametrize(
    "given", [labelled(*["maths"] * 100, *["safety"] * 60), records(*["maths"] * 100, *["safety"] * 80)]
)
def test_none_are_rehearsed_where_one_slice_has_too_few_or_nothing_to_swap(given: list[Record]) -> None:
    """They would be lost to the direction, and nothing learned from them."""
    rows = trusted.examples("trusted", "topic", given, [], 0.5)
    assert not any(role.rehearsal for role in trusted.roles(rows).values())


def test_too_few_references_say_how_many_are_needed() -> None:
    assert "at least 19 are needed" in reach(8, 0.05, 1)
    assert "at least 39 are needed" in reach(30, 0.05, 2), "each of two slices is looked at"
    assert "to look worse than all of them" in reach(39, 0.05, 2)


class Squares:
    """A record of zeros has no gradient."""

    def collate(self, rows):
        return torch.tensor(rows)

    def losses(self, model, batch):
        return model(batch).tanh().square().sum(dim=1)


def test_a_slice_of_which_nothing_has_a_gradient_is_named() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(2, 3, bias=False)
    fitted = Attributor.fit(
        model, Squares().losses, [torch.tensor([[0.5, 1.0], [2.0, -1.0]])], RecipeSpec(dimension=6, exact=False)
    )
    tools = Instrument(
        SimpleNamespace(), Squares(), model, torch.device("cpu"), fitted.spec, Room(5, 40), attributor=fitted
    )
    rows = {"maths": [0.5, 1.0], "safety": [0.0, 0.0]}
    examples = [ValidationExample(n, 1, name, "direction", row) for n, (name, row) in enumerate(rows.items())]
    batch = directions.Batch(Lease("", Stage.DIRECTIONS, 1, (1,), (1,)), 1, 1, examples, True)
    with pytest.raises(NotMeasurable, match=r"'safety'.*1 no_signal"):
        directions.compute(tools, batch)

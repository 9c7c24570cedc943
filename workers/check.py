"""``python -m workers.check``: does the workload load and measure? A line on stdout, or an error as commands print it.

``curator doctor`` runs this in a process of its own, because it needs torch and runs the user's code.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from statistics import mean
from typing import Any

import torch
from sqlalchemy import Connection

from curator.errors import BatchDependent
from curator.influence.confidence import OVERCONFIDENT, WRONG_THROUGHOUT
from curator.runtime import Runtime
from curator.settings import Settings
from curator.stages import instrument
from curator.stages.instrument import Instrument
from curator.stages.recipes import spec
from curator.store import recipes, validation
from curator.store.engine import read
from curator.store.recipes import Recipe
from curator.views.text import counted
from curator.workloads import base
from workers import aside

SAMPLE = 8
TOLERANCE = 1e-3
"""Relative difference of a loss or gradient norm alone and in a batch: padding in float32 stays well below."""


def check(runtime: Runtime) -> str:
    """What the workload did with a few trusted records.

    Raises:
        BatchDependent: an example is measured differently alone and among others.
        CuratorError: whatever stands in the way of measuring, with its fix.
    """
    with read(runtime.engine) as connection:
        recipe = recipes.recipe_in_use(connection)
        if recipe is None:
            return _checkpoint_alone(connection, runtime.settings)
        sets = [number for number, _ in validation.validation_sets_in_use(connection)]
        records = [example.record for example in validation.validation_examples(connection, sets)[:SAMPLE]]
        tools = instrument.load(connection, runtime.settings, recipe.id, None)
    if tools.attributor is None:
        return _tried(tools, records)
    _refuse_dependence(batch_dependence(tools, records))
    return f"the model loads and measures on {tools.device}; temperature {recipe.temperature:.2f}{_meaning(recipe)}"


def _checkpoint_alone(connection: Connection, settings: Settings) -> str:
    """Before there is trusted data: does the model load, and does what the settings ask for suit it?"""
    checkpoint = recipes.checkpoint_in_use(connection)
    if checkpoint is None:
        return "nothing to load yet: there is no checkpoint"
    asked = Recipe(0, checkpoint, spec(settings), 0, 1.0, "fitting", in_use=False)
    return f"the model loads{_kept(instrument.unfitted(settings, asked))}"


def _kept(tools: Instrument) -> str:
    by_layer = tools.budgets()
    kept = sum(by_layer.values())
    coded = f", as {tools.spec.code_dimension} numbers" if tools.spec.shortens(kept) else ""
    return f" on {tools.device}; {kept} entries of {counted(len(by_layer), 'layer')} are kept{coded}"


def _tried(tools: Instrument, records: list[Mapping[str, Any]]) -> str:
    """Before a recipe is fitted: do the records become a batch, and the batch losses that are each record's own?"""
    kept = _kept(tools)
    together = _losses(tools, records)
    alone = [_losses(tools, [record])[0] for record in records]
    _refuse_dependence(max(map(_apart, alone, together)))
    tried = counted(len(together), "trusted record has", "trusted records have")
    return f"the model loads{kept}; {tried} a mean loss of {mean(together):.3g}"


def _losses(tools: Instrument, records: list[Mapping[str, Any]]) -> list[float]:
    losses = base.losses_of(tools.workload)
    with torch.no_grad():
        return [float(loss) for batch in tools.batches(records) for loss in losses(tools.model, batch)]


def batch_dependence(tools: Instrument, records: list[Mapping[str, Any]]) -> float:
    """The largest relative difference between measuring records together and one at a time."""
    together = tools.measure(records)
    worst = 0.0
    for row, record in enumerate(records):
        alone = tools.measure([record])
        for name in ("loss_B", "gradient_norm_B", "whitened_norm_B"):
            worst = max(worst, _apart(float(getattr(alone, name)[0]), float(getattr(together, name)[row])))
    return worst


def _apart(one: float, other: float) -> float:
    """Relative difference; what is not finite has a state of its own, and says nothing here."""
    if not (math.isfinite(one) and math.isfinite(other)):
        return 0.0
    return abs(one - other) / max(abs(one), abs(other), 1e-6)


def _refuse_dependence(worst: float) -> None:
    if worst > TOLERANCE:
        raise BatchDependent(worst=f"{worst:.1%}", limit=f"{TOLERANCE:.1%}")


def _meaning(recipe: Recipe) -> str:
    if recipe.temperature >= WRONG_THROUGHOUT:
        return " (the end of the search: the checkpoint is wrong on most trusted examples)"
    if recipe.temperature <= OVERCONFIDENT:
        return ""
    return " (overconfident: rank by normalised influence; the plain influence of its loss would mislead)"


if __name__ == "__main__":
    sys.exit(aside.answer("check", check))

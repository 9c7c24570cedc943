"""``python -m workers.explain EXAMPLE``: which words drove a score, by a pass through the model; JSON on stdout.

``curator why --tokens`` runs this in a process of its own, because it needs torch and runs the user's code.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from curator.errors import NoTokens
from curator.influence.parts import Floats
from curator.influence.scoring import Directions
from curator.runtime import Runtime
from curator.stages import instrument, yardstick
from curator.stages.instrument import Instrument
from curator.store import directions, examples, recipes
from curator.store.engine import read
from curator.workloads import base
from workers import aside

WORDS = 400
"""Of a longer text only the first are left out one by one: each costs a pass."""

Parts = Sequence[tuple[str, Floats]]


def explain(runtime: Runtime, example_id: int) -> dict[str, object]:
    """What each word, and each layer, adds to the normalised influence on each slice in use.

    ``how`` is ``position`` where the model sees tokens: their exact parts, which add up to the exact score; an inner
    product lies where the gradient agrees with the slice, not where the mistake was typed. Else it is ``removal``: the
    compressed score less that of the record without the word, which adds up to nothing.

    Raises:
        NoTokens: the record has no text, or the workload says not what its model sees.
        CuratorError: whatever stands in the way of measuring.
    """
    with read(runtime.engine) as connection:
        recipe = recipes.recipe_in_use(connection)
        assert recipe is not None, "asked for what has a score"
        set_id = directions.directions_in_use(connection, recipe.id)
        assert set_id is not None, "asked for what has a score"
        record = examples.fetch(connection, [example_id])[example_id]
        tools = instrument.load(connection, runtime.settings, recipe.id, set_id)
        towards = yardstick.load(connection, recipe, set_id).directions
    how, tokens = _tokens(tools, record, towards)
    [batch] = tools.batches([record])
    layers = tools.fitted.by_layer(batch, towards).normalised
    return {
        "how": how,
        "tokens": [[word, pull_S.tolist()] for word, pull_S in tokens],
        "layers": [[name, pull_BS[0].tolist()] for name, pull_BS in layers.items()],
    }


def _tokens(tools: Instrument, record: Mapping[str, Any], towards: Directions) -> tuple[str, Parts]:
    positions = base.positions_of(tools.workload, record)
    if positions and tools.towards is not None:
        [batch] = tools.batches([record])
        parts = tools.fitted.by_position(batch, tools.towards).over_layers(len(positions)).normalised
        if parts:
            return "position", list(zip(positions, parts[""][0], strict=True))
    if isinstance(text := record.get("text"), str) and text.strip():
        return "removal", _without_each(tools, record, text, towards)
    raise NoTokens


def _without_each(tools: Instrument, record: Mapping[str, Any], text: str, towards: Directions) -> Parts:
    words = list(re.finditer(r"\S+", text))[:WORDS]
    without = [{**record, "text": text[: word.start()] + text[word.end() :]} for word in words]
    unit_BK = tools.measure([record, *without]).unit_BK
    score_BS = np.asarray((unit_BK @ towards.unit_SK.T).double().numpy())
    return [(word.group(), score_BS[0] - score_S) for word, score_S in zip(words, score_BS[1:], strict=True)]


if __name__ == "__main__":
    sys.exit(aside.answer("explain", lambda runtime: json.dumps(explain(runtime, int(sys.argv[1])))))

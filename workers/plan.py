"""``python -m workers.plan FILE...``: what measuring these files would cost, as JSON on stdout.

``curator plan`` runs this in a process of its own, because it needs torch and runs the user's code.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from curator.errors import NoCheckpoint, NothingAccepted
from curator.runtime import Runtime
from curator.settings import Settings
from curator.sources.files import open_records
from curator.stages import cost, folders, instrument
from curator.stages.recipes import spec
from curator.store import recipes, validation
from curator.store.engine import read
from curator.store.recipes import Recipe
from curator.types import Record
from curator.workloads import base
from workers import aside

SAMPLE = 64


def plan(runtime: Runtime, files: Sequence[Path]) -> dict[str, Any]:
    """The cost of an example, and how many there are.

    Raises:
        NothingAccepted: no record of the files can be used.
        NoCheckpoint: there is nothing to measure with.
        CuratorError: whatever stands in the way of measuring, with its fix.
    """
    with read(runtime.engine) as connection:
        recipe, roles = recipes.recipe_in_use(connection), validation.roles_in_use(connection)
        checkpoint = recipes.checkpoint_in_use(connection)
        if checkpoint is None:
            raise NoCheckpoint
        if recipe is None:
            asked = Recipe(0, checkpoint, spec(runtime.settings), 0, 1.0, "fitting", in_use=False)
            tools = instrument.unfitted(runtime.settings, asked)
        else:
            tools = instrument.load(connection, runtime.settings, recipe.id, None)
    found, picked = sampled(runtime.settings, files)
    read_in = [json.loads(record.record) for record in picked]
    usable = [record for record in read_in if base.reason_against(tools.workload, record) is None]
    if not usable:
        raise NothingAccepted(path=", ".join(map(str, files)))
    size = sum(len(record.record) for record in picked) / len(picked)
    each = cost.of_sample(tools, usable, size)
    trusted = cost.passes_over_trusted(roles, tools.spec)
    return {**asdict(each), "bytes": each.bytes, "examples": found, "trusted": trusted}


def sampled(settings: Settings, files: Sequence[Path]) -> tuple[int, list[Record]]:
    """How many records the files hold, and some of them, drawn evenly (Vitter's reservoir, algorithm R)."""
    lots = random.Random(0)  # noqa: S311 - a sample, not a secret
    found = 0
    picked: list[Record] = []
    for file in files:
        fields = settings.sources.fields_of(folders.source_name(file))
        for record in open_records(file, settings.limits, 0, settings.workload.kind == "torch", fields):
            if not isinstance(record, Record):
                continue
            found += 1
            if len(picked) < SAMPLE:
                picked.append(record)
            elif (place := lots.randrange(found)) < SAMPLE:
                picked[place] = record
    return found, picked


if __name__ == "__main__":
    sys.exit(aside.answer("plan", lambda runtime: json.dumps(plan(runtime, [Path(name) for name in sys.argv[1:]]))))

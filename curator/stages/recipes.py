"""What arrivals are to be measured with: register checkpoints and validation sets, and ask for directions.

Torch-free, so that a command can do it; the measuring itself is the stage ``directions``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from curator.errors import (
    CheckpointInUse,
    CheckpointNameTaken,
    NoSuchCheckpoint,
    NoSuchValidationSet,
)
from curator.settings import Settings
from curator.stages import trusted
from curator.stages.trusted import Roles
from curator.store import directions, offers, recipes, retention, validation, work
from curator.types import Record, Stage


def add_checkpoint(connection: Connection, settings: Settings, name: str, path: Path, digest: bytes) -> int | None:
    """Register a checkpoint and measure with it from now on; returns what ``ask`` does.

    Raises:
        CheckpointNameTaken: the name belongs to other content.
    """
    register_checkpoint(connection, name, path, digest)
    return use_checkpoint(connection, settings, name)


def register_checkpoint(connection: Connection, name: str, path: Path, digest: bytes) -> None:
    """Note where a checkpoint is and what its content was; nothing is measured with it yet.

    Raises:
        CheckpointNameTaken: the name belongs to other content.
    """
    if not recipes.add_checkpoint(connection, name, str(path), digest):
        known = recipes.checkpoint(connection, name)
        if known is None or known.digest != digest:
            raise CheckpointNameTaken(name=name)


def use_checkpoint(connection: Connection, settings: Settings, name: str) -> int | None:
    """Measure with a checkpoint that is registered; returns what ``ask`` does.

    Raises:
        NoSuchCheckpoint: it is not.
    """
    if recipes.checkpoint(connection, name) is None:
        raise NoSuchCheckpoint(name=name)
    recipes.use_checkpoint(connection, name)
    return ask(connection, settings)


def drop_checkpoint(connection: Connection, name: str) -> int:
    """Let go of what was measured at a checkpoint that is not in use any more; return how many examples that were.

    Raises:
        NoSuchCheckpoint: there is none of that name.
        CheckpointInUse: new arrivals are measured with it.
    """
    recipes.change_footing(connection)
    checkpoint = recipes.checkpoint(connection, name)
    if checkpoint is None:
        raise NoSuchCheckpoint(name=name)
    if checkpoint.in_use:
        raise CheckpointInUse(name=name)
    return retention.drop_measurements(connection, checkpoint.id)


def add_validation(
    connection: Connection,
    settings: Settings,
    name: str,
    slice_field: str,
    good: Iterable[Record],
    bad: Iterable[Record] = (),
) -> Mapping[str, Roles]:
    """A new version of a validation set, perhaps as a contrast of good with bad; returns its counts by slice.

    Raises:
        EmptyValidation, MissingSliceField, TooFewTrusted, ContrastMissing, ContrastOverlaps: see ``trusted.examples``.
    """
    rows = trusted.examples(name, slice_field, good, bad, settings.scores.references)
    digest = hashlib.sha256(b"".join(sorted(row.digest + row.role.encode() for row in rows))).digest()
    validation.add_validation_set(connection, name, slice_field, digest, rows)
    ask(connection, settings)
    return trusted.roles(rows)


def waits_for_checkpoint(connection: Connection) -> bool:
    """Whether nothing can be measured because there is no checkpoint yet."""
    return recipes.checkpoint_in_use(connection) is None


def remove_validation(connection: Connection, settings: Settings, name: str) -> None:
    """Stop measuring against a validation set; its scores stay readable.

    Raises:
        NoSuchValidationSet: none of that name is in use.
    """
    if not validation.retire_validation_set(connection, name):
        raise NoSuchValidationSet(name=name, version=" in use")
    ask(connection, settings)


def use_validation(connection: Connection, settings: Settings, name: str, version: int) -> None:
    """Measure against a former version of a validation set again.

    Raises:
        NoSuchValidationSet: there is no such version.
    """
    if not validation.use_validation_set(connection, name, version):
        raise NoSuchValidationSet(name=name, version=f" version {version}")
    ask(connection, settings)


def ask(connection: Connection, settings: Settings) -> int | None:
    """Ask for directions of what is in use now; None while a checkpoint or a validation set is missing.

    A checkpoint and what the settings ask for are one recipe, whatever is trusted. It keeps the curvature of the
    trusted data that was in use when it was first measured: a validation set that comes later gets a direction under
    the same recipe, no gradient has to be computed again, and going back to a checkpoint finds what was measured there.
    """
    recipes.change_footing(connection)
    checkpoint = recipes.checkpoint_in_use(connection)
    sets = validation.validation_sets_in_use(connection)
    if checkpoint is None or not sets:
        return None
    asked = spec(settings)
    key = _digest({"checkpoint": [checkpoint.name, checkpoint.digest.hex()], "spec": asked})
    recipe_id = recipes.use_recipe(connection, key, checkpoint.id, asked)
    key = _digest([digest.hex() for _, digest in sets])
    set_id = directions.ask_directions(connection, recipe_id, key, [number for number, _ in sets])
    work.withdraw(connection, recipe_id, set_id)
    if directions.direction_set_state(connection, set_id) == "ready":
        directions.use_directions(connection, set_id)
        offers.recipe_in_use(connection)
    else:
        work.offer_again(connection, Stage.DIRECTIONS, [set_id], recipe_id=recipe_id)
    return set_id


def changed(connection: Connection, settings: Settings) -> tuple[str, ...]:
    """The settings by which ``ask`` would come to another recipe than the one in use, of the same checkpoint."""
    in_use = recipes.recipe_in_use(connection)
    asked = json.loads(json.dumps(spec(settings)))  # as it would be stored
    if in_use is None:
        return ()
    gradients, scores = ({f.name for f in fields(cls)} for cls in (type(settings.gradients), type(settings.scores)))
    names: list[str] = []
    for section, values in asked.items():
        for key in values.keys() | in_use.spec.get(section, {}).keys():
            if values.get(key) != in_use.spec.get(section, {}).get(key):
                of = "scores" if section == "gradients" and key in scores - gradients else section
                names.append(f"{of}.{key}")
    return tuple(sorted(names))


def spec(settings: Settings) -> dict[str, Any]:
    """What decides the meaning of a gradient, as plain values: half of a recipe's key."""
    asked, scores = settings.gradients, settings.scores
    is_language = settings.workload.kind == "causal-lm"
    exact = {
        "exact_curvature": scores.exact_curvature,
        "exact_rank": _unless_auto(scores.exact_rank, None),
        # Corrected eigenvalues have no factors to carry a sketch through.
        "exact_sketch": scores.exact_sketch if scores.exact_curvature == "kfac" else 0,
    }
    # So written, a recipe without exact scores is the one it was before they had these settings.
    without = {"exact_curvature": "kfac", "exact_rank": 0}
    return {
        "workload": {
            "kind": settings.workload.kind,
            "factory": settings.workload.factory,
            "options": {k: v for k, v in settings.workload.options.items() if k not in settings.workload.placing},
        },
        "gradients": {
            "layers": list(asked.layers) or ["*"],
            "mask": asked.mask,
            "dimension": asked.dimension,
            "kept": dict(asked.kept),
            "importance": asked.importance,
            "budget": asked.budget,
            "code": asked.code,
            "code_dimension": asked.code_dimension if asked.code != "none" else 0,
            "seed": asked.seed,
            "damping": scores.damping,
            "curvature": scores.curvature,
            # A margin is of one decision; the mean loss of many tokens has none.
            "measurement": _unless_auto(scores.measurement, "loss" if is_language else "margin"),
            "exact": asked.exact,
            "exact_norm": _unless_auto(asked.exact_norm, not is_language),
            **(exact if asked.exact else without),
        },
    }


def _unless_auto(asked: Any, otherwise: Any) -> Any:
    return otherwise if asked == "auto" else asked


def _digest(value: object) -> bytes:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()

"""Every kind of recipe that the settings offer, from trusted data to scores, with each stage's tools read back anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from sqlalchemy import Engine, text

from curator.influence.evaluate import auc
from curator.settings import Settings, load
from curator.sources import jsonl
from curator.stages import directions, examples, gradients, recipes, scores
from curator.stages.turn import Turn
from curator.store import recipes as store
from curator.store.engine import begin, read
from curator.types import Record
from curator.views import status
from curator.workloads import checkpoints
from tests import digits

ASKED: Mapping[str, tuple[str, int]] = {
    "pca+sjlt": ('dimension = 960\ncode = "pca+sjlt"\ncode_dimension = 120', 120),
    "sjlt of a weighted mask": (
        'dimension = 960\nimportance = "rms"\nbudget = "energy"\ncode = "sjlt"\ncode_dimension = 240',
        240,
    ),
    "given layers": ('dimension = 300\nkept = { "4" = 100 }\nlayers = ["2", "4"]\nmask = "neuron"', 300),
    "plain Fisher": ('dimension = 400\n[scores]\ncurvature = "fisher"', 400),
    "eigenvalues corrected, low rank": ('dimension = 400\n[scores]\nexact_curvature = "ekfac"\nexact_rank = 12', 400),
}


@pytest.mark.parametrize("asked", ASKED)
def test_a_recipe_of_the_settings_scores_arrivals_and_finds_what_is_wrong(
    engine: Engine, settings: Settings, digits_files: digits.Files, asked: str
) -> None:
    toml, dimension = ASKED[asked]
    chosen = _chosen(settings, toml)
    trusted = list(jsonl.open_records(digits_files.validation, chosen.limits, any_shape=True))
    with begin(engine) as connection:
        digest = bytes.fromhex(checkpoints.digest(digits_files.checkpoint))
        recipes.add_checkpoint(connection, chosen, "base", digits_files.checkpoint, digest)
        recipes.add_validation(connection, chosen, "trusted", "", [r for r in trusted if isinstance(r, Record)])
        examples.open_file(connection, digits_files.arrivals, "vendor", jsonl.file_digest(digits_files.arrivals))
    for stage in (examples, directions, gradients, scores):
        Turn(engine, chosen).run(stage, 60)
    query = "SELECT external_id, normalised_influence, exact_influence, normalised_stderr FROM curator.influence_scores"
    with read(engine) as connection:
        recipe = store.recipe_in_use(connection)
        rows = connection.execute(text(query)).all()
    assert recipe is not None
    assert recipe.dimension == dimension
    wrong = np.array([row.external_id in digits_files.wrong for row in rows])
    for name in ("normalised_influence", "exact_influence"):
        assert auc(-np.array([getattr(row, name) for row in rows]), wrong) > 0.85, name
    assert all(row.normalised_stderr > 0 for row in rows)


def test_it_is_said_before_settings_have_all_measured_again(
    engine: Engine, settings: Settings, digits_files: digits.Files
) -> None:
    chosen = _chosen(settings, "dimension = 300")
    other = replace(
        chosen,
        gradients=replace(chosen.gradients, exact_norm=False, batch=7),
        scores=replace(chosen.scores, damping=0.5, references=0.4),
    )
    trusted = list(jsonl.open_records(digits_files.validation, chosen.limits, any_shape=True))
    digest = bytes.fromhex(checkpoints.digest(digits_files.checkpoint))
    with begin(engine) as connection:
        assert recipes.changed(connection, chosen) == (), "nothing is in use yet"
        recipes.add_checkpoint(connection, chosen, "base", digits_files.checkpoint, digest)
        recipes.add_validation(connection, chosen, "trusted", "", [r for r in trusted if isinstance(r, Record)])
        assert recipes.changed(connection, chosen) == ()
        changed = recipes.changed(connection, other)
        assert changed == ("gradients.exact_norm", "scores.damping")
        notes = status.status(connection, None, changed=changed).notes
        assert any("(gradients.exact_norm, scores.damping)" in note and "0 examples again" in note for note in notes)
        recipes.ask(connection, other)
        assert recipes.changed(connection, other) == ()


def _chosen(settings: Settings, toml: str) -> Settings:
    """The settings of the digits with others for [gradients] and [scores], as curator.toml says them."""
    path = settings.project / "curator.toml"
    path.write_text(path.read_text().replace("dimension = 960", toml))
    asked = load(settings.project, environ={})
    return replace(settings, gradients=asked.gradients, scores=asked.scores)

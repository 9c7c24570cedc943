"""Settings become recipes: every setting that gives a vector its meaning is frozen into the recipe's key."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from curator import settings
from curator.errors import BadSetting
from curator.influence.attribution import RecipeSpec
from curator.influence.codes import CODE_KINDS
from curator.influence.curvature import CURVATURE_KINDS
from curator.influence.dropout import MASK_KINDS
from curator.settings import Gradients, Scores, Settings, Workload
from curator.stages import recipes

PLAIN = Settings(project=Path("/nowhere"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gradients.mask", "neuron"),
        ("gradients.dimension", 960),
        ("gradients.kept", {"first": 7}),
        ("gradients.importance", "rms"),
        ("gradients.budget", "energy"),
        ("gradients.code", "sjlt"),
        ("gradients.layers", ("first",)),
        ("gradients.seed", 1),
        ("gradients.exact", False),
        ("gradients.exact_norm", False),
        ("scores.damping", 1.0),
        ("scores.measurement", "loss"),
        ("scores.curvature", "fisher"),
        ("scores.exact_curvature", "ekfac"),
        ("scores.exact_rank", 4),
        ("scores.exact_sketch", 0),
    ],
)
def test_what_changes_the_meaning_of_a_vector_changes_its_recipe(key: str, value: Any) -> None:
    section, name = key.split(".")
    changed = replace(PLAIN, **{section: replace(getattr(PLAIN, section), **{name: value})})
    before, after = recipes.spec(PLAIN), recipes.spec(changed)
    assert after != before
    assert RecipeSpec.from_dict(after["gradients"]) != RecipeSpec.from_dict(before["gradients"])


@pytest.mark.parametrize(("key", "value"), [("batch", 3), ("device", "cpu"), ("workers", 2)])
def test_how_it_is_computed_does_not(key: str, value: Any) -> None:
    changed = replace(PLAIN, gradients=replace(PLAIN.gradients, **{key: value}))
    assert recipes.spec(changed) == recipes.spec(PLAIN)


@pytest.mark.parametrize(("kind", "same"), [("causal-lm", True), ("text-classifier", True), ("torch", False)])
def test_where_a_model_is_does_not_either_but_a_factorys_options_are_its_own(kind: Any, same: bool) -> None:
    placed = {"device_map": "auto", "max_memory": {"cpu": "2GiB"}, "max_tokens": 9}
    plain, spread = (
        recipes.spec(replace(PLAIN, workload=Workload(kind, options=options)))
        for options in ({"max_tokens": 9}, placed)
    )
    assert (plain == spread) == same


@pytest.mark.parametrize(
    ("kind", "asked", "expected"),
    [
        ("torch", {}, (True, None, "margin")),
        ("causal-lm", {}, (False, None, "loss")),
        ("causal-lm", {"exact_norm": "yes", "exact_rank": "0", "measurement": "margin"}, (True, 0, "margin")),
        ("torch", {"exact_norm": False, "exact_rank": 12, "measurement": "loss"}, (False, 12, "loss")),
    ],
)
def test_a_language_model_has_defaults_of_its_own_which_give_way(tmp_path, kind, asked, expected):
    (tmp_path / "curator.toml").write_text(f'[workload]\nkind = "{kind}"\n', encoding="utf-8")
    flags = {f"{'gradients' if name == 'exact_norm' else 'scores'}.{name}": value for name, value in asked.items()}
    spec = recipes.spec(settings.load(tmp_path, environ={}, flags=flags))["gradients"]
    assert tuple(spec[name] for name in ("exact_norm", "exact_rank", "measurement")) == expected


def test_how_exact_scores_are_taken_is_nothing_to_a_recipe_without_them():
    without = replace(PLAIN, gradients=replace(PLAIN.gradients, exact=False))
    other = Scores(exact_curvature="ekfac", exact_rank=4, exact_sketch=8)
    assert recipes.spec(without) == recipes.spec(replace(without, scores=other))


@pytest.mark.parametrize("value", ["some", "-1", 1.5, True])
def test_a_rank_is_a_number_or_auto(tmp_path, value):
    (tmp_path / "curator.toml").write_text("", encoding="utf-8")
    with pytest.raises(BadSetting, match="exact_rank"):
        settings.load(tmp_path, environ={}, flags={"scores.exact_rank": value})


@pytest.mark.parametrize(
    ("key", "said"),
    [("gradients.exact_norm", "not true or false or 'auto'"), ("scores.exact_rank", "not a whole number or 'auto'")],
)
def test_what_may_be_a_word_too_says_which(tmp_path, key, said):
    (tmp_path / "curator.toml").write_text("", encoding="utf-8")
    with pytest.raises(BadSetting, match=said):
        settings.load(tmp_path, environ={}, flags={key: "sometimes"})


def test_settings_offer_what_the_engine_knows() -> None:
    hints = get_type_hints(Gradients)
    assert set(get_args(hints["code"])) == set(CODE_KINDS)
    assert set(get_args(hints["mask"])) == set(MASK_KINDS)
    assert set(get_args(get_type_hints(Scores)["exact_curvature"])) == {"kfac", "ekfac"}
    assert set(get_args(get_type_hints(Scores)["curvature"])) < set(CURVATURE_KINDS), "the others are controls"

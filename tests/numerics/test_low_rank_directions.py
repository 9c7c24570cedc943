"""Exact directions of low rank: the naive projection, within the error they state, and exact where nothing is cut."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curator.errors import DirectionsOutdated
from curator.influence import exact, naive
from curator.influence.attribution import Attributor, RecipeSpec
from curator.influence.exact import ExactDirections, ExactScores, LowRankDirections, directions_of
from curator.influence.kronecker import KroneckerRoots
from tests.numerics.small_models import case


def fitted(kind, seed=0, **changes):
    c = case(kind)
    trusted = [c.batch(4, 2, seed), c.batch(3, 2, seed + 1), c.batch(5, 2, seed + 2)]
    a = Attributor.fit(c.model, c.losses, trusted, RecipeSpec(dimension=24, **changes))
    return c, a, {f"s{n}": [batch] for n, batch in enumerate(trusted)}


@settings(max_examples=10, deadline=None)
@given(
    kind=st.sampled_from(["rows", "positions"]),
    curvature=st.sampled_from(["kfac", "ekfac"]),
    rank=st.integers(1, 4),
    count=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_scores_of_low_rank_stay_within_the_error_that_is_stated(kind, curvature, rank, count, seed):
    c, a, slices = fitted(kind, seed, exact_curvature=curvature)
    arrived, whole = c.batch(count, 2, seed + 500), a.whitened_directions(slices)
    cut = LowRankDirections.fit(whole, a.fitted.roots, rank)
    exact, approximate = (
        a.measure(arrived, whole.pulled_back(a.fitted.roots)),
        a.measure(arrived, directions_of(cut.names, cut.tensors())),
    )
    length = ExactScores(a.fitted.roots)
    a._pass(arrived, length)
    slack = 1e-5 * (1 + float(cut.mean_error_S.max()))
    off = (approximate.exact_BS - exact.exact_BS).abs()
    assert (off <= cut.unit_error_S + slack).all()
    off = (approximate.exact_influence_BS - exact.exact_influence_BS).abs()
    assert (off <= (cut.mean_error_S + slack) * length.norm_B()[:, None] + 1e-5).all()


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
@pytest.mark.parametrize("widest", [0, 1024])
def test_the_cut_is_the_projection_onto_the_leading_rows_and_columns(monkeypatch, curvature, widest):
    """By a Gram matrix, or by passes: which are exact as long as the width is within the rank and its surplus."""
    monkeypatch.setattr("curator.influence.exact.WIDEST_GRAM", widest)
    monkeypatch.setattr("curator.influence.exact._pays", lambda _shape, _rank: True)
    _, a, slices = fitted("positions", exact_curvature=curvature)
    whole, roots = a.whitened_directions(slices), a.fitted.roots
    cut, corrections = LowRankDirections.fit(whole, roots, 2), roots.corrections
    U = [
        {
            n: u[kind, s].double().numpy() * (corrections[n].double().numpy() if corrections else 1)
            for n, u in whole.both_2SOI.items()
        }
        for kind in range(2)
        for s in range(3)
    ]
    expected = naive.low_rank(U, 2)
    for m, (before, after) in enumerate(zip(U, expected, strict=True)):
        for n in before:
            found = cut.left_OR[n].double() @ cut.core[n][m].double() @ cut.right_IR[n].double().T
            back = roots.outputs[n].double() @ torch.from_numpy(after[n]) @ roots.inputs[n].double().T
            np.testing.assert_allclose(found, back, atol=1e-5 * float(back.norm()))
        lost = naive.norm({n: after[n] - before[n] for n in before})
        errors = [*cut.unit_error_S.tolist(), *cut.mean_error_S.tolist()]
        assert errors[m] == pytest.approx(lost, rel=1e-6)


@pytest.mark.parametrize("pays", [False, True])
def test_a_rank_that_cuts_nothing_loses_nothing(monkeypatch, pays):
    """Nor does it do anything, unless it is told to."""
    c, a, slices = fitted("rows", exact_rank=99)
    if pays:
        monkeypatch.setattr("curator.influence.exact._pays", lambda _shape, _rank: True)
    cut = a.exact_directions(slices)
    assert isinstance(cut, LowRankDirections)
    assert set(cut.core) == ({"first", "second"} if pays else set())
    assert float(cut.unit_error_S.max()) < 1e-9
    whole = Attributor(c.model, c.losses, RecipeSpec(dimension=24), a.fitted).exact_directions(slices)
    arrived = c.batch(4, 1, 9)
    np.testing.assert_allclose(a.measure(arrived, cut).exact_BS, a.measure(arrived, whole).exact_BS, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "rank", "pays"),
    [((2048, 2048), 64, True), ((768, 768), 64, True), ((8, 2048), 64, False), ((2048, 16), 64, False)],
)
def test_a_layer_is_cut_where_that_takes_fewer_products(shape, rank, pays):
    """Not an adapter's matrices."""
    assert exact._pays(shape, rank) == pays


@pytest.mark.parametrize(
    ("together", "each", "kind"),
    [(10**6, 10**6, ExactDirections), (100, 10**6, LowRankDirections), (10**6, 100, LowRankDirections)],
)
def test_without_a_rank_directions_are_whole_unless_they_would_be_too_large(monkeypatch, together, each, kind):
    monkeypatch.setattr("curator.influence.exact.LARGEST_WHOLE_DIRECTIONS", together)
    monkeypatch.setattr("curator.influence.exact.LARGEST_WHOLE_LAYER", each)
    monkeypatch.setattr("curator.influence.exact.AUTO_RANK", 1)
    _, a, slices = fitted("positions", exact_rank=None)
    found = a.exact_directions(slices)
    assert isinstance(found, kind)
    assert kind is ExactDirections or found.core
    assert RecipeSpec.from_dict(a.spec.to_dict()) == a.spec


def test_a_contrast_is_cut_after_it_was_mixed():
    c, a, slices = fitted("positions")
    contrast, arrived = {"one": {"s0": 1.0, "s1": -1.0}}, c.batch(4, 2, 9)
    low = Attributor(c.model, c.losses, replace(a.spec, exact_rank=1), a.fitted)
    cut, whole = low.exact_directions(slices, contrast), a.exact_directions(slices, contrast)
    assert cut.core
    off = (low.measure(arrived, cut).exact_BS - a.measure(arrived, whole).exact_BS).abs()
    assert 1e-4 < float(off.max()) <= float(cut.unit_error_S)


@pytest.mark.parametrize("rank", [0, 1])
def test_without_memory_on_the_device_directions_are_made_on_the_cpu(monkeypatch, rank):
    _, a, slices = fitted("positions", exact_rank=rank)
    expected, made = a.exact_directions(slices), []
    pull_back = KroneckerRoots.pull_back_input

    def full(roots, name, x):
        made.append(roots)
        if roots is a.fitted.roots:
            raise torch.OutOfMemoryError
        return pull_back(roots, name, x)

    monkeypatch.setattr(KroneckerRoots, "pull_back_input", full)
    torch.testing.assert_close(a.exact_directions(slices).tensors(), expected.tensors())
    assert made[0] is a.fitted.roots


def test_a_cut_keeps_less_and_a_higher_rank_loses_less(monkeypatch):
    monkeypatch.setattr("curator.influence.exact._pays", lambda _shape, _rank: True)
    _, a, slices = fitted("positions")
    whole = a.whitened_directions(slices)
    cuts = [LowRankDirections.fit(whole, a.fitted.roots, rank) for rank in (1, 2, 3, 4)]
    numbers = [
        sum(t.numel() for t in found.tensors().values()) for found in (cuts[0], whole.pulled_back(a.fitted.roots))
    ]
    assert numbers[0] < numbers[1]
    errors = [float(cut.unit_error_S.square().sum()) for cut in cuts]
    assert errors == sorted(errors, reverse=True)


def test_a_wide_side_is_cut_by_passes_to_what_its_directions_span():
    """Forty wide, nine directions of three rows: 27 of them matter, and fewer are cut as well as a Gram matrix does."""
    g = torch.Generator().manual_seed(4)
    rows = [torch.randn(3, 40, generator=g, dtype=torch.float64) * 0.6**n for n in range(9)]
    for rank in (5, 27):
        by_passes, by_gram = (leading(rows, rank, widest) for widest in (0, 1024))
        torch.testing.assert_close(by_passes @ by_passes.T, by_gram @ by_gram.T, atol=1e-6, rtol=0)


def leading(rows, rank, widest):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "WIDEST_GRAM", widest)
        return exact._leading(rows, rank)


def test_directions_of_an_earlier_release_are_refused():
    """They meant something else under the same name: an arrival was whitened before it met them."""
    _, a, slices = fitted("rows")
    now = a.whitened_directions(slices).pulled_back(a.fitted.roots).tensors()
    for former in ({n.replace("preconditioned", "both"): t for n, t in now.items()}, {"left/l": torch.zeros(2, 1)}):
        with pytest.raises(DirectionsOutdated, match="an earlier release"):
            directions_of(["s0", "s1", "s2"], former)

"""Scores split by layer and by position: each part is what its own gradient gives, and the parts add up."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curator.influence import naive, parts, scoring
from curator.influence.attribution import Attributor, RecipeSpec
from tests.numerics.small_models import case, one

kinds = st.sampled_from(["rows", "positions"])
CODES = [{}, {"code": "pca", "code_dimension": 5}, {"code": "sjlt", "code_dimension": 6}]


def fitted(kind, trusted_seed=0, **changes):
    c = case(kind)
    trusted = c.batch(7, 2, trusted_seed)
    spec = RecipeSpec(**{"dimension": 24, "measurement": "loss", **changes})
    return c, trusted, Attributor.fit(c.model, c.losses, [trusted], spec)


def gradients(c, batch, layers):
    return [naive.gradients(lambda b=b: c.losses(c.model, one(batch, b)), layers) for b in range(len(batch[0]))]


@settings(max_examples=8, deadline=None)
@given(kind=kinds, mask=st.sampled_from(["neuron", "coordinate"]), count=st.integers(0, 3), seed=st.integers(0, 99))
def test_each_layers_part_equals_its_own_solve_from_a_pass_and_from_what_is_stored(kind, mask, count, seed):
    c, trusted, a = fitted(kind, mask=mask, exact=False)
    arrived = c.batch(count, 2, seed + 1000)
    V, Z = a.measure(trusted), a.measure(arrived)
    towards = a.directions({"all": [V], "last": [a.measure((trusted[0][4:], trusted[1][4:]))]})
    columns = parts.columns_of({n: t.numpy() for n, t in a.state().items()})
    by_pass = a.by_layer(arrived, towards)
    stored = parts.of_stored(Z.unit_BK, Z.whitened_norm_B, towards.unit_SK, towards.whitened_SK, columns)

    kept = [
        [{n: naive.kept(G[n], m) for n, m in a.fitted.masks.items()} for G in gradients(c, batch, a.layers)]
        for batch in (trusted, arrived)
    ]
    F = {n: naive.damped(naive.fisher([g[n] for g in kept[0]], angular=True), 0.1) for n in a.fitted.masks}
    for b, mine in enumerate(kept[1]):
        size = np.sqrt(naive.product(mine, mine, F) * max(naive.product(x, x, F) for x in kept[0]))
        for s, members in enumerate((kept[0], kept[0][4:])):
            influence, normalised = naive.by_layer(mine, members, F)
            for found in (by_pass, stored):
                for n in F:
                    assert found.influence[n][b, s] == pytest.approx(influence[n], abs=1e-5 * size)
                    assert found.normalised[n][b, s] == pytest.approx(normalised[n], abs=5e-6)
        for found in (by_pass, stored):
            own = {n: naive.product({n: mine[n]}, {n: mine[n]}, {n: F[n]}) for n in F}
            assert {n: v[b] for n, v in found.self_influence.items()} == pytest.approx(own, rel=1e-4)


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.get("code", "none"))
def test_the_parts_add_up_to_the_whole_under_every_code(code):
    c, trusted, a = fitted("positions", **code)
    arrived = c.batch(4, 2, 5)
    Z, towards = a.measure(arrived), a.directions({"all": [a.measure(trusted)]})
    whole, found = scoring.score(Z.unit_BK, Z.whitened_norm_B, towards), a.by_layer(arrived, towards)
    for part, sum_ in (
        (found.normalised, whole.normalised_BS),
        (found.influence, whole.influence_BS),
        (found.self_influence, whole.self_influence_B),
    ):
        assert list(part) == list(a.fitted.masks)
        np.testing.assert_allclose(sum(part.values()), sum_, rtol=1e-4, atol=1e-5 * float(sum_.abs().max()))
    assert bool(parts.columns_of(a.state())) == (not code)


@settings(max_examples=8, deadline=None)
@given(
    kind=kinds,
    curvature=st.sampled_from(["kfac", "ekfac"]),
    count=st.integers(0, 3),
    positions=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_each_positions_part_equals_its_own_solve(kind, curvature, count, positions, seed):
    c, trusted, a = fitted(kind, exact_curvature=curvature)
    arrived = c.batch(count, positions, seed + 1000)
    towards = a.exact_directions({"all": [trusted], "last": [(trusted[0][4:], trusted[1][4:])]})
    found, Z = a.by_position(arrived, towards), a.measure(arrived, towards)
    np.testing.assert_allclose(sum(p.sum(axis=1) for p in found.normalised.values()), Z.exact_BS, atol=1e-5)

    v = gradients(c, trusted, a.layers)
    F = {layer.name: explicit(c, trusted, v, layer, a) for layer in a.layers}
    for b in range(count):
        terms = {n: naive.factors(lambda b=b: c.losses(c.model, one(arrived, b)), n) for n in a.layers}
        mine = {layer.name: d.T @ x for layer, (x, d) in terms.items()}
        size = np.sqrt(naive.product(mine, mine, F) * max(naive.product(x, x, F) for x in v))
        for s, members in enumerate((v, v[4:])):
            influence, normalised = naive.by_layer(mine, members, F)
            for layer, (x, d) in terms.items():
                n = layer.name
                assert found.influence[n][b, :, s].sum() == pytest.approx(influence[n], abs=1e-4 * size)
                assert found.normalised[n][b, :, s].sum() == pytest.approx(normalised[n], abs=1e-4)
                expected = naive.by_position(x, d, [G[n] for G in members], F[n])
                terms_T = found.influence[n][b, :, s]
                # Calls of a reused layer arrive in the order of the backward pass.
                np.testing.assert_allclose(sorted(terms_T[terms_T != 0]), sorted(expected), atol=1e-4 * size)


def explicit(c, trusted, v, layer, a):
    pairs = [naive.factors(lambda b=b: c.losses(c.model, one(trusted, b)), layer) for b in range(7)]
    if a.spec.exact_curvature == "kfac":
        return naive.kronecker(pairs, a.spec.damping, angular=True)
    return naive.corrected_kronecker(pairs, [G[layer.name] for G in v], a.spec.damping, angular=True)


def test_positions_are_added_over_the_layers_that_see_as_many():
    c, trusted, a = fitted("positions")
    towards = a.exact_directions({"all": [trusted]})
    found = a.by_position(c.batch(3, 4, 1), towards)
    assert {n: p.shape[1] for n, p in found.influence.items()} == {"into": 4, "again": 8, "flipped": 4, "out": 4}
    expected = sum(found.influence[n] for n in ("into", "flipped", "out"))
    np.testing.assert_allclose(found.over_layers(4).influence[""], expected)
    assert found.over_layers(5).normalised == {}


def test_an_example_without_a_score_has_parts_of_zero_and_its_neighbours_keep_theirs():
    c, trusted, a = fitted("positions")
    arrived = c.batch(3, 2, 1)
    towards, exact = a.directions({"all": [a.measure(trusted)]}), a.exact_directions({"all": [trusted]})

    def everything():
        by_layer, by_position = a.by_layer(arrived, towards), a.by_position(arrived, exact)
        return [by_layer.influence, by_layer.self_influence, by_position.influence, by_position.normalised]

    clean = everything()
    arrived[0][1] = torch.inf
    for spoilt, before in zip(everything(), clean, strict=True):
        for name, part in spoilt.items():
            assert np.isfinite(part).all()
            assert not part[1].any()
            np.testing.assert_allclose(part[[0, 2]], before[name][[0, 2]], atol=1e-6 * np.abs(before[name]).max())

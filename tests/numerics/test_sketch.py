"""|W| from a sketch: its draw, unbiased within the variance that is stated, exact where nothing is saved."""

import hashlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from curator.influence.attribution import Attributor, RecipeSpec
from curator.influence.exact import ExactScores
from curator.influence.kronecker import KroneckerRoots
from curator.influence.sketch import sketched
from tests.numerics.small_models import case

LAYER = SimpleNamespace(name="l")
N_OUT, N_IN, P = 24, 32, 4


def matrices(*shapes):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes]


def roots(is_wide=False, corrections=None, positions=5.0):
    A, S = matrices((N_IN, N_IN), (N_OUT, N_OUT))
    A = A + A.T
    inputs = {"l": A.diagonal() if is_wide else A}
    return KroneckerRoots(inputs, {"l": S + S.T}, corrections or {}, {"l": positions})


@pytest.mark.parametrize("is_wide", [False, True])
def test_it_is_the_length_of_random_products_of_the_whitened_gradient(is_wide):
    found, (a, d) = sketched(roots(is_wide), P, 7), matrices((3, 5, N_IN), (3, 5, N_OUT))

    def signs(width, side):
        key = int.from_bytes(hashlib.sha256(f"7/l/{width}/{P}/sketch {side}".encode()).digest()[:16], "little")
        raw = np.random.Philox(key=key, counter=0).random_raw(width * P)
        return torch.from_numpy(np.where(raw % 2, 1.0, -1.0).reshape(width, P))

    r = roots(is_wide)
    A = r.inputs["l"].diag() if is_wide else r.inputs["l"]
    W = r.outputs["l"].T @ d.transpose(1, 2) @ a @ A
    expected = (signs(N_OUT, "out").T @ W @ signs(N_IN, "in") / P).square().sum(dim=(1, 2))
    torch.testing.assert_close(found.square_B(LAYER, a, d), expected)


@pytest.mark.parametrize("rank", [1, 6])
def test_it_is_unbiased_and_varies_as_stated(rank):
    """Over 2,000 draws; a gradient of rank one comes near the bound, one of more is below it."""
    a, d = matrices((1, rank, N_IN), (1, rank, N_OUT))
    r = roots()
    exact = float(r.square_B(LAYER, a, d))
    drawn = np.array([float(sketched(r, P, seed).square_B(LAYER, a, d)) for seed in range(2000)]) / exact
    bound = (1 + 2 / P) ** 2 - 1
    assert abs(drawn.mean() - 1) < 4 * np.sqrt(bound / 2000)
    assert drawn.var() < bound * 1.15
    assert (drawn.var() > bound / 2) == (rank == 1)


@pytest.mark.parametrize("size", [P, 13])
def test_a_narrow_side_is_left_whole(size):
    """Twice the sketch, or wider: both are sketched at 4, the wider alone at 13, none at 17."""
    r, found = roots(), sketched(roots(), size, 0)
    assert found.inputs["l"].shape == (N_IN, size)
    assert found.outputs["l"].shape == ((N_OUT, size) if size == P else (N_OUT, N_OUT))
    whole = sketched(r, 17, 0)
    assert torch.equal(whole.inputs["l"], r.inputs["l"])


@pytest.mark.parametrize("size", [P, 13])
def test_one_side_varies_less(size):
    a, d = matrices((1, 1, N_IN), (1, 1, N_OUT))
    exact = float(roots().square_B(LAYER, a, d))
    drawn = np.array([float(sketched(roots(), size, seed).square_B(LAYER, a, d)) for seed in range(2000)]) / exact
    bound = (1 + 2 / P) ** 2 - 1 if size == P else 2 / size
    assert abs(drawn.mean() - 1) < 4 * np.sqrt(bound / 2000)
    assert bound / 2 < drawn.var() < bound * 1.15


@pytest.mark.parametrize(
    "whole", [{"corrections": {"l": torch.ones(N_OUT, N_IN, dtype=torch.float64)}}, {"positions": 1.0}]
)
def test_corrected_eigenvalues_and_layers_of_one_position_have_no_sketch(whole):
    r = roots(**whole)
    assert sketched(r, P, 0) == r


@pytest.mark.parametrize(("kind", "most"), [("rows", 1.0), ("positions", 2.0)])
def test_how_many_positions_an_example_has_is_part_of_the_recipe(kind, most):
    c = case(kind)
    a = Attributor.fit(c.model, c.losses, [c.batch(6, 2, 1)], RecipeSpec(dimension=24))
    back = Attributor.from_state(c.model, c.losses, a.spec, a.state())
    assert back.fitted.roots.positions == a.fitted.roots.positions
    assert back.fitted.roots.positions["out" if kind == "positions" else "second"] == most


@pytest.mark.parametrize("size", [0, 2])
def test_what_is_measured_reads_its_lengths_off_the_sketch_of_its_recipe_and_of_no_batch(size):
    """And its directions are of whole lengths, whatever the sketch."""
    c = case("positions")
    a = Attributor.fit(c.model, c.losses, [c.batch(6, 3, 1)], RecipeSpec(dimension=24, exact_sketch=size))
    towards, arrived, length = a.exact_directions({"s": [c.batch(6, 3, 2)]}), c.batch(4, 3, 3), 1
    arrived[1][:, length:] = -1  # padding, but of the first position
    lengths = ExactScores(sketched(a.fitted.roots, size, 0) if size else a.fitted.roots, towards)
    a._pass(arrived, lengths)
    found = a.measure(arrived, towards).exact_BS
    torch.testing.assert_close(found, lengths.normalised_BS().float())
    alone = [a.measure((arrived[0][b : b + 1, :length], arrived[1][b : b + 1, :length]), towards) for b in range(4)]
    torch.testing.assert_close(torch.cat([m.exact_BS for m in alone]), found)
    plain = Attributor(c.model, c.losses, replace(a.spec, exact_sketch=0), a.fitted)
    torch.testing.assert_close(plain.exact_directions({"s": [c.batch(6, 3, 2)]}).both_2SOI, towards.both_2SOI)
    whole = plain.measure(arrived, towards).exact_BS
    assert torch.allclose(a.measure(arrived, towards).exact_BS, whole) == (size == 0)

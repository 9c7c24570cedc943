"""|W| from a sketch: its draw, unbiased within the variance that is stated, exact where nothing is saved."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from curator.influence.kronecker import KroneckerRoots
from curator.influence.sketch import KroneckerSketch

LAYER = SimpleNamespace(name="l")
N_OUT, N_IN, P = 24, 32, 4


def matrices(*shapes):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes]


def roots(is_wide=False, corrections=None):
    A, S = matrices((N_IN, N_IN), (N_OUT, N_OUT))
    A = A + A.T
    return KroneckerRoots({"l": A.diagonal() if is_wide else A}, {"l": S + S.T}, corrections or {})


@pytest.mark.parametrize("is_wide", [False, True])
def test_it_is_the_length_of_random_products_of_the_whitened_gradient(is_wide):
    found, (a, d) = KroneckerSketch.draw(roots(is_wide), P, 7), matrices((3, 5, N_IN), (3, 5, N_OUT))

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
    a, d = (torch.cat([x, torch.zeros(1, 1, x.shape[2])], dim=1).double() for x in (a, d))  # two positions at least
    r = roots()
    exact = float(r.square_B(LAYER, a, d))
    drawn = np.array([float(KroneckerSketch.draw(r, P, seed).square_B(LAYER, a, d)) for seed in range(2000)]) / exact
    bound = (1 + 2 / P) ** 2 - 1
    assert abs(drawn.mean() - 1) < 4 * np.sqrt(bound / 2000)
    assert drawn.var() < bound * 1.15
    assert (drawn.var() > bound / 2) == (rank == 1)


@pytest.mark.parametrize(
    "changes", [{"size": 7}, {"corrections": {"l": torch.ones(N_OUT, N_IN, dtype=torch.float64)}}, {"positions": 1}]
)
def test_it_is_exact_where_nothing_is_saved(changes):
    """Layers not much wider than the sketch, corrected eigenvalues, one position."""
    changes = {"size": P, "corrections": {}, "positions": 5} | changes
    r, (a, d) = roots(corrections=changes["corrections"]), matrices((3, 5, N_IN), (3, 5, N_OUT))
    a, d = a[:, : changes["positions"]], d[:, : changes["positions"]]
    found = KroneckerSketch.draw(r, changes["size"], 0)
    assert torch.equal(found.square_B(LAYER, a, d), r.square_B(LAYER, a, d))

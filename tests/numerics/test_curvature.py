"""Curvature: sums that add up, roots that whiten, damping that follows the scale."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curator.errors import NoCurvature, UnknownCurvature
from curator.influence import naive
from curator.influence.curvature import (
    CURVATURE_KINDS,
    FisherSums,
    LowRankRoot,
    adam_whitening,
    inverse_root,
    principal,
)
from curator.influence.dropout import draw
from curator.influence.ghost import ghost_scores
from curator.influence.kronecker import KroneckerRoots, KroneckerSums, cheapest

SLICES = {"a": slice(0, 3), "b": slice(3, 7)}


def rows(n, seed=0):
    return torch.randn(n, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sums(g_BK, kind="angular"):
    found = FisherSums(SLICES, kind)
    found.add(g_BK)
    return found


@pytest.mark.parametrize("angular", [True, False])
def test_blocks_equal_the_mean_of_outer_products(angular):
    g = rows(9)
    found = sums(g, "angular" if angular else "fisher")
    for name, columns in SLICES.items():
        expected = naive.fisher(list(g[:, columns].numpy()), angular)
        np.testing.assert_allclose(found.blocks[name].numpy() / found.count, expected, atol=1e-12)


@settings(deadline=None)
@given(cut=st.integers(0, 12), kind=st.sampled_from(CURVATURE_KINDS))
def test_parts_merge_to_the_whole_in_any_split(cut, kind):
    g = rows(12)
    whole = sums(g, kind)
    merged = sums(g[:cut], kind).merge(sums(g[cut:], kind))
    assert merged.count == whole.count
    for name, block in whole.blocks.items():
        torch.testing.assert_close(merged.blocks[name], block)


def test_sums_survive_the_way_through_named_tensors():
    whole = sums(rows(12))
    back = FisherSums.of(SLICES, "angular", whole.tensors())
    assert back.count == 12
    assert all(torch.equal(back.blocks[n], whole.blocks[n]) for n in SLICES)


def test_rows_that_are_not_finite_are_left_out():
    g = rows(5)
    spoilt = torch.cat([g, torch.full((1, 7), torch.nan, dtype=torch.float64)])
    assert sums(spoilt).count == 5
    torch.testing.assert_close(sums(spoilt).blocks["a"], sums(g).blocks["a"])


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_whitening_squares_to_the_damped_inverse(damping):
    F = sums(rows(20), "fisher").blocks["b"]
    W = inverse_root(F, damping).numpy()
    np.testing.assert_allclose(W @ naive.damped(F.numpy(), damping) @ W, np.eye(4), atol=1e-9)


def test_units_of_the_loss_change_no_whitened_direction():
    g = rows(10)
    one = sums(g, "fisher").whitening(0.1).apply(g.float())
    million = sums(g * 1e6, "fisher").whitening(0.1).apply(g.float() * 1e6)
    torch.testing.assert_close(one, million, rtol=1e-5, atol=1e-6)


def test_angular_curvature_does_not_see_how_loud_an_example_is():
    g = rows(10)
    louder = g * torch.logspace(-6, 6, 10, dtype=torch.float64)[:, None]
    torch.testing.assert_close(sums(louder).blocks["a"], sums(g).blocks["a"])


def test_a_layer_without_gradient_stays_out_of_every_score():
    g = rows(6)
    g[:, SLICES["a"]] = 0
    whitened = sums(g).whitening(0.1).apply(torch.ones(2, 7))
    assert whitened[:, SLICES["a"]].abs().max() == 0
    assert whitened[:, SLICES["b"]].isfinite().all()


def test_without_damping_an_unused_direction_gets_no_weight():
    F = torch.diag(torch.tensor([4.0, 0.0]))
    assert inverse_root(F, 0.0).tolist() == [[0.5, 0.0], [0.0, 0.0]]


def test_controls_are_a_diagonal_and_the_identity():
    g = rows(6)
    np.testing.assert_allclose(sums(g, "identity").whitening(0.1).apply(g.float()), g.float())
    F = g.square().mean(dim=0)[SLICES["a"]]
    expected = g[:, SLICES["a"]] / (F + 0.1 * F.mean()).sqrt()
    diagonal = sums(g, "diagonal").whitening(0.1).apply(g.float())
    np.testing.assert_allclose(diagonal[:, SLICES["a"]], expected, rtol=1e-5)


def test_nothing_to_fit_and_unknown_kinds_are_refused():
    with pytest.raises(NoCurvature):
        sums(rows(0)).whitening(0.1)
    with pytest.raises(UnknownCurvature, match="angular, fisher, diagonal, identity"):
        sums(rows(1), "hessian")


class _Named:
    name = "l"


@settings(deadline=None)
@given(cut=st.integers(0, 6), angular=st.booleans())
def test_kronecker_parts_merge_to_the_whole(cut, angular):
    g = torch.Generator().manual_seed(1)
    a, d = torch.randn(6, 2, 3, generator=g), torch.randn(6, 2, 4, generator=g)

    def part(rows):
        found = KroneckerSums(angular)
        found(_Named, a[rows], d[rows])
        return found

    merged, whole = part(slice(0, cut)).merge(part(slice(cut, 6))), part(slice(0, 6))
    assert (merged.examples, merged.positions) == ({"l": 6}, {"l": 12})
    torch.testing.assert_close(merged.inputs["l"], whole.inputs["l"])
    torch.testing.assert_close(merged.outputs["l"], whole.outputs["l"])


def test_padding_changes_no_kronecker_sum():
    """A padded position has inputs like any other; only its gradient is nothing."""
    g = torch.Generator().manual_seed(5)
    a, d = torch.randn(3, 5, 4, generator=g), torch.randn(3, 5, 2, generator=g)
    lengths = (5, 2, 3)
    for b, length in enumerate(lengths):
        d[b, length:] = 0
    padded, alone = KroneckerSums(), KroneckerSums()
    padded(_Named, a, d)
    for b, length in enumerate(lengths):
        alone(_Named, a[b : b + 1, :length], d[b : b + 1, :length])
    assert padded.positions == alone.positions == {"l": sum(lengths)}
    torch.testing.assert_close(padded.inputs["l"], alone.inputs["l"])
    torch.testing.assert_close(padded.outputs["l"], alone.outputs["l"])


def test_kronecker_roots_equal_the_explicit_kronecker_matrix():
    g = torch.Generator().manual_seed(2)
    a, d = (torch.randn(6, 2, n, generator=g, dtype=torch.float64) for n in (3, 4))
    found = KroneckerSums()
    found(_Named, a, d)
    roots = KroneckerRoots.of(found.factors(0.1).tensors())
    M = naive.kronecker([(a[b].numpy(), d[b].numpy()) for b in range(6)], 0.1, angular=True)
    W = np.kron(roots.outputs["l"].numpy(), roots.inputs["l"].numpy())
    np.testing.assert_allclose(W @ M @ W, np.eye(12), atol=1e-5)


@pytest.mark.parametrize("most", [1, 40, 1 << 22])
@pytest.mark.parametrize("is_corrected", [False, True])
@pytest.mark.parametrize("is_wide", [False, True])
@pytest.mark.parametrize("positions", [1, 5])
def test_directions_are_pulled_back_to_gradients_that_are_not_whitened(
    monkeypatch, positions, is_wide, is_corrected, most
):
    """And |W|^2 and |G|^2 beside them; a wide side is known by its diagonal."""
    monkeypatch.setattr("curator.influence.ghost.LARGEST_STRIPE", most)
    g = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    a, d, A, S, R, U = (randn(*x) for x in ((5, positions, 4), (5, positions, 3), (4, 4), (3, 3), (3, 4), (2, 3, 4)))
    S = S.diagonal() if is_wide else S
    roots = KroneckerRoots({"l": A}, {"l": S}, {"l": R} if is_corrected else {})
    G = d.transpose(1, 2) @ a
    W = (S.diag() if is_wide else S).T @ G @ A * (R if is_corrected else 1)
    products, square = ghost_scores(a, d, roots.pull_back("l", U))
    torch.testing.assert_close(products, torch.einsum("boi,soi->bs", W, U))
    torch.testing.assert_close(square, G.square().sum(dim=(1, 2)))
    torch.testing.assert_close(roots.square_B(_Named, a, d), W.square().sum(dim=(1, 2)))
    torch.testing.assert_close(roots.whitened("l", G), W)


@pytest.mark.parametrize(
    ("shapes", "positions", "late"),
    [
        (((4, 4), (3, 3)), 1, (False, False)),
        (((9, 9), (2, 2)), 5, (True, False)),  # an adapter's first matrix: O is small
        (((2, 2), (9, 9)), 5, (False, True)),  # its second
        (((4, 4), (3, 3)), 50, (True, True)),  # a convolution: more positions than either side is wide
        (((9, 3), (8, 2)), 2, (False, False)),  # a sketch of both sides
        (((9,), (2, 2)), 50, (True, True)),  # a diagonal
    ],
)
@pytest.mark.parametrize("is_corrected", [False, True])
@pytest.mark.parametrize("count", [0, 5])
def test_a_side_is_whitened_where_that_takes_less_and_the_length_is_the_same(
    monkeypatch, shapes, positions, late, is_corrected, count
):
    g = torch.Generator().manual_seed(6)
    A, S = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    a, d = (torch.randn(count, positions, len(M), generator=g, dtype=torch.float64) for M in (A, S))
    R = {"l": torch.randn(S.shape[-1], A.shape[-1], generator=g, dtype=torch.float64)} if is_corrected else {}
    roots = KroneckerRoots({"l": A}, {"l": S}, R)
    W = S.T @ d.transpose(1, 2) @ a @ (A.diag() if A.ndim == 1 else A)
    expected = (W * R["l"] if R else W).square().sum(dim=(1, 2))
    assert cheapest(positions, A, S) == late
    monkeypatch.setattr("curator.influence.kronecker.LARGEST_STRIPE", 40)
    torch.testing.assert_close(roots.square_B(_Named, a, d), expected)
    monkeypatch.setattr("curator.influence.kronecker.LARGEST_WHOLE", 1)
    assert cheapest(positions, A, S) == (False, False)
    torch.testing.assert_close(roots.square_B(_Named, a, d), expected)


def test_a_wide_factor_keeps_its_diagonal(monkeypatch):
    monkeypatch.setattr("curator.influence.kronecker.WIDEST_FACTOR", 2)
    found = KroneckerSums()
    found(_Named, torch.randn(4, 1, 3), torch.randn(4, 1, 2))
    roots = found.factors(0.1)
    assert (roots.inputs["l"].shape, roots.outputs["l"].shape) == ((3,), (2, 2))
    a, d = roots.whiten(_Named, torch.ones(1, 1, 3), torch.ones(1, 1, 2))
    assert (a.shape, d.shape) == ((1, 1, 3), (1, 1, 2))


# --- wide blocks ----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(cut=st.integers(0, 5), damping=st.sampled_from([0.01, 0.1, 1.0]))
def test_a_low_rank_root_equals_the_dense_one_where_the_sample_has_low_rank(cut, damping):
    g = torch.randn(5, 30, generator=torch.Generator().manual_seed(cut), dtype=torch.float64)
    root = LowRankRoot.fit(principal(lambda: [g[:cut], g[cut:]], 5), damping)
    back = LowRankRoot.of(root.tensors())
    dense = naive.inverse_root(naive.fisher(list(g.numpy()), angular=False), damping)
    x = torch.randn(4, 30, generator=torch.Generator().manual_seed(9))
    np.testing.assert_allclose(back.apply(x).numpy(), x.numpy() @ dense, rtol=0, atol=1e-4 * np.abs(dense).max())


def test_a_low_rank_root_of_nothing_is_zero():
    root = LowRankRoot.fit(principal(lambda: [torch.zeros(3, 30)], 2), 0.1)
    assert root.apply(torch.ones(1, 30)).abs().max() == 0
    with pytest.raises(NoCurvature):
        principal(lambda: [], 2)


def test_adam_s_moments_precondition_as_adam_does():
    masks = {"l": draw("coordinate", 0, "l", (3, 4), 6)}
    v = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    W = adam_whitening(SimpleNamespace(epsilon=1e-8, v_OI={"l": v}.__getitem__), masks)
    g = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    twice = W.apply(W.apply(g))
    torch.testing.assert_close(twice, g / (v[masks["l"].coordinates()].sqrt() + 1e-8))

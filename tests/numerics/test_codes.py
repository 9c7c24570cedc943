"""Codes: each equals its explicit matrix and keeps inner products."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curator.errors import CodeTooWide, NoCurvature, UnknownCompression
from curator.influence import codes, naive
from curator.influence.codes import Pca, PcaSjlt, Sjlt
from tests.benchmarks.quality_codes import FactoredGaussian, Gaussian, RankOne, Signs, normals

SEEDS = 2000


def rows(count, width, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank(count, width, rank, seed=0):
    return rows(count, rank, seed) @ rows(rank, width, seed + 1)


@settings(deadline=None)
@given(count=st.integers(0, 4), entries=st.integers(1, 30), width=st.integers(1, 12), rounds=st.integers(1, 5))
def test_sjlt_equals_its_matrix(count, entries, width, rounds):
    code = Sjlt.draw("any", entries, width, rounds)
    x = rows(count, entries)
    S = naive.sjlt(code.bucket_sK, code.sign_sK, width)
    np.testing.assert_allclose(code.encode(x).numpy(), x.numpy() @ S.T, atol=1e-12)
    # One bucket in each block: every column of S has length 1.
    np.testing.assert_allclose((S**2).sum(axis=0), 1, atol=1e-12)


GOLDEN_BUCKETS = [[0, 0, 1, 2, 3, 2], [6, 5, 4, 5, 7, 5]]
GOLDEN_SIGNS = [[-1, 1, -1, 1, 1, 1], [1, -1, 1, -1, -1, 1]]


def test_the_sjlt_stream_is_the_documented_one_on_every_machine():
    code = Sjlt.draw("0/l", 6, 8, 2)
    assert code.bucket_sK.tolist() == GOLDEN_BUCKETS
    assert code.sign_sK.tolist() == GOLDEN_SIGNS


def drawn(kind, seed, x):
    if kind == "sjlt":
        return Sjlt.draw(f"{seed}", x.shape[1], 16).encode(x)
    if kind == "gaussian":
        return Gaussian(f"{seed}", x.shape[1], 16).encode(x)
    factored = FactoredGaussian.draw(f"{seed}", (6, 5), (4, 4))
    G = x.view(-1, 6, 5)
    return torch.einsum("po,boi,qi->bpq", factored.left_PO.double(), G, factored.right_QI.double()).flatten(1)


@pytest.mark.parametrize("kind", ["sjlt", "gaussian", "logra"])
def test_random_codes_keep_inner_products_on_average(kind):
    x = rows(2, 30, 3)
    found = np.array([float(y[0] @ y[1]) for seed in range(SEEDS) if (y := drawn(kind, seed, x)) is not None])
    assert abs(found.mean() - float(x[0] @ x[1])) < 5 * found.std() / math.sqrt(SEEDS)


def test_the_variance_of_a_gaussian_code_is_what_theory_gives():
    x = rows(2, 30, 3)
    found = np.array([float(y[0] @ y[1]) for seed in range(SEEDS) if (y := drawn("gaussian", seed, x)) is not None])
    # (|g|^2 |g'|^2 + <g,g'>^2) / k. Products of normals have heavy tails: kurtosis 9 for one term, and
    # about 3 + 6/16 for a mean of 16, so five roots of 2/N (1 + .2) bound the sample variance.
    expected = float(x[0] @ x[0] * (x[1] @ x[1]) + (x[0] @ x[1]) ** 2) / 16
    assert found.var() == pytest.approx(expected, rel=6 * math.sqrt(2 / SEEDS))


@pytest.mark.parametrize("positions", [1, 3])
def test_the_factored_projection_equals_the_kronecker_matrix(positions):
    a, d = rows(2 * positions, 5, 1).view(2, positions, 5), rows(2 * positions, 6, 2).view(2, positions, 6)
    code = FactoredGaussian.draw("any", (6, 5), (2, 3))
    P = np.kron(code.left_PO.double().numpy(), code.right_QI.double().numpy())
    for b in range(2):
        dense = (d[b].T @ a[b]).numpy().ravel()
        np.testing.assert_allclose(code.keep(a, d)[b].numpy(), P @ dense, atol=1e-12)
    assert code.kept == 6


def test_normals_are_normal():
    x = normals("any", 100_001)
    assert len(x) == 100_001
    assert abs(x.mean()) < 5 / math.sqrt(len(x))
    assert x.var() == pytest.approx(1, abs=5 * math.sqrt(2 / len(x)))
    assert (x**4).mean() == pytest.approx(3, abs=5 * math.sqrt(96 / len(x)))


# --- principal components -------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(width=st.integers(1, 6), cut=st.integers(1, 11), wide=st.booleans())
def test_pca_projects_like_a_singular_value_decomposition_in_any_chunks(width, cut, wide):
    x = low_rank(12, 40, 6) if wide else rows(12, 7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codes, "WIDEST_DENSE", 20)
        code = Pca.fit(lambda: [x[:cut], x[cut:]], width)
    assert code.width == width
    P = naive.principal_projector(list(x.numpy()), width)
    projected = code.components_KC.double() @ code.components_KC.double().T
    # Float32 components, of a sample whose eigenvalues are well apart.
    np.testing.assert_allclose((x @ projected).numpy(), x.numpy() @ P, atol=2e-3 * float(x.abs().max()))


def test_pca_of_all_directions_keeps_every_inner_product():
    x = low_rank(9, 30, 4)
    y = Pca.fit(lambda: [x], 9).encode(x)
    torch.testing.assert_close(y @ y.T, x @ x.T, rtol=1e-5, atol=1e-4)


def test_pca_keeps_more_of_a_decaying_sample_than_sjlt():
    x = rows(200, 60) * torch.linspace(3, 0, 60).exp()
    error = {}
    for name, code in {"pca": Pca.fit(lambda: [x], 12), "sjlt": Sjlt.draw("s", 60, 12)}.items():
        y = code.encode(x)
        error[name] = float((y @ y.T - x @ x.T).norm() / (x @ x.T).norm())
    assert error["pca"] < error["sjlt"] / 3


def test_pca_refuses_more_numbers_than_entries_and_an_empty_sample():
    with pytest.raises(CodeTooWide, match="keeps 7"):
        Pca.fit(lambda: [rows(3, 7)], 8)
    with pytest.raises(NoCurvature):
        Pca.fit(lambda: [rows(0, 7)], 2)


def test_pca_with_a_sketch_equals_its_parts_one_example_at_a_time():
    x = rows(6, 20)
    code = PcaSjlt.fit(lambda: [x], 10)
    V, S = code.pca.components_KC.double().numpy(), code.rest.matrix_KC().double().numpy()
    expected = [np.concatenate([V.T @ w, S.T @ (w - V @ (V.T @ w))]) for w in x.numpy()]
    np.testing.assert_allclose(code.encode(x).numpy(), expected, atol=1e-6)
    np.testing.assert_allclose((x.float() @ code.matrix_KC()).numpy(), expected, atol=1e-4)


def test_pca_with_a_sketch_is_exact_on_its_sample_and_loses_no_length_outside():
    """Unlike a PCA alone, to which data outside its sample's span is a shadow of itself."""
    x, unlike = low_rank(40, 300, 4), rows(200, 300, seed=7)
    both, alone = PcaSjlt.fit(lambda: [x], 100), Pca.fit(lambda: [x], 100)
    assert both.pca.width == 4, "as many directions as the sample has; the rest is sketch"
    y = both.encode(x)
    torch.testing.assert_close(y @ y.T, x @ x.T, rtol=1e-4, atol=1e-3)
    kept = {
        name: float((code.encode(unlike).norm(dim=1) / unlike.norm(dim=1)).mean())
        for name, code in (("both", both), ("alone", alone))
    }
    assert kept["both"] == pytest.approx(1, abs=0.05)
    assert kept["alone"] < 0.7


def test_pca_with_a_sketch_keeps_inner_products_on_average():
    x, pair = low_rank(20, 60, 3), rows(2, 60, seed=5)
    products = [float(torch.prod(PcaSjlt.fit(lambda: [x], 16, seed).encode(pair), dim=0).sum()) for seed in range(400)]
    error = np.std(products) / np.sqrt(len(products))
    assert np.mean(products) == pytest.approx(float(pair[0] @ pair[1]), abs=4 * error)


def test_a_recipe_s_code_is_fitted_by_its_name():
    x = rows(9, 7)
    assert codes.fit_code("none", lambda: [x], 3, 0) is None
    assert [codes.fit_code(kind, lambda: [x], 3, 0).width for kind in ("pca", "sjlt", "pca+sjlt")] == [3, 3, 3]
    with pytest.raises(UnknownCompression, match="none, sjlt, pca"):
        codes.fit_code("zip", lambda: [x], 3, 0)
    with pytest.raises(CodeTooWide, match="keeps 7"):
        codes.fit_code("sjlt", lambda: [x], 8, 0)


# --- codes that are not linear --------------------------------------------------------------------------------


@given(count=st.integers(0, 4), width=st.integers(1, 20))
def test_signs_equal_one_number_at_a_time(count, width):
    y, code = rows(count, width).float(), Signs(width)
    bits, scale = code.pack(y)
    back = code.unpack(bits, scale)
    assert bits.shape == (count, code.bytes_per_example - 4)
    for b in range(count):
        np.testing.assert_allclose(back[b], naive.signs(y[b].numpy()), rtol=1e-5)


@settings(deadline=None)
@given(count=st.integers(0, 3), shape=st.tuples(st.integers(1, 4), st.integers(1, 5)))
def test_rank_one_is_the_nearest_matrix_of_rank_one(count, shape):
    code = RankOne((shape, (2, 3)))
    g = rows(count, shape[0] * shape[1] + 6)
    y = code.encode(g)
    assert y.shape == (count, code.width)
    back = code.decode(y)
    for b in range(count):
        expected = naive.rank_one(g[b, : shape[0] * shape[1]].view(shape).numpy())
        np.testing.assert_allclose(back[b, : shape[0] * shape[1]].view(shape).numpy(), expected, atol=1e-9)


def test_rank_one_loses_nothing_of_an_example_with_one_position():
    g = (rows(3, 4)[:, :, None] * rows(3, 5, 1)[:, None, :]).flatten(1)
    code = RankOne(((4, 5),))
    torch.testing.assert_close(code.decode(code.encode(g)), g)

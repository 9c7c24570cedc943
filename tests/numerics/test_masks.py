"""Dropout masks: specified, nested, exactly filled, unbiased, with the variance theory gives."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curator.errors import MaskTooLarge, UnknownMask
from curator.influence import naive
from curator.influence.dropout import (
    MASK_KINDS,
    LayerMask,
    budgets,
    draw,
    priority_sample,
    shuffled_prefix,
    split,
    split_by,
    stream,
)
from curator.influence.energy import EnergySums

shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))
kinds = st.sampled_from(MASK_KINDS)


def cells(mask):
    rows, columns = mask.coordinates()
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def test_the_stream_is_the_documented_one_on_every_machine():
    assert shuffled_prefix("0/layer/3x4/entries", 12, 6).tolist() == GOLDEN_PREFIX
    assert cells(draw("coordinate", 0, "encoder.0", (8, 16), 6)) == GOLDEN_COORDINATE
    assert cells(draw("neuron", 0, "encoder.0", (8, 16), 6)) == GOLDEN_NEURON


GOLDEN_PREFIX = [4, 1, 8, 0, 11, 3]
GOLDEN_COORDINATE = [(7, 14), (4, 12), (0, 13), (0, 4), (6, 8), (5, 6)]
GOLDEN_NEURON = [(6, 14), (6, 6), (4, 14), (4, 6), (6, 8), (4, 8)]


@given(n=st.integers(1, 60), data=st.data())
def test_the_sparse_shuffle_equals_the_whole_list_shuffled(n, data):
    m = data.draw(st.integers(0, n))
    name = f"any/{n}"
    import hashlib

    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    raw = np.random.Philox(key=key).random_raw(m).tolist()
    assert shuffled_prefix(name, n, m).tolist() == naive.shuffled(raw, n)


@given(shape=shapes, kind=kinds, seed=st.integers(0, 5), data=st.data())
def test_masks_are_exactly_filled_distinct_and_nested(shape, kind, seed, data):
    entries = shape[0] * shape[1]
    k = data.draw(st.integers(1, entries))
    more = data.draw(st.integers(k, entries))
    small, large = cells(draw(kind, seed, "l", shape, k)), cells(draw(kind, seed, "l", shape, more))
    assert len(set(small)) == k
    assert small == large[:k]
    assert all(0 <= o < shape[0] and 0 <= i < shape[1] for o, i in large)


def test_seed_layer_and_shape_each_change_the_mask():
    base = cells(draw("coordinate", 0, "a", (32, 32), 64))
    others = [draw("coordinate", 1, "a", (32, 32), 64), draw("coordinate", 0, "b", (32, 32), 64)]
    assert all(cells(other) != base for other in others)
    assert cells(draw("coordinate", 0, "a", (32, 33), 64)) != base


def test_a_neuron_mask_touches_about_sqrt_k_rows_and_columns():
    mask = draw("neuron", 0, "l", (64, 64), 500)
    assert (len(mask.rows), len(mask.columns)) == (23, 23)
    wide = draw("neuron", 0, "l", (4, 300), 500)
    assert (len(wide.rows), len(wide.columns)) == (4, 125)


@given(
    kind=kinds,
    shape=shapes,
    count=st.integers(0, 4),
    positions=st.integers(1, 4),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_masked_equals_dense_then_masked(kind, shape, count, positions, seed, data):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(count, positions, shape[1], generator=g, dtype=torch.float64)
    d = torch.randn(count, positions, shape[0], generator=g, dtype=torch.float64)
    mask = draw(kind, seed, "l", shape, data.draw(st.integers(1, shape[0] * shape[1])))
    kept = mask.keep(a, d).numpy()
    assert kept.shape == (count, mask.kept)
    for b in range(count):
        dense = d[b].T.numpy() @ a[b].numpy()
        np.testing.assert_allclose(kept[b], naive.kept(dense, mask), rtol=0, atol=1e-12)


# --- means and variances over the draw --------------------------------------------------------------------------

SEEDS = 4000


def inner_products(kind, shape, k, x_OI, y_OI):
    """<Px, Py> under SEEDS masks."""
    found = []
    for seed in range(SEEDS):
        rows, columns = draw(kind, seed, "l", shape, k).coordinates()
        scale = shape[0] * shape[1] / k
        found.append(float((x_OI[rows, columns] * y_OI[rows, columns]).sum()) * scale)
    return np.array(found)


def two_way_variance(X, p, q):
    """Variance of the scaled sum over p rows and q columns drawn without replacement, by its ANOVA components."""
    n, m = X.shape
    rows, columns, mean = X.mean(1), X.mean(0), X.mean()
    rest = X - rows[:, None] - columns[None, :] + mean
    by_row = ((rows - mean) ** 2).sum() / (n - 1)
    by_column = ((columns - mean) ** 2).sum() / (m - 1)
    by_cell = (rest**2).sum() / ((n - 1) * (m - 1))
    miss_p, miss_q = (1 - p / n) / p, (1 - q / m) / q
    return (n * m) ** 2 * (miss_p * by_row + miss_q * by_column + miss_p * miss_q * by_cell)


def without_replacement(X, k):
    """((1-q)/q) sum x^2 is for independent draws; without replacement the mean part drops out."""
    N = X.size
    return (N - k) / k * N / (N - 1) * ((X**2).sum() - X.sum() ** 2 / N)


@pytest.fixture(scope="module")
def two_gradients():
    rng = np.random.Generator(np.random.Philox(3))
    return rng.standard_normal((12, 10)), rng.standard_normal((12, 10))


@pytest.mark.parametrize(("kind", "k"), [("coordinate", 30), ("neuron", 36), ("neuron", 30)])
def test_inner_products_are_unbiased(kind, k, two_gradients):
    x, y = two_gradients
    found = inner_products(kind, x.shape, k, x, y)
    # Five standard errors: a chance of 6e-7, and the seeds are fixed.
    assert abs(found.mean() - (x * y).sum()) < 5 * found.std() / math.sqrt(SEEDS)


def test_every_entry_is_kept_equally_often_even_in_a_ragged_neuron_mask():
    counts = np.zeros((6, 9))
    for seed in range(SEEDS):
        rows, columns = draw("neuron", seed, "l", (6, 9), 14).coordinates()
        counts[rows, columns] += 1
    q = 14 / 54
    assert np.abs(counts / SEEDS - q).max() < 5 * math.sqrt(q * (1 - q) / SEEDS)


@pytest.mark.parametrize(("kind", "k"), [("coordinate", 30), ("neuron", 36)])
def test_variance_is_what_theory_gives(kind, k, two_gradients):
    x, y = two_gradients
    X = x * y
    expected = without_replacement(X, k) if kind == "coordinate" else two_way_variance(X, 6, 6)
    found = inner_products(kind, x.shape, k, x, y)
    # The variance of a sample variance of N near-normal draws is 2 / N, relative; five of its roots.
    assert found.var() == pytest.approx(expected, rel=5 * math.sqrt(2 / SEEDS))


def test_the_formulas_of_independent_draws_are_the_large_matrix_limit():
    rng = np.random.Generator(np.random.Philox(4))
    X = rng.standard_normal((400, 300))
    q = 0.1
    bernoulli = (1 - q) / q * (X**2).sum()
    assert without_replacement(X, round(q * X.size)) == pytest.approx(bernoulli, rel=1e-3)
    p_rate, q_rate = 0.1, 0.2
    independent = (
        (1 / p_rate - 1) * (1 / q_rate - 1) * (X**2).sum()
        + (1 / p_rate - 1) * (X.sum(1) ** 2).sum()
        + (1 / q_rate - 1) * (X.sum(0) ** 2).sum()
    )
    # The mean of X, which sampling without replacement does not feel, is the difference: of relative order 1/n.
    assert two_way_variance(X, 40, 60) == pytest.approx(independent, rel=0.02)


# --- budgets --------------------------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=8), total=st.sampled_from([960, 1984, 3968, 7]))
def test_a_total_is_filled_exactly_and_evenly(sizes, total):
    entries = {f"l{i}": n for i, n in enumerate(sizes)}
    kept = split(total, entries)
    assert sum(kept.values()) == min(total, sum(sizes))
    cut = [k for name, k in kept.items() if k < entries[name]]
    assert not cut or max(cut) - min(cut) <= 1
    assert all(k <= entries[name] for name, k in kept.items())
    assert list(kept) == [name for name in entries if name in kept]


def test_small_layers_are_kept_whole_and_the_rest_is_shared():
    assert split(960, {"a": 8192, "head": 128, "b": 8192}) == {"a": 416, "head": 128, "b": 416}


def test_given_budgets_stand():
    assert budgets({"a": 100, "b": 100, "c": 100}, 60, {"b": 40}) == {"a": 10, "b": 40, "c": 10}


@pytest.mark.parametrize("given_budget", [{"a": 101}, {"nowhere": 1}, {"a": 0}])
def test_a_budget_that_does_not_fit_names_the_layer(given_budget):
    with pytest.raises(MaskTooLarge, match=next(iter(given_budget))):
        budgets({"a": 100}, 60, given_budget)


def test_unknown_kinds_and_oversized_masks_are_refused():
    with pytest.raises(UnknownMask, match="neuron, coordinate"):
        draw("dense", 0, "l", (3, 3), 2)
    with pytest.raises(MaskTooLarge, match="10"):
        draw("neuron", 0, "l", (3, 3), 10)


@settings(max_examples=20)
@given(kind=kinds, seed=st.integers(0, 20))
def test_without_scale_self_influence_grows_along_nested_masks_up_to_the_full_one(kind, seed):
    rng = np.random.Generator(np.random.Philox(seed))
    shape, sample = (3, 4), rng.standard_normal((30, 3, 4))
    z = sample[0]
    values = []
    for k in (2, 5, 9, 12):
        rows, columns = draw(kind, seed, "l", shape, k).coordinates()
        g = sample[:, rows.numpy(), columns.numpy()]
        # Absolute damping: a relative one would change with k.
        F = g.T @ g / len(g) + 0.1 * np.eye(k)
        mine = z[rows.numpy(), columns.numpy()]
        values.append(float(mine @ np.linalg.solve(F, mine)))
    assert values == sorted(values)


# --- importance-weighted masks --------------------------------------------------------------------------------


def uneven(shape, seed=5):
    """Energies over three orders of magnitude."""
    rng = np.random.Generator(np.random.Philox(seed))
    return torch.from_numpy(10 ** rng.uniform(-3, 0, shape))


GOLDEN_WEIGHTED = [5, 3, 0]
GOLDEN_PROBABILITY = [1.0, 1.0, 0.2915628786132025]


def test_the_weighted_stream_is_the_documented_one_on_every_machine():
    weights = np.array([1.0, 2.0, 0.5, 4.0, 1.0, 8.0])
    kept, p = priority_sample("0/layer/2x3/entries keys", weights, 3)
    assert kept.tolist() == GOLDEN_WEIGHTED
    np.testing.assert_allclose(p, GOLDEN_PROBABILITY, rtol=1e-12)


@given(n=st.integers(1, 40), data=st.data())
def test_priority_sampling_equals_one_candidate_at_a_time(n, data):
    m = data.draw(st.integers(0, n))
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=n, max_size=n))
    raw = stream("any", n).tolist()
    u = [((x >> 11) + 0.5) / 2**53 for x in raw]
    kept, p = priority_sample("any", np.array(weights), m)
    expected_kept, expected_p = naive.priority_sample(u, weights, m)
    assert kept.tolist() == expected_kept
    np.testing.assert_allclose(p, expected_p, rtol=1e-12)


@given(shape=shapes, kind=kinds, seed=st.integers(0, 5), data=st.data())
def test_weighted_masks_are_nested_distinct_and_fill_what_they_can(shape, kind, seed, data):
    entries = shape[0] * shape[1]
    k = data.draw(st.integers(1, entries))
    more = data.draw(st.integers(k, entries))
    energy = uneven(shape)
    small, large = (cells(draw(kind, seed, "l", shape, n, energy)) for n in (k, more))
    assert small == large[: len(small)]
    assert len(set(large)) == len(large)
    # A grid of side s misses at most the s cells to the next one, and a full layer misses none.
    assert k - math.isqrt(k) - max(shape) <= len(small) <= k if kind == "neuron" else len(small) == k
    assert len(cells(draw(kind, seed, "l", shape, entries, energy))) == entries


def weighted_products(kind, k, x_OI, y_OI, energy):
    found = []
    for seed in range(SEEDS):
        mask = draw(kind, seed, "l", x_OI.shape, k, energy)
        rows, columns = mask.coordinates()
        found.append(float((x_OI[rows, columns] * y_OI[rows, columns] * mask.scale.numpy() ** 2).sum()))
    return np.array(found)


@pytest.mark.parametrize(("kind", "k"), [("coordinate", 30), ("neuron", 36), ("neuron", 33)])
def test_weighted_inner_products_are_unbiased(kind, k, two_gradients):
    x, y = two_gradients
    energy = uneven(x.shape)
    size = energy.sqrt().numpy()
    found = weighted_products(kind, k, x * size, y * size, energy)
    assert abs(found.mean() - (x * y * size**2).sum()) < 5 * found.std() / math.sqrt(SEEDS)


def test_weighting_lowers_the_variance_where_energy_is_uneven(two_gradients):
    x, y = two_gradients
    energy = uneven(x.shape)
    size = energy.sqrt().numpy()
    plain = inner_products("coordinate", x.shape, 30, x * size, y * size)
    assert weighted_products("coordinate", 30, x * size, y * size, energy).var() < plain.var() / 2


def test_where_nothing_was_measured_every_entry_counts_alike():
    mask = draw("coordinate", 0, "l", (4, 5), 7, torch.zeros(4, 5))
    assert len({round(float(s), 9) for s in mask.scale}) == 1


@settings(deadline=None)
@given(count=st.integers(0, 6), positions=st.integers(1, 3), cut=st.integers(0, 6))
def test_energies_are_means_over_unit_gradients_and_add_up(count, positions, cut):
    g = torch.Generator().manual_seed(count)
    a, d = (torch.randn(count, positions, n, generator=g, dtype=torch.float64) for n in (4, 3))

    found = EnergySums()
    for rows in (slice(0, cut), slice(cut, count)):
        for layer, factor in ((_Named("one"), 1.0), (_Named("two"), 2.0)):
            found(layer, a[rows], d[rows] * factor)
        found.close()
    dense = [d[b].T.numpy() @ a[b].numpy() for b in range(count)]
    if count:
        np.testing.assert_allclose(found.entries["one"] / count, naive.energy(dense), atol=1e-12)
    assert found.shares == pytest.approx({"one": count * 0.2, "two": count * 0.8})


class _Named:
    def __init__(self, name):
        self.name = name


def test_a_mask_survives_the_way_through_named_tensors():
    g = torch.Generator().manual_seed(0)
    a, d = torch.randn(2, 3, 6, generator=g), torch.randn(2, 3, 5, generator=g)
    for kind in MASK_KINDS:
        for energy in (None, uneven((5, 6))):
            mask = draw(kind, 0, "l", (5, 6), 9, energy)
            assert torch.equal(LayerMask.of(mask.tensors()).keep(a, d), mask.keep(a, d))


@given(
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=8),
    total=st.sampled_from([960, 1984, 7]),
    data=st.data(),
)
def test_budgets_by_energy_are_filled_exactly_and_in_proportion(sizes, total, data):
    entries = {f"l{i}": n for i, n in enumerate(sizes)}
    share = {name: data.draw(st.floats(0, 1)) for name in entries}
    kept = split_by(total, entries, share)
    assert sum(kept.values()) == min(total, sum(sizes))
    assert all(1 <= kept[name] <= entries[name] for name in kept)
    assert list(kept) == list(entries) or total < len(entries)


def test_a_layer_with_three_times_the_energy_gets_three_times_the_entries():
    assert split_by(402, {"a": 1000, "b": 1000}, {"a": 3.0, "b": 1.0}) == {"a": 301, "b": 101}
    assert budgets({"a": 1000, "b": 1000, "c": 50}, 440, {"c": 38}, {"a": 3.0, "b": 1.0})["a"] == 301

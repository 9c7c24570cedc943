"""Every kind of layer: what one pass over a batch captures is autograd's gradient of each example, under the mask."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from curator.errors import BadRowIndex, ExamplesCoupled, LayerNotFound, LayerUnsupported, RowsUnknown
from curator.influence import naive
from curator.influence.capture import capture, examples_of_rows, find_layers, refuse_coupling
from curator.influence.exact import ExactScores
from curator.influence.kronecker import KroneckerSums
from tests.numerics.layer_models import KINDS, built, kept, layers_of, measured, twin

every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@settings(max_examples=8, deadline=None)
@given(
    mask=st.sampled_from(["neuron", "coordinate"]),
    norm=st.sampled_from(["exact", "kept"]),
    bias=st.booleans(),
    dimension=st.sampled_from([6, 30, 10_000]),
    count=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_a_batch_captures_each_examples_own_gradient(kind, mask, norm, bias, dimension, count, seed):
    b = built(kind)
    layers = layers_of(b, kind, bias)
    x = b.batch(count, seed)
    g_BK, norm_B, masks = measured(b, x, layers, mask, norm, bias, dimension)
    assert g_BK.shape == (count, sum(m.kept for m in masks.values()))
    for i in range(count):
        G = twin(b, x[i : i + 1], layers)
        expected = kept(G, masks)
        assert g_BK[i].tolist() == pytest.approx(expected, abs=1e-9)
        length = naive.norm(G) if norm == "exact" else np.linalg.norm(expected)
        assert float(norm_B[i]) == pytest.approx(length, rel=1e-9)


@every_kind
@settings(max_examples=5, deadline=None)
@given(order=st.permutations(range(5)), seed=st.integers(0, 99), norm=st.sampled_from(["exact", "kept"]))
def test_neighbours_and_order_change_nothing(kind, order, seed, norm):
    b = built(kind)
    layers = layers_of(b, kind)
    x = b.batch(5, seed)
    g_BK, norm_B, _ = measured(b, x, layers, norm=norm)
    again_BK, norm_again_B, _ = measured(b, x[list(order)], layers, norm=norm)
    alone_1K, _, _ = measured(b, x[2:3], layers, norm=norm)
    # Another order of summation moves a sum of n terms by at most n eps of the sum of their sizes. No sum here has
    # more than 4 * 3^3 inputs or 2 * 63 positions, and each passes through at most three others: 2^9 in all.
    tolerance = 2**9 * torch.finfo(torch.float64).eps * float(norm_B.max() + g_BK.abs().max())
    assert float((again_BK - g_BK[list(order)]).abs().max()) <= tolerance
    assert float((norm_again_B - norm_B[list(order)]).abs().max()) <= tolerance
    assert float((alone_1K[0] - g_BK[2]).abs().max()) <= tolerance


@every_kind
@pytest.mark.parametrize("norm", ["exact", "kept"])
def test_a_nan_stays_with_the_example_that_caused_it(kind, norm):
    b = built(kind)
    layers = layers_of(b, kind)
    x = b.batch(3, 0)
    clean_BK, clean_B, _ = measured(b, x, layers, norm=norm)
    weight_B = torch.tensor([1.0, torch.inf, 1.0], dtype=torch.float64)
    spoilt = replace(b, other_losses=lambda x: b.losses(x) * weight_B)
    g_BK, norm_B, _ = measured(spoilt, x, layers, norm=norm)
    assert norm_B.isfinite().tolist() == [True, False, True]
    torch.testing.assert_close(g_BK[[0, 2]], clean_BK[[0, 2]])
    torch.testing.assert_close(norm_B[[0, 2]], clean_B[[0, 2]])


@every_kind
def test_every_reader_takes_every_kind(kind):
    b = built(kind)
    layers = layers_of(b, kind)
    sums = KroneckerSums()
    capture(b.model, layers, lambda: b.losses(b.batch(6, 0)), sums)
    scores = ExactScores(sums.factors(0.1))
    capture(b.model, layers, lambda: b.losses(b.batch(3, 1)), scores)
    assert (scores.norm_B() > 0).all()


# --- which modules are a layer ------------------------------------------------------------------------------


def test_modules_that_share_a_weight_are_one_layer_under_any_of_their_names():
    model = built("reused").model
    assert [layer.name for layer in find_layers(model)] == ["first", "left"]
    assert [layer.name for layer in find_layers(model, ("right", "again"))] == ["first", "left"]
    assert [layer.name for layer in find_layers(model, ("*", "!right"))] == ["first"]
    assert find_layers(model, ("left",))[0].modules == (model.left, model.right)


def test_a_shared_weight_with_two_biases_has_no_bias_column():
    model = built("reused").model
    assert [layer.bias for layer in find_layers(model, bias=True)] == [True, False]
    model.right.bias = model.left.bias
    assert [layer.bias for layer in find_layers(model, bias=True)] == [True, True]


def test_an_embedding_takes_part_only_where_it_is_named():
    model = built("tied embedding").model
    assert [layer.name for layer in find_layers(model)] == ["mix", "head"]
    found = find_layers(model, ("*", "embed"))
    assert [(layer.name, layer.shape) for layer in found] == [("embed", (7, 4)), ("mix", (4, 4))]
    assert found[0].modules == (model.embed, model.head)
    with pytest.raises(LayerNotFound):
        find_layers(model, ("emb*",))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Conv2d(16, 16, 3, groups=16), "16 groups"),
        (nn.ConvTranspose2d(2, 2, 3), "transposed"),
        (nn.Embedding(3, 2, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (nn.Embedding(3, 2, max_norm=1.0), "max_norm"),
        (nn.Bilinear(2, 2, 2), "Bilinear"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else None,
)
def test_a_module_that_cannot_be_captured_is_refused_where_it_is_named_and_passed_over_where_not(module, reason):
    model = nn.ModuleDict({"plain": nn.Linear(2, 2), "odd": module})
    assert [layer.name for layer in find_layers(model)] == ["plain"]
    with pytest.raises(LayerUnsupported, match=f"odd .*{reason}"):
        find_layers(model, ("*", "odd"))


def test_a_convolution_without_a_batch_dimension_is_refused():
    conv = nn.Conv1d(2, 3, 2)
    with pytest.raises(LayerUnsupported, match="batch dimension"):
        capture(conv, find_layers(conv), lambda: conv(torch.ones(2, 5)).sum(1), lambda *_: None)


# --- what mixes examples --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(3),
        nn.SyncBatchNorm(3),
        nn.LazyBatchNorm1d(),
        nn.BatchNorm3d(3, track_running_stats=False).eval(),
        nn.InstanceNorm2d(3, track_running_stats=True),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_a_norm_that_mixes_examples_is_refused_by_name(norm):
    with pytest.raises(ExamplesCoupled, match=f"deep.norm .{type(norm).__name__}"):
        refuse_coupling(nn.ModuleDict({"deep": nn.ModuleDict({"norm": norm})}))


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(3).eval(),
        nn.InstanceNorm1d(3),
        nn.InstanceNorm1d(3, track_running_stats=True).eval(),
        nn.GroupNorm(1, 3),
        nn.LayerNorm(3),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_a_norm_of_single_examples_is_accepted(norm):
    refuse_coupling(norm)


# --- rows that are not examples -------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    owners=st.lists(st.integers(-1, 3), max_size=9),
    mask=st.sampled_from(["neuron", "coordinate"]),
    norm=st.sampled_from(["exact", "kept"]),
    bias=st.booleans(),
    packed=st.booleans(),
)
def test_an_index_says_which_example_a_row_belongs_to(owners, mask, norm, bias, packed):
    b, index = built("reused"), torch.tensor(owners, dtype=torch.long)
    rows = b.batch(len(owners), 3)
    layers = find_layers(b.model, bias=bias)

    def by_example(x):
        with examples_of_rows(index):
            out = b.model(x[None])[0] if packed else b.model(x)
        used = index >= 0
        return out.new_zeros(4).index_add(0, index[used], out[used].square().sum(dim=1))

    whole = replace(b, other_losses=by_example)
    g_BK, norm_B, masks = measured(whole, rows, layers, mask, norm, bias)
    for i in range(4):
        one = replace(b, other_losses=lambda x: b.model(x).square().sum(dim=1))
        G = twin(one, rows[index == i], layers)
        assert g_BK[i].tolist() == pytest.approx(kept(G, masks), abs=1e-10)
        length = naive.norm(G) if norm == "exact" else np.linalg.norm(kept(G, masks))
        assert float(norm_B[i]) == pytest.approx(length, rel=1e-9)


def test_several_crops_of_an_image_are_one_example():
    b = built("conv2 plain")
    layers, crops = find_layers(b.model), b.batch(4, 0)

    def both(x):
        with examples_of_rows(torch.tensor([0, 1, 0, 1])):
            return b.losses(x).view(2, 2).sum(dim=0)

    pairs = replace(b, other_losses=both)
    g_BK, _, masks = measured(pairs, crops, layers)
    parts = [twin(b, crops[i : i + 1], layers) for i in (1, 3)]
    expected = kept({name: parts[0][name] + parts[1][name] for name in parts[0]}, masks)
    assert g_BK[1].tolist() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("index", [torch.ones(2), torch.tensor([[0]]), torch.tensor([-2, 0])])
def test_an_index_that_is_none_is_refused(index):
    with pytest.raises(BadRowIndex), examples_of_rows(index):
        pass


@pytest.mark.parametrize(("owners", "error"), [([0, 1], RowsUnknown), ([0, 1, 2], BadRowIndex)])
def test_an_index_that_does_not_fit_is_refused(owners, error):
    b = built("reused")

    def losses():
        with examples_of_rows(torch.tensor(owners)):
            return b.model(b.batch(3, 0)).sum(dim=1)[:2]

    with pytest.raises(error):
        capture(b.model, find_layers(b.model), losses, lambda *_: None)

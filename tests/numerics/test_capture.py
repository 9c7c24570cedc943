"""Capture: what one backward pass gives equals what each example alone gives."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from curator.errors import (
    ExamplesCoupled,
    InputOverwritten,
    LayerNotFound,
    LayersUnreached,
    LossShape,
    RowsUnknown,
)
from curator.influence import naive
from curator.influence.attribution import RecipeSpec, draw_masks
from curator.influence.capture import _tensor_cores, capture, find_layers
from curator.influence.ghost import ghost_inner, ghost_products
from curator.influence.kept import KeptEntries
from tests.numerics.small_models import case, one

kinds = st.sampled_from(["rows", "positions"])
masks = st.sampled_from(["neuron", "coordinate"])


def kept_of(c, batch, bias=False, mask="coordinate", dimension=20):
    layers = find_layers(c.model, bias=bias)
    reader = KeptEntries(draw_masks(layers, RecipeSpec(mask=mask, dimension=dimension, bias=bias)))
    loss_B = capture(c.model, layers, lambda: c.losses(c.model, batch), reader)
    return reader, loss_B, layers


@settings(max_examples=30, deadline=None)
@given(
    kind=kinds,
    mask=masks,
    bias=st.booleans(),
    count=st.integers(0, 5),
    positions=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_kept_entries_and_norms_equal_one_example_at_a_time(kind, mask, bias, count, positions, seed):
    c = case(kind)
    batch = c.batch(count, positions, seed)
    reader, loss_B, layers = kept_of(c, batch, bias, mask)
    g_BK = reader.g_BK(loss_B)
    assert g_BK.shape == (count, 20)
    for b in range(count):
        G = naive.gradients(lambda b=b: c.losses(c.model, one(batch, b)), layers)
        expected = [x for name, m in reader.masks.items() for x in naive.kept(G[name], m)]
        assert g_BK[b].tolist() == pytest.approx(expected, abs=1e-12)
        assert float(reader.norm_B()[b]) == pytest.approx(naive.norm(G), rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(kind=kinds, seed=st.integers(0, 99), data=st.data())
def test_neighbours_and_order_change_nothing(kind, seed, data):
    c = case(kind, torch.float32)
    batch = c.batch(6, 3, seed)
    order = data.draw(st.permutations(range(6)))
    together, loss_B, _ = kept_of(c, batch)
    shuffled, loss_again_B, _ = kept_of(c, (batch[0][list(order)], batch[1][list(order)]))
    g, again = together.g_BK(loss_B), shuffled.g_BK(loss_again_B)
    # A sum of n float32 products is off by at most n eps of the sum of their sizes; no sum here exceeds 32 terms,
    # and four layers pass one on to the next.
    tolerance = 4 * 32 * torch.finfo(torch.float32).eps * float(g.abs().max())
    assert (again - g[list(order)]).abs().max() <= tolerance
    alone, loss_one, _ = kept_of(c, one(batch, 2))
    assert (alone.g_BK(loss_one)[0] - g[2]).abs().max() <= tolerance


@given(padding=st.integers(1, 4), seed=st.integers(0, 20))
@settings(max_examples=10, deadline=None)
def test_padding_changes_nothing(padding, seed):
    c = case("positions")
    x, y = c.batch(3, 2, seed)
    padded = F.pad(x, (0, 0, 0, padding), value=3.0), F.pad(y, (0, padding), value=-1)
    plain, loss_B, _ = kept_of(c, (x, y))
    wide, loss_wide_B, _ = kept_of(c, padded)
    torch.testing.assert_close(wide.g_BK(loss_wide_B), plain.g_BK(loss_B), rtol=0, atol=1e-12)
    torch.testing.assert_close(wide.norm_B(), plain.norm_B(), rtol=1e-9, atol=0)


@settings(max_examples=20)
@given(count=st.integers(0, 4), positions=st.integers(1, 5), slices=st.integers(0, 3), seed=st.integers(0, 50))
def test_ghost_norms_and_products_equal_the_formed_gradient(count, positions, slices, seed):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(count, positions, 4, generator=g, dtype=torch.float64)
    d = torch.randn(count, positions, 3, generator=g, dtype=torch.float64)
    u = torch.randn(slices, 3, 4, generator=g, dtype=torch.float64)
    G = torch.einsum("bto,bti->boi", d, a)
    torch.testing.assert_close(ghost_inner(a, d), G.square().sum(dim=(1, 2)))
    torch.testing.assert_close(ghost_products(a, d, u), torch.einsum("boi,soi->bs", G, u))


def test_a_nan_stays_with_the_example_that_caused_it():
    c = case("positions")
    batch = c.batch(4, 3, 0)
    clean, loss_B, _ = kept_of(c, batch)
    batch[0][1, 0, 0] = torch.nan
    spoilt, spoilt_B, _ = kept_of(c, batch)
    assert spoilt_B.isfinite().tolist() == [True, False, True, True]
    others = [0, 2, 3]
    torch.testing.assert_close(spoilt.g_BK(spoilt_B)[others], clean.g_BK(loss_B)[others], rtol=0, atol=1e-12)


def test_parameters_keep_their_flags_and_get_no_gradient():
    c = case("rows")
    c.model.first.bias.requires_grad_(False)
    kept_of(c, c.batch(3, 1, 0))
    flags = {n: p.requires_grad for n, p in c.model.named_parameters()}
    assert flags == {"first.weight": True, "first.bias": False, "second.weight": True, "second.bias": True}
    assert all(p.grad is None for p in c.model.parameters())
    assert not c.model.first._forward_hooks


def test_a_wholly_frozen_model_is_captured_and_the_flags_survive_an_error():
    c = case("rows")
    c.model.requires_grad_(False)
    reader, loss_B, _ = kept_of(c, c.batch(3, 1, 0))
    assert reader.g_BK(loss_B).abs().sum() > 0
    c.model.requires_grad_(True)
    with pytest.raises(ZeroDivisionError):
        capture(c.model, find_layers(c.model), lambda: 1 / 0, reader)
    assert all(p.requires_grad for p in c.model.parameters())


def test_float16_activations_are_summed_in_float32():
    a = torch.full((1, 4096, 2), 0.01, dtype=torch.bfloat16)
    d = torch.full((1, 4096, 2), 0.01, dtype=torch.bfloat16)
    kept = draw_masks(find_layers(nn.Linear(2, 2)), RecipeSpec(dimension=4))[""].keep(a, d)
    # In bfloat16 the sum would stall at 2^-7 or so, where one more term no longer changes it.
    assert kept.dtype == torch.float32
    assert float(kept[0, 0]) == pytest.approx(4096 * float(a[0, 0, 0]) ** 2, rel=1e-3)


def test_patterns_choose_and_take_out_again_in_the_models_order():
    model = case("positions").model
    assert [layer.name for layer in find_layers(model, ("out", "in*"))] == ["into", "out"]
    assert [layer.name for layer in find_layers(model, ("*", "!again"))] == ["into", "flipped", "out"]
    assert [layer.shape for layer in find_layers(model, ("flipped",), bias=True)] == [(6, 5)]
    assert [layer.shape for layer in find_layers(model, ("again",), bias=True)] == [(4, 4)]


@pytest.mark.parametrize("patterns", [("encoder.*",), ("*", "!nowhere"), ("into", "!into")])
def test_a_pattern_without_a_match_shows_the_names_there_are(patterns):
    with pytest.raises(LayerNotFound, match="into, again, flipped, out"):
        find_layers(case("positions").model, patterns)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(5), nn.BatchNorm1d(5, track_running_stats=False).eval()])
def test_a_batch_norm_that_mixes_examples_is_refused_by_name(norm):
    model = nn.Sequential(nn.Linear(5, 5).eval(), norm)
    with pytest.raises(ExamplesCoupled, match="Module 1 "):
        capture(model, find_layers(model), lambda: model(torch.ones(2, 5)).sum(1), lambda *_: None)


def test_a_batch_norm_in_evaluation_is_fine():
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)).eval()
    assert len(capture(model, find_layers(model), lambda: model(torch.ones(2, 5)).sum(1), lambda *_: None)) == 2


@pytest.mark.parametrize("reduce", [torch.sum, lambda x: x, lambda x: x.sum(1).long(), lambda x: 3.0])
def test_a_loss_that_is_not_one_number_an_example_is_refused(reduce):
    model = nn.Sequential(nn.Linear(5, 3))
    with pytest.raises(LossShape):
        capture(model, find_layers(model), lambda: reduce(model(torch.ones(2, 5))), lambda *_: None)


def test_a_loss_that_misses_every_captured_layer_is_refused():
    model = nn.Sequential(nn.Linear(5, 3))
    with pytest.raises(LayersUnreached, match="0"):
        capture(model, find_layers(model), lambda: torch.ones(2), lambda *_: None)


def test_rows_that_are_not_examples_are_refused():
    model = nn.Sequential(nn.Linear(5, 3))
    flat = torch.ones(6, 5)
    with pytest.raises(RowsUnknown, match="each of 2 examples"):
        capture(model, find_layers(model), lambda: model(flat).sum(1).view(2, 3).sum(1), lambda *_: None)


def test_an_input_overwritten_in_place_is_refused_not_mismeasured():
    layer = nn.Linear(5, 3)

    def losses():
        x = torch.ones(2, 5)
        y = layer(x)
        x.add_(1)
        return y.sum(1)

    with pytest.raises(InputOverwritten):
        capture(layer, find_layers(layer), losses, lambda *_: None)


def test_torchs_fused_attention_layer_is_seen_through_its_linear_layers():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    layers = find_layers(model)
    assert [layer.name for layer in layers] == ["linear1", "linear2"]
    seen = []
    capture(
        model,
        layers,
        lambda: model(torch.randn(3, 4, 8)).sum((1, 2)),
        lambda layer, a, d: seen.append((layer.name, a.shape, d.shape)),
    )
    assert sorted(seen) == [("linear1", (3, 4, 8), (3, 4, 16)), ("linear2", (3, 4, 16), (3, 4, 8))]


@dataclass(frozen=True)
class OnGpu:
    """What is asked of a tensor before its layer is read."""

    dtype: torch.dtype
    is_cuda: bool = True


def test_readers_of_a_half_precision_model_on_a_gpu_multiply_in_tf32():
    """TF32 keeps 10 bits of a mantissa, float32 23: the last 13 of a widened half are zero, so it loses nothing."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    for dtype in (torch.bfloat16, torch.float16):
        widened = torch.randn(100, generator=torch.Generator().manual_seed(0)).to(dtype).float()
        assert not (widened.view(torch.int32) & 0x1FFF).any()
        with _tensor_cores(OnGpu(dtype)):
            assert products.fp32_precision == "tf32"
        assert products.fp32_precision == before
    for other in (OnGpu(torch.float32), OnGpu(torch.bfloat16, is_cuda=False)):
        with _tensor_cores(other):
            assert products.fp32_precision == before

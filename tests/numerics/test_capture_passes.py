"""Ways to run a model that a pass must see through: checkpointing, compilation, autocast, adapters, transformers."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from curator.errors import CalledWithoutGradient, InputOverwritten
from curator.influence.attribution import RecipeSpec, draw_masks
from curator.influence.capture import capture, examples_of_rows, find_layers
from curator.influence.kept import KeptEntries

both_norms = pytest.mark.parametrize("norm", ["exact", "kept"])


class Blocks(nn.Module):
    """Two residual blocks; ``how`` runs each: plainly, or under checkpointing."""

    def __init__(self, how=None):
        super().__init__()
        self.into = nn.Linear(5, 6)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 6)) for _ in range(2)
        )
        self.out = nn.Linear(6, 3)
        self.how = how or (lambda block, h: block(h))

    def forward(self, x):
        h = self.into(x)
        for block in self.blocks:
            # One layer is called by both blocks: what is computed again must not count twice.
            h = h + self.how(lambda z, block=block: block(torch.tanh(self.blocks[0][2](block[0](z)))), h)
        return self.out(h)


def blocks(how=None):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Blocks(how).double().eval()


def taken(model, x, norm="exact", layers=None, dimension=60, mask="neuron", losses=None):
    layers = layers or find_layers(model)
    reader = KeptEntries(draw_masks(layers, RecipeSpec(mask=mask, dimension=dimension)), norm)
    losses = losses or (lambda: model(x).square().flatten(1).sum(dim=1))
    loss_B = capture(model, layers, losses, reader)
    return reader.g_BK(loss_B), reader.norm_B()


def rows(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- checkpointing --------------------------------------------------------------------------------------------


@both_norms
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(norm, reentrant):
    x = rows(4, 2, 5)
    found = taken(blocks(lambda block, h: checkpoint(block, h, use_reentrant=reentrant)), x, norm)
    torch.testing.assert_close(found, taken(blocks(), x, norm), rtol=1e-12, atol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_rows_are_remembered_when_they_are_computed_again(reentrant):
    x, index = rows(6, 5), torch.tensor([1, 0, 1, 2, 2, 2])

    def by_example(model):
        def losses():
            with examples_of_rows(index):
                out = model(x).square().sum(dim=1)
            return out.new_zeros(3).index_add(0, index, out)

        return losses

    plain, again = blocks(), blocks(lambda block, h: checkpoint(block, h, use_reentrant=reentrant))
    found, expected = (taken(m, x, losses=by_example(m)) for m in (again, plain))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_checkpointing_keeps_no_input_from_the_forward_pass():
    """What a checkpoint is for: between forward and backward no input inside it is alive."""
    alive = {}
    for kind in ("plain", "checkpoint"):
        kept = []

        def saved(x, kept=kept):
            kept.append(tuple(x.shape))
            return x

        how = None if kind == "plain" else lambda block, h: checkpoint(block, h, use_reentrant=False)
        model = blocks(how)
        with torch.autograd.graph.saved_tensors_hooks(saved, lambda x: x):
            taken(model, rows(4, 5))
        alive[kind] = kept.count((4, 8))
    # Inside the checkpoint's own hooks the outer ones see only what is kept outside.
    assert alive["checkpoint"] < alive["plain"]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_segment_that_reentrant_checkpointing_hides_is_refused_by_name():
    model = blocks(lambda block, h: checkpoint(block, h.detach(), use_reentrant=True))
    with pytest.raises(CalledWithoutGradient, match=r"blocks.0.0, blocks.0.2, blocks.1.0"):
        taken(model, rows(4, 5))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_wholly_hidden_model_is_refused_by_name():
    model = nn.Sequential(nn.Linear(5, 3))

    def losses():
        return checkpoint(model, torch.ones(2, 5), use_reentrant=True).sum(1)

    with pytest.raises(CalledWithoutGradient, match="0"):
        taken(model, None, losses=losses, dimension=4)


def test_a_layer_that_runs_without_gradient_beside_its_real_call_is_fine():
    model = nn.Sequential(nn.Linear(5, 5)).double()
    x = rows(3, 5)

    def losses():
        with torch.no_grad():
            extra = model(x)
        return (model(x) * extra).sum(dim=1)

    g_BK, _ = taken(model, x, losses=losses, dimension=25, mask="coordinate")
    assert (g_BK.abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("norm", ["exact", "kept"])
def test_an_input_changed_in_place_inside_a_checkpoint_is_measured_as_it_was(norm):
    layer = nn.Linear(5, 5).double()

    def segment(x):
        h = x * 1
        y = layer(h)
        h.add_(1)
        return y

    def plain(x):
        return layer(x * 1)

    found, expected = (
        taken(layer, None, norm, losses=lambda run=run: run().square().sum(dim=1), dimension=8)
        for run in (
            lambda: checkpoint(segment, rows(3, 5).requires_grad_(), use_reentrant=False),
            lambda: plain(rows(3, 5)),
        )
    )
    torch.testing.assert_close(found, expected)


def test_what_a_mask_selects_is_safe_from_changes_in_place():
    layer = nn.Linear(5, 5).double()

    def losses(change):
        x = rows(3, 5)
        y = layer(x)
        x.add_(change)
        return y.square().sum(dim=1)

    with pytest.raises(InputOverwritten):
        taken(layer, None, "exact", losses=lambda: losses(1), dimension=4)
    changed, unchanged = (
        taken(
            layer, None, "kept", losses=lambda c=c: losses(c) if c else layer(rows(3, 5)).square().sum(1), dimension=4
        )
        for c in (1, 0)
    )
    torch.testing.assert_close(changed, unchanged)


# --- compilation ----------------------------------------------------------------------------------------------


@both_norms
@pytest.mark.parametrize("where", ["model", "method", "inner"])
def test_a_compiled_model_is_measured_as_its_original(norm, where):
    x, model = rows(4, 5), blocks()
    expected = taken(model, x, norm)
    runs = []

    def backend(graph, _):
        def run(*args):
            runs.append(1)
            return graph.forward(*args)

        return run

    torch._dynamo.reset()
    if where == "model":
        compiled = torch.compile(model, backend=backend)
    elif where == "method":
        compiled = model
        compiled.compile(backend=backend)
    else:
        compiled = model
        model.into = torch.compile(model.into, backend=backend)
    out = compiled(x)
    assert runs, "the test compiles something"
    before = len(runs)
    assert [layer.name for layer in find_layers(compiled)] == [layer.name for layer in find_layers(blocks())]
    torch.testing.assert_close(taken(compiled, x, norm), expected, rtol=1e-12, atol=0)
    assert len(runs) == before, "compiled code skips hooks and must not run"
    torch.testing.assert_close(compiled(x), out)


# --- precision ------------------------------------------------------------------------------------------------


@both_norms
def test_autocast_to_bfloat16_is_summed_in_float32(norm):
    model, x = blocks().float(), rows(3, 64, 5, dtype=torch.float32)

    def losses():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x)
        return out.float().square().flatten(1).sum(dim=1)

    g_BK, norm_B = taken(model, x, norm, losses=losses)
    expected_BK, expected_B = taken(model.double(), x.double(), norm)
    assert g_BK.dtype == norm_B.dtype == torch.float32
    # bfloat16 rounds each factor by 2^-9; no gradient passes through more than eight such products, twice.
    tolerance = 2 * 8 * 2**-9
    assert ((g_BK - expected_BK).norm(dim=1) <= tolerance * expected_B).all()
    assert ((norm_B / expected_B - 1).abs() <= tolerance).all()


# --- adapters and real models ---------------------------------------------------------------------------------


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=16, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(config).double().eval()


def lm_losses(model, tokens):
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").sum(dim=1)


def check_against_autograd(model, patterns, norm="exact"):
    tokens = torch.randint(0, 11, (3, 6), generator=torch.Generator().manual_seed(1))
    layers = find_layers(model, patterns)
    masks = draw_masks(layers, RecipeSpec(dimension=40 * len(layers)))
    reader = KeptEntries(masks, norm)
    loss_B = capture(model, layers, lambda: lm_losses(model, tokens), reader)
    g_BK = reader.g_BK(loss_B)
    weights = [layer.module.weight for layer in layers]
    flags = [w.requires_grad for w in weights]
    for w in weights:
        w.requires_grad_(True)
    for b in range(3):
        G = torch.autograd.grad(lm_losses(model, tokens[b : b + 1]).sum(), weights)
        G = [g.T if type(layer.module).__name__ == "Conv1D" else g for layer, g in zip(layers, G, strict=True)]
        expected = torch.cat([mask.scale * g[mask.coordinates()] for g, mask in zip(G, masks.values(), strict=True)])
        torch.testing.assert_close(g_BK[b], expected, rtol=0, atol=1e-11)
    for w, flag in zip(weights, flags, strict=True):
        w.requires_grad_(flag)
    return layers


@both_norms
def test_gpt2_with_its_tied_head(norm):
    layers = check_against_autograd(gpt2(), ("*", "transformer.wte"), norm)
    assert len(layers) == 2 * 4 + 1
    assert layers[0].shape == (11, 8)
    assert len(layers[0].modules) == 2


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # transformers renames it
@pytest.mark.parametrize("reentrant", [True, False])
def test_gpt2_under_its_own_checkpointing(reentrant):
    model = gpt2()
    expected = taken(model, None, losses=lambda: lm_losses(model, tokens()))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()  # transformers checkpoints in training mode only; every dropout is 0
    if reentrant:
        model.enable_input_require_grads()
    found = taken(model, None, losses=lambda: lm_losses(model, tokens()))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def tokens():
    return torch.randint(0, 11, (3, 6), generator=torch.Generator().manual_seed(2))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks transformers for it
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_the_adapters_of_a_frozen_base(options):
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(
            r=2, target_modules=["c_attn", "c_fc"], init_lora_weights=False, fan_in_fan_out=True, **options
        )
        model = peft.get_peft_model(gpt2(), config).double().eval()
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    layers = check_against_autograd(model, ("*lora_A*", "*lora_B*"))
    assert len(layers) == 2 * 2 * 2
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before

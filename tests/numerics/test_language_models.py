"""Language models as people have them: what is captured equals autograd, example by example, for every architecture."""

from pathlib import Path

import pytest
import torch

from curator.influence.capture import capture, find_layers
from curator.influence.kept import KeptEntries
from curator.influence.recipe import RecipeSpec, draw_masks
from curator.workloads.causal_lm import CausalLM, Options
from curator.workloads.experts import Experts, take_apart
from curator.workloads.tokens import Tokens, padded

transformers = pytest.importorskip("transformers")

VOCABULARY = 32
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {
    **ENDS,
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
GROUPED = {**SMALL, "num_key_value_heads": 1, "head_dim": 8}
MIXED = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}
ARCHITECTURES = {
    "gpt2": ("GPT2", {**ENDS, "vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    "llama": ("Llama", GROUPED),
    "qwen2": ("Qwen2", {**SMALL, "num_key_value_heads": 1}),
    "qwen3": ("Qwen3", GROUPED),
    "mistral": ("Mistral", GROUPED),
    "gemma2": ("Gemma2", {**GROUPED, "sliding_window": 4}),
    "gpt-neox": ("GPTNeoX", SMALL),
    "phi": ("Phi", SMALL),
    "phi3": ("Phi3", {**SMALL, "num_key_value_heads": 1}),
    "mixtral": ("Mixtral", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": (
        "Qwen2Moe",
        {**SMALL, **MIXED, "num_key_value_heads": 1, "num_experts": 4, "shared_expert_intermediate_size": 12},
    ),
    "qwen3-moe": ("Qwen3Moe", {**GROUPED, **MIXED, "num_experts": 4}),
}


def built(name, dtype=torch.float32, **changed):
    family, options = ARCHITECTURES[name]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = getattr(transformers, f"{family}Config")(**{**options, **changed}, attn_implementation="eager")
        config._experts_implementation = "eager"  # the fused ones know no float64
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # far from the tiny start, where gradients are all but zero
            torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    return model.to(dtype).eval()


def examples(n, seed=0):
    """Token rows of different lengths; the first two tokens are a prompt."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for b in range(n):
        ids = torch.randint(3, VOCABULARY, (4 + 3 * b % 7,), generator=generator).tolist()
        rows.append(Tokens(ids, [-100, -100, *ids[2:]]))
    return rows


def workload_for(model, **options):
    workload = CausalLM(Path(), Options(**options))
    workload._mixture = take_apart(model)
    return workload


def kept_entries(workload, model, batch, mask="coordinate"):
    layers = find_layers(model, workload.layers(model))
    masks = draw_masks(layers, RecipeSpec(mask=mask, dimension=40 * len(layers)))
    reader = KeptEntries(masks, "exact")
    loss_B = capture(model, layers, lambda: workload.losses(model, batch), reader)
    return layers, masks, loss_B, reader.g_BK(loss_B)


def by_autograd(workload, model, row, layers, masks):
    """The naive twin: one example, autograd's whole weight gradients, then the mask."""
    weights = [layer.module.weight for layer in layers]
    flags = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    loss = workload.losses(model, padded(row if isinstance(row, list) else [row], 0)).sum()
    whole = torch.autograd.grad(loss, weights, allow_unused=True)
    for weight, flag in zip(weights, flags, strict=True):
        weight.requires_grad_(flag)
    kept = []
    for layer, G, weight in zip(layers, whole, weights, strict=True):
        G_OI = torch.zeros_like(weight) if G is None else G  # an expert that was sent nothing
        G_OI = G_OI.T if type(layer.module).__name__ == "Conv1D" else G_OI
        kept.append(masks[layer.name].scale * G_OI[masks[layer.name].coordinates()])
    return torch.cat(kept)


@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_captured_gradients_are_autograds_padded_or_not(name, n):
    """float64: the sums of T <= 11 terms differ by their order only, 1e-9 of the largest entry is far above that."""
    model = built(name, torch.float64)
    workload = workload_for(model)
    rows = examples(n)
    layers, masks, _, g_BK = kept_entries(workload, model, padded(rows, 0))
    for b, row in enumerate(rows):
        expected = by_autograd(workload, model, row, layers, masks)
        assert expected.abs().max() > 0
        torch.testing.assert_close(g_BK[b], expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_in_float32_they_agree_to_its_rounding(name):
    """A gradient is sums over T <= 11 positions and 16 to 32 inputs, some ten such sums deep: a relative error of
    10 sqrt(32) 2^-24 = 3e-6 of the largest entry, and as much again on autograd's side; ten times that is allowed.
    """
    model = built(name)
    workload = workload_for(model)
    rows = examples(8)
    layers, masks, _, g_BK = kept_entries(workload, model, padded(rows, 0))
    for b, row in enumerate(rows):
        expected = by_autograd(workload, model, row, layers, masks)
        torch.testing.assert_close(g_BK[b], expected, rtol=0, atol=6e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "qwen2-moe"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_is_what_transformers_computes_for_the_record_alone(name, reduction):
    model = built(name, torch.float64)
    rows = examples(5)
    with torch.no_grad():
        labelled = [
            model(input_ids=torch.tensor([row.ids]), labels=torch.tensor([row.targets])).loss
            * (len(row.ids) - 2) ** (reduction == "sum")
            for row in rows
        ]
    found = workload_for(model, reduction=reduction).losses(model, padded(rows, 0))
    torch.testing.assert_close(
        found.detach(), torch.stack(labelled).double(), rtol=1e-6, atol=0
    )  # its own loss is float32


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "qwen3-moe"])
def test_experts_taken_apart_compute_what_they_did(name):
    model = built(name, torch.float64)
    batch = padded(examples(4), 0)
    with torch.no_grad():
        before = model(input_ids=batch.id_BT).logits
        assert take_apart(model)
        after = model(input_ids=batch.id_BT).logits
    assert sum(isinstance(module, Experts) for module in model.modules()) == 2
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-12)
    assert not take_apart(model)


def test_an_expert_that_is_sent_nothing_has_no_gradient():
    """Two tokens with two of eight experts each leave four at least without any; attention has seen two tokens."""
    model = built("mixtral", torch.float64, num_local_experts=8)
    workload = workload_for(model)
    layers, masks, _, g_BK = kept_entries(workload, model, padded([Tokens([5, 6, 7], [-100, 6, 7])], 0))
    ends = torch.tensor([0, *(masks[layer.name].kept for layer in layers)]).cumsum(0).tolist()
    silent = {n.name for n, a, b in zip(layers, ends, ends[1:], strict=False) if not g_BK[0, a:b].abs().sum()}
    assert len([name for name in silent if ".0.mlp.experts.up." in name]) >= 4
    assert all(".experts." in name for name in silent)


# --- preferences ----------------------------------------------------------------------------------------------


def pairs(n):
    rows = examples(2 * n, seed=3)
    return [row for pair in zip(rows[:n], rows[n:], strict=True) for row in pair]


def log_probability(model, row):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.ids])).logits[0, :-1].log_softmax(-1)
    return sum(float(logits[t, target]) for t, target in enumerate(row.targets[1:]) if target != -100)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_dpo_loss_is_its_formula_and_its_gradient_the_pairs(name):
    model, start = built(name, torch.float64), built(name, torch.float64)
    with torch.no_grad():
        for parameter in start.parameters():
            parameter.mul_(0.9)
    workload = workload_for(model, objective="dpo", beta=0.3)
    take_apart(start)
    workload._reference = start
    rows = pairs(3)
    layers, masks, loss_B, g_BK = kept_entries(workload, model, padded(rows, 0))
    for b in range(3):
        chosen, rejected = rows[2 * b : 2 * b + 2]
        margin = [log_probability(m, chosen) - log_probability(m, rejected) for m in (model, start)]
        expected = torch.nn.functional.softplus(torch.tensor(-0.3 * (margin[0] - margin[1]), dtype=torch.float64))
        torch.testing.assert_close(loss_B[b], expected, rtol=1e-9, atol=0)
        entries = by_autograd(workload, model, rows[2 * b : 2 * b + 2], layers, masks)
        torch.testing.assert_close(g_BK[b], entries, rtol=0, atol=1e-9 * float(entries.abs().max()))


def test_without_a_reference_training_starts_from_the_checkpoint():
    model = built("llama", torch.float64)
    loss_B = workload_for(model, objective="dpo").losses(model, padded(pairs(4), 0))
    torch.testing.assert_close(loss_B.detach(), torch.full((4,), 2.0).log().double())
    assert loss_B.requires_grad

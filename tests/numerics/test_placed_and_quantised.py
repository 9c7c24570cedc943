"""Models that are not on one device, or not in floating point: what is captured is what it would be otherwise."""

import sys

import pytest
import torch
from torch import nn

from curator.errors import BadWorkloadOption, CheckpointForeign, ExtraMissing, NotTrainable
from curator.influence.attribution import Attributor
from curator.influence.capture import capture, find_layers
from curator.influence.dropout import columns
from curator.influence.exact import ExactDirections, ExactScores, ExactTerms
from curator.influence.kept import KeptEntries
from curator.influence.kronecker import KroneckerRoots
from curator.influence.layers import device_of
from curator.influence.recipe import RecipeSpec, draw_masks
from curator.workloads import base, huggingface
from curator.workloads.causal_lm import CausalLM, Options
from curator.workloads.tokens import padded
from curator.workloads.training import Training, trained
from tests.numerics.test_language_models import built, by_autograd, examples, kept_entries

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

# peft asks transformers for it
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

CPU = torch.device("cpu")
LLAMA = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
GPT2 = {"transformer.wpe": "cpu", "transformer.h.0": "cpu", "transformer.ln_f": "cpu"}
SPREAD = {
    "llama": {**LLAMA, "model.rotary_emb": "cpu", "model.layers.1": "disk"},
    # Tied: the embedding is the head.
    "gpt2": {**GPT2, "transformer.h.1": "disk", "transformer.wte": "disk", "lm_head": "disk"},
}


@pytest.fixture(scope="module", params=SPREAD)
def folder(request, tmp_path_factory):
    """A model of 64 columns, with a tokenizer of two words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    wide = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32} if request.param == "llama" else {"n_embd": 64}
    path = tmp_path_factory.mktemp(request.param)
    built(request.param, **wide).save_pretrained(path)
    words = Tokenizer(WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(path)
    return path


def loaded(folder, **options):
    workload = CausalLM(folder, Options(**options))
    return workload, base.load_model(workload, folder, CPU)


def spread(folder):
    return SPREAD["llama" if folder.name.startswith("llama") else "gpt2"]


# --- one model in several places ------------------------------------------------------------------------------


def test_a_model_that_is_kept_elsewhere_between_calls_gives_the_same_gradients(folder):
    """The same operations on the same numbers: bit for bit."""
    (there, apart), (here, whole) = loaded(folder, device_map=spread(folder)), loaded(folder)
    assert {p.device.type for p in apart.parameters()} == {"cpu", "meta"}
    rows = padded(examples(5), 0)
    for mask in ("coordinate", "neuron"):
        layers, _, loss_B, g_BK = kept_entries(there, apart, rows, mask)
        expected = kept_entries(here, whole, rows, mask)
        assert {layer.device for layer in layers} == {CPU}
        assert torch.equal(loss_B, expected[2])
        assert torch.equal(g_BK, expected[3])


def test_it_is_fitted_and_measured_like_another(folder):
    found = []
    for options in ({"device_map": spread(folder)}, {}):
        workload, model = loaded(folder, **options)
        trusted, arrivals = ([padded(examples(4, seed), 0)] for seed in (1, 2))
        spec = RecipeSpec(layers=workload.layers(model), dimension=120, measurement="loss")
        a = Attributor.fit(model, workload.losses, trusted, spec)
        found.append(a.measure(arrivals[0], a.exact_directions({"all": trusted})))
    assert torch.equal(found[0].unit_BK, found[1].unit_BK)
    assert torch.equal(found[0].exact_BS, found[1].exact_BS)


def test_a_layer_is_where_accelerate_computes_it_not_where_its_weight_waits():
    layer = nn.Linear(3, 2, device="meta")
    accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.AlignDevicesHook("cpu", offload=True, weights_map={}))
    assert device_of(layer) == CPU
    assert device_of(nn.Linear(3, 2)) == CPU
    assert device_of(nn.ReLU()) == CPU


def test_what_accelerate_moves_behind_the_hooks_back_is_on_the_layers_device():
    """The module is called with a tensor of another device than its own; both factors come up on its own."""
    layer = nn.Linear(3, 2, device="meta")
    accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.AlignDevicesHook("meta"))
    x = torch.ones(4, 5, 3)
    seen = []
    capture(
        layer, find_layers(layer), lambda: layer(x).sum(dim=(1, 2)), lambda _, a, d: seen.append((a.device, d.device))
    )
    assert seen == [(torch.device("meta"), torch.device("meta"))]


@pytest.mark.parametrize("norm", ["exact", "kept"])
@pytest.mark.parametrize("mask", ["coordinate", "neuron"])
def test_each_layer_is_read_on_its_own_device_and_the_sums_meet_on_one(mask, norm):
    """Of two devices that every machine has, one without numbers: what mixes their tensors is refused, as on GPUs."""
    model = nn.Sequential(nn.Linear(16, 8, device="meta"), nn.Linear(8, 4))
    layers = find_layers(model)
    where = {layer.name: layer.device for layer in layers}
    masks = {n: m.to(where[n]) for n, m in draw_masks(layers, RecipeSpec(mask=mask, dimension=20)).items()}
    roots = KroneckerRoots(
        {layer.name: torch.ones(layer.n_in, layer.n_in) for layer in layers},
        {layer.name: torch.ones(layer.n_out, layer.n_out) for layer in layers},
    ).to(where)
    D = {layer.name: torch.ones(2, 3, *layer.shape) for layer in layers}
    towards = ExactDirections(("a", "b", "c"), D).to(where)
    kept, exact, terms = KeptEntries(masks, norm), ExactScores(roots, towards), ExactTerms(towards)
    for layer in layers:
        a_BTI, d_BTO = (torch.ones(2, 5, n, device=layer.device) for n in (layer.n_in, layer.n_out))
        for reader in (kept, exact, terms):
            reader(layer, a_BTI, d_BTO)
    home = torch.ones(2, device="meta")
    assert (kept.g_BK(home).shape, kept.g_BK(home).device) == ((2, 20), home.device)
    assert kept.norm_B().shape == exact.norm_B().shape == (2,)
    assert exact.normalised_BS().shape == exact.influence_BS().shape == (2, 3)
    assert [part.device.type for part in terms.towards_unit_BTS.values()] == ["meta", "cpu"]
    assert [part.device.type for part in kept.kept_Bk.values()] == ["meta", "cpu"]
    with pytest.raises(RuntimeError, match="device"):  # the control: tensors of both are not mixed in silence
        torch.stack(list(exact.square_B.values()))


def test_without_accelerate_the_error_names_the_extra(folder, monkeypatch):
    monkeypatch.setattr(huggingface, "find_spec", lambda name: None if name == "accelerate" else name)
    with pytest.raises(ExtraMissing, match="accelerate") as raised:
        loaded(folder, device_map="auto")
    assert "gradient-curator[lm]" in raised.value.fix


# --- quantised weights ----------------------------------------------------------------------------------------


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes")


def dequantised(bnb, model):
    """The same model with the weights that the quantised ones stand for, in linear layers of torch."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
                if isinstance(child, bnb.nn.Linear4bit):
                    weight = bnb.functional.dequantize_4bit(child.weight.data, child.weight.quant_state)
                else:
                    weight = child.state.CB.float() * (child.state.SCB[:, None] / 127)
                plain = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                plain.weight = nn.Parameter(weight.float().view(child.out_features, child.in_features))
                if child.bias is not None:
                    plain.bias = nn.Parameter(child.bias.detach().float())
                setattr(parent, name, plain)
    return model


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize(
    ("quantization", "layer"),
    [
        ("4bit", "Linear4bit"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True}, "Linear4bit"),
        ("8bit", "Linear8bitLt"),
    ],
    ids=["nf4", "fp4-twice", "int8"],
)
def test_gradients_through_quantised_weights_are_those_of_the_weights_they_stand_for(
    folder, bitsandbytes, quantization, layer
):
    """Four bits: the product with the dequantised weight, in float32, so ten times the rounding derived elsewhere.

    Eight bits: inputs are rounded to int8 in every product too, which is no gradient's fault: the direction agrees.
    """
    workload, model = loaded(folder, quantization=quantization)
    rows = examples(4)
    layers, masks, _, g_BK = kept_entries(workload, model, padded(rows, 0))
    assert {type(found.module).__name__ for found in layers} == {layer}
    plain = dequantised(bitsandbytes, model)
    layers = find_layers(plain, workload.layers(plain))
    for b, row in enumerate(rows):
        expected = by_autograd(workload, plain, row, layers, masks)
        if layer == "Linear4bit":
            torch.testing.assert_close(g_BK[b], expected, rtol=0, atol=6e-5 * float(expected.abs().max()))
        else:
            assert torch.nn.functional.cosine_similarity(g_BK[b], expected, dim=0) > 0.97


def test_a_look_without_gradients_does_not_cut_later_ones_off(folder, bitsandbytes):
    """bitsandbytes packs weights at such a look, and then no gradient gets through them."""
    workload, model = loaded(folder, quantization="4bit")
    rows = padded(examples(3), 0)
    before = kept_entries(workload, model, rows)[3]
    with torch.no_grad():
        workload.losses(model, rows)
    torch.testing.assert_close(kept_entries(workload, model, rows)[3], before, rtol=0, atol=0)


@pytest.fixture
def adapter(folder, tmp_path, request):
    """What QLoRA trains: an adapter whose base is quantised while it is loaded."""
    dora = getattr(request, "param", False)
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        targets = ["q_proj", "up_proj"] if folder.name.startswith("llama") else ["c_attn"]
        config = peft.LoraConfig(
            r=2, target_modules=targets, fan_in_fan_out=targets == ["c_attn"], init_lora_weights=False, use_dora=dora
        )
        model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder), config)
        model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def _merged(model):
    """By hand: peft's own layers remember that their base was quantised."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "base_layer"):
                delta = child.scaling["default"] * child.lora_B["default"].weight @ child.lora_A["default"].weight
                child.base_layer.weight = nn.Parameter((child.base_layer.weight + delta).detach())
                setattr(parent, name, child.base_layer)
    return model.base_model.model


@pytest.mark.parametrize("weights", ["adapter", "full"])
def test_an_adapter_on_a_quantised_base_is_measured_by_its_own_or_the_bases_weights(adapter, bitsandbytes, weights):
    """The base's gradient beside the adapter is that of the merged weight: both get the same d and a."""
    workload, model = loaded(adapter, quantization="4bit", weights=weights)
    rows = examples(3)
    layers, masks, _, g_BK = kept_entries(workload, model, padded(rows, 0))
    own = {".lora_" in layer.name for layer in layers}
    assert own == {weights == "adapter"}
    plain = dequantised(bitsandbytes, model)
    if weights == "full":
        plain = _merged(plain)
        masks = {name.replace("base_model.model.", "").replace(".base_layer", ""): m for name, m in masks.items()}
    layers = find_layers(plain, tuple(masks))
    assert columns(masks).keys() == {layer.name for layer in layers}
    for b, row in enumerate(rows):
        expected = by_autograd(workload, plain, row, layers, masks)
        torch.testing.assert_close(g_BK[b], expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("adapter", [True], indirect=True)
def test_the_weights_beneath_dora_have_other_gradients_and_are_refused(adapter, bitsandbytes):
    with pytest.raises(CheckpointForeign, match='set weights = "adapter"'):
        loaded(adapter, quantization="4bit", weights="full")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_quantised_weights_only_an_adapter_is_trained(folder, adapter, bitsandbytes, dtype):
    """Norms and embeddings could be, and the proof would be about other weights than those that are measured."""
    for checkpoint in (folder, adapter):
        workload, model = loaded(checkpoint, quantization="4bit", dtype=dtype)
        with pytest.raises(NotTrainable, match="quantised"):
            trained(workload, model, [{"text": "a a"}], seed=0, device=CPU, how=Training())
    workload, model = loaded(adapter, quantization="4bit", dtype=dtype, weights="adapter")
    before = {name: weight.float().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    model = trained(workload, model, [{"text": "a b a"}] * 8, seed=0, device=CPU, how=Training(learning_rate=1e-2))
    after = dict(model.named_parameters())
    assert {".lora_" in name for name in before} == {True}
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_folder_that_says_it_is_quantised_is_loaded_so(folder, bitsandbytes, tmp_path):
    _, model = loaded(folder, quantization="4bit")
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
    again, other = loaded(tmp_path)
    assert other.is_quantized
    rows = padded(examples(3), 0)
    torch.testing.assert_close(again.losses(other, rows), again.losses(model, rows), rtol=1e-5, atol=1e-5)


def test_without_bitsandbytes_the_error_names_the_extra(folder, monkeypatch):
    monkeypatch.setattr(huggingface, "find_spec", lambda name: None if name == "bitsandbytes" else name)
    with pytest.raises(ExtraMissing, match="bitsandbytes") as raised:
        loaded(folder, quantization="8bit")
    assert "gradient-curator[quantised]" in raised.value.fix


def test_a_quantisation_that_nobody_knows_is_refused():
    with pytest.raises(BadWorkloadOption, match="'3bit'"):
        Options(quantization="3bit")


def test_weights_that_no_gradient_gets_through_are_refused():
    class Forward:
        is_trainable = False

    class Model:
        hf_quantizer = Forward()

    with pytest.raises(ValueError, match="Forward knows no backward pass"):
        huggingface._keep_backward(Model())


def test_a_quantisation_whose_library_is_missing_is_named(folder, tmp_path):
    import json
    import shutil

    shutil.copytree(folder, tmp_path / "gptq")
    config = tmp_path / "gptq" / "config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    assert "optimum" not in sys.modules
    with pytest.raises(CheckpointForeign, match=r"(?i)gptq|optimum"):
        loaded(tmp_path / "gptq")

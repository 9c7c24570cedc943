"""Adam's second moments from a training run to a stored vector: the optimiser's own metric, at the kept entries."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from curator.errors import (
    BadWorkloadOption,
    CheckpointMissing,
    ExactWithoutForm,
    NoSecondMoments,
    PickleRefused,
    SecondMomentsUnfit,
    UnknownCurvature,
)
from curator.influence.attribution import Attributor
from curator.influence.capture import find_layers
from curator.influence.recipe import RecipeSpec
from curator.stages import instrument
from curator.store.recipes import Checkpoint, Recipe
from curator.training.adam import FILE, save_second_moments
from curator.workloads import base
from curator.workloads.adam import second_moments
from curator.workloads.causal_lm import CausalLM, Options
from curator.workloads.tokens import padded
from tests.numerics.test_language_models import built, by_autograd, examples

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
BETA2, EPSILON, STEPS = 0.95, 1e-6, 3


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def run(request, tmp_path_factory):
    """A model after three steps of AdamW, saved with its tokenizer: the model, its optimiser, its folder."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    folder = tmp_path_factory.mktemp(request.param)
    model = built(request.param).train()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, BETA2), eps=EPSILON)
    workload = CausalLM(folder)
    for seed in range(STEPS):
        adam.zero_grad()
        workload.losses(model, padded(examples(4, seed), 0)).mean().backward()
        adam.step()
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    save_second_moments(model, adam, folder)
    return model, adam, folder


def loaded(folder):
    workload = CausalLM(folder, Options(second_moments=FILE))
    model = base.load_model(workload, folder, CPU)
    return workload, model, find_layers(model, workload.layers(model))


def by_name(model, adam):
    """The naive twin: v / (1 - beta2^t) of every parameter, as the optimiser holds it."""
    return {n: adam.state[p]["exp_avg_sq"] / (1 - BETA2**STEPS) for n, p in model.named_parameters() if p in adam.state}


def test_what_the_optimiser_knows_is_saved_by_name(run):
    model, adam, folder = run
    saved, expected = load_file(folder / FILE), by_name(model, adam)
    assert saved.keys() == expected.keys()
    for name, v in expected.items():
        torch.testing.assert_close(saved[name], v)


def test_stored_vectors_are_the_kept_entries_in_adams_metric(run):
    """float32: ten times the rounding derived for captured gradients."""
    trained, adam, folder = run
    workload, model, layers = loaded(folder)
    spec = RecipeSpec(layers=[layer.name for layer in layers], dimension=200, exact=False, curvature="adam")
    moments = base.second_moments_of(workload, layers)
    assert moments.epsilon == EPSILON
    a = Attributor.fit(model, workload.losses, [padded(examples(4, 7), 0)], spec, moments)
    rows = examples(5, 9)
    found = Attributor.from_state(model, workload.losses, spec, a.state()).measure(padded(rows, 0))
    v = by_name(trained, adam)
    for b, row in enumerate(rows):
        g_K = by_autograd(workload, model, row, layers, a.fitted.masks)
        roots = []
        for layer in layers:
            v_OI = v[f"{layer.name}.weight"]
            v_OI = v_OI.T if type(layer.module).__name__ == "Conv1D" else v_OI
            roots.append((v_OI[a.fitted.masks[layer.name].coordinates()].sqrt() + EPSILON).rsqrt())
        w_K = g_K * torch.cat(roots)
        torch.testing.assert_close(found.unit_BK[b], w_K / w_K.norm(), rtol=0, atol=6e-5)
        torch.testing.assert_close(found.whitened_norm_B[b], w_K.norm(), rtol=6e-5, atol=0)


def test_a_kept_whole_model_gives_adams_inner_product_of_two_gradients(run):
    """LESS (arXiv:2402.04333) takes <g_V, g_z / (sqrt(v) + epsilon)>; half on each side is the same number."""
    trained, adam, folder = run
    workload, model, layers = loaded(folder)
    spec = RecipeSpec(layers=[x.name for x in layers], dimension=sum(x.entries for x in layers), exact=False)
    a = Attributor.fit(model, workload.losses, [padded(examples(4, 7), 0)], spec, second_moments(folder / FILE, layers))
    rows = examples(2, 11)
    found = a.measure(padded(rows, 0))
    w_BK = found.unit_BK.double() * found.whitened_norm_B[:, None].double()
    v, expected = by_name(trained, adam), 0.0
    gradients = []
    for row in rows:
        model.requires_grad_(True)
        loss = workload.losses(model, padded([row], 0)).sum()
        gradients.append(torch.autograd.grad(loss, [layer.module.weight for layer in layers]))
    for layer, g, h in zip(layers, *gradients, strict=True):
        expected += float((g * h / (v[f"{layer.name}.weight"].sqrt() + EPSILON)).double().sum())
    assert float(w_BK[0] @ w_BK[1]) == pytest.approx(expected, rel=1e-3, abs=1e-5 * float(w_BK.norm(dim=1).prod()))


def test_wrappers_leave_no_trace_in_the_names(run, tmp_path):
    model, adam, folder = run

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = model

    save_second_moments(Wrapped(), adam, tmp_path)
    assert load_file(tmp_path / FILE).keys() == load_file(folder / FILE).keys()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW], ids=["no Adam", "before its first step"])
def test_an_optimiser_that_knows_nothing_is_refused(kind, tmp_path):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(NoSecondMoments, match=kind.__name__):
        save_second_moments(model, kind(model.parameters(), lr=0.1), tmp_path)
    assert not list(tmp_path.iterdir())


def changed(folder, tmp_path, change, metadata=None):
    tensors = load_file(folder / FILE)
    change(tensors)
    kept = {"format": "curator.second-moments/1", "epsilon": "1e-8"} if metadata is None else metadata
    save_file(tensors, tmp_path / FILE, metadata=kept)
    return tmp_path / FILE


def first(layers):
    return f"{layers[0].name}.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t, name: t.pop(name), "it has no .* 0 more"),
        (lambda t, name: t.update({name: t[name][:3].clone()}), "there and .* in the model"),
        (lambda t, name: t.clear(), "it begins with nothing"),
    ],
    ids=["a name is missing", "another shape", "empty"],
)
def test_moments_of_another_model_are_refused(run, tmp_path, change, told):
    layers = loaded(run[2])[2]
    file = changed(run[2], tmp_path, lambda tensors: change(tensors, first(layers)))
    with pytest.raises(SecondMomentsUnfit, match=told):
        second_moments(file, layers)


def test_numbers_that_are_no_squares_are_refused(run, tmp_path):
    layers = loaded(run[2])[2]
    file = changed(run[2], tmp_path, lambda tensors: tensors[first(layers)].neg_())
    with pytest.raises(SecondMomentsUnfit, match="no squares"):
        second_moments(file, layers).v_OI(layers[0].name)


def test_another_safetensors_file_and_a_pickle_are_refused(run, tmp_path):
    layers = loaded(run[2])[2]
    with pytest.raises(SecondMomentsUnfit, match="does not name the format"):
        second_moments(changed(run[2], tmp_path, lambda tensors: None, {}), layers)
    torch.save({}, tmp_path / "optimizer.pt")
    with pytest.raises(PickleRefused):
        second_moments(tmp_path / "optimizer.pt", layers)
    with pytest.raises(CheckpointMissing):
        second_moments(tmp_path / "nothing.safetensors", layers)


def test_they_lie_in_the_checkpoints_folder_whose_content_they_are_part_of():
    for name in ("/elsewhere/v.safetensors", "../v.safetensors"):
        with pytest.raises(BadWorkloadOption, match="no file name"):
            Options(second_moments=name)


def test_the_recipe_of_an_instrument_says_so_and_exact_scores_are_refused(run):
    workload, model, _ = loaded(run[2])
    asked = {"exact": False, "dimension": 64}
    recipe = Recipe(0, Checkpoint(0, "c", "", b"", False), {"gradients": asked}, 0, 1.0, "fitting", in_use=False)
    spec = instrument._spec(recipe, workload, model)
    assert (spec.curvature, spec.layers) == ("adam", workload.layers(model))
    with pytest.raises(ExactWithoutForm):
        instrument._spec(replace(recipe, spec={"gradients": {**asked, "exact": True}}), workload, model)
    with pytest.raises(UnknownCurvature):  # not in silence without the moments
        Attributor.fit(model, workload.losses, [padded(examples(2), 0)], spec)


def test_the_trainers_callback_saves_them_before_it_registers(tmp_path, monkeypatch):
    from curator.training import huggingface

    seen = []

    class Client:
        def __init__(self, project):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def add_checkpoint(self, name, folder, use):
            seen.append((name, (folder / FILE).exists()))

    monkeypatch.setattr(huggingface, "Client", Client)
    model = torch.nn.Linear(3, 1)
    data = [{"x": torch.ones(3), "labels": torch.ones(1)}] * 4

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = model

        def forward(self, x, labels):
            return {"loss": (self.linear(x) - labels).square().mean()}

    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=2, report_to=[], disable_tqdm=True, use_cpu=True, logging_strategy="no"
    )
    callback = huggingface.CuratorCallback(tmp_path, run="r", losses=False, second_moments=True)
    transformers.Trainer(Model(), arguments, train_dataset=data, callbacks=[callback]).train()
    assert seen == [("r-2", True)]
    assert load_file(tmp_path / "checkpoint-2" / FILE).keys() == {"linear.weight", "linear.bias"}
    assert json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2

"""The default training of a language model: what is trained, in which precision, and against what it is measured."""

from dataclasses import replace

import pytest
import torch

from curator.errors import NotTrainable
from curator.workloads import base, training
from curator.workloads.causal_lm import CausalLM, Options
from tests.unit.test_workloads_lm import CPU, adapter, folder  # noqa: F401 - fixtures

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

TEXTS = [{"text": "a b c d"}, {"text": "a b c"}, {"text": "b c d a"}, {"prompt": "a ", "completion": "b c d"}] * 4
PAIRS = [{"prompt": "a ", "chosen": "b c", "rejected": "d d"}, {"prompt": "b ", "chosen": "c", "rejected": "a a"}] * 8


def run(workload, checkpoint, records, **how):
    """(the state before, the model after, the validation loss before and after) of a training from the checkpoint."""
    model = base.load_model(workload, checkpoint, CPU)
    before = {name: weight.float().clone() for name, weight in model.state_dict().items()}
    chosen = replace(training.training_of(workload), **how)
    untrained = training.trained(workload, model, [], seed=0, device=CPU, how=chosen)
    first = training.outcome(workload, untrained, records, CPU, chosen.batch).loss_N.mean()
    model = base.load_model(workload, checkpoint, CPU)
    model = training.trained(workload, model, records, seed=0, device=CPU, how=chosen)
    return before, model, first, training.outcome(workload, model, records, CPU, chosen.batch).loss_N.mean()


def changed(before, model):
    return {name for name, weight in model.state_dict().items() if not torch.equal(before[name], weight.float())}


def test_every_weight_is_trained_and_the_loss_falls(folder):  # noqa: F811
    before, model, first, last = run(CausalLM(folder), folder, TEXTS, epochs=3, learning_rate=1e-2)
    assert last < first - 0.05
    assert changed(before, model) == set(before)


def test_of_an_adapter_its_own_matrices_are_trained_and_merged_all_of_them(folder, adapter):  # noqa: F811
    how = {"epochs": 3, "learning_rate": 1e-2}
    before, model, first, last = run(CausalLM(folder, Options(weights="adapter")), adapter, TEXTS, **how)
    assert last < first
    assert {"lora_" in name for name in changed(before, model)} == {True}
    before, model, first, last = run(CausalLM(folder), adapter, TEXTS, **how)
    assert last < first
    assert changed(before, model) == set(before)


def test_half_precision_is_trained_in_float32(folder):  # noqa: F811
    """A step of fine-tuning is smaller than half of what bfloat16 can tell apart: all of it would be rounded away."""
    half = CausalLM(folder, Options(dtype="bfloat16"))
    before, model, first, last = run(half, folder, TEXTS, epochs=1)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert len(changed(before, model)) == len(before)
    assert last < first
    rounded = base.load_model(half, folder, CPU)
    state = {name: weight.float().clone() for name, weight in rounded.state_dict().items()}
    training.descend(half, rounded, TEXTS, CPU, training.training_of(half))
    assert len(changed(state, rounded)) < len(state)


@pytest.mark.parametrize("stays", [torch.nn.Linear(2, 1).requires_grad_(False), torch.nn.Linear(2, 1, device="meta")])
def test_a_model_of_which_a_part_would_stay_as_it_is_is_refused_before_any_run(folder, stays):  # noqa: F811
    """Even of no records: the first run of a verification is the untrained checkpoint's."""
    with pytest.raises(NotTrainable):
        training.trained(CausalLM(folder), stays, [], seed=0, device=CPU, how=training.Training())


def test_preferences_are_measured_against_the_checkpoint_they_were_trained_from(folder):  # noqa: F811
    """A model beside itself has the loss log 2, whatever it has learned."""
    workload = CausalLM(folder, Options(objective="dpo"))
    _, _, first, last = run(workload, folder, PAIRS, epochs=4, learning_rate=1e-2)
    assert first == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-6)
    assert last < first - 0.05
    fresh = base.load_model(workload, folder, CPU)
    assert workload.losses(fresh, workload.collate(PAIRS)).tolist() == pytest.approx([0.6931472] * 16, abs=1e-5)


def test_the_experts_of_a_mixture_are_trained(folder, tmp_path):  # noqa: F811
    config = transformers.MixtralConfig(
        **{"vocab_size": 11, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 2},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    before, model, first, last = run(CausalLM(tmp_path), tmp_path, TEXTS, epochs=3, learning_rate=1e-2)
    assert last < first
    experts = {name for name in before if ".experts." in name}
    assert len(experts) == 4
    assert experts <= changed(before, model)

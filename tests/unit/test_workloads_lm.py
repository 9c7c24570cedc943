"""Causal language models: which tokens count, loss per example, padding, and a tiny model measured end to end."""

import pytest
import torch

from curator.errors import BadWorkloadOption, CheckpointForeign, NotLoaded, RecordUnusable
from curator.influence.attribution import Attributor, RecipeSpec, Signal
from curator.workloads import base, registry
from curator.workloads.causal_lm import IGNORED, CausalLM, chat_segments, conversation, plain_segments

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "b", "c", "d", "user", "assistant", ":"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A GPT-2 of two layers and a tokenizer of eleven words, saved as safetensors."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    path = tmp_path_factory.mktemp("gpt")
    words = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=len(WORDS), n_positions=32, n_embd=8, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
        )
        transformers.GPT2LMHeadModel(config).save_pretrained(path)
    return path


@pytest.fixture
def workload(folder):
    found = registry.build("causal-lm", folder, {"max_tokens": 16})
    found.model = base.load_model(found, folder, CPU)
    return found


def supervised(workload, record):
    ids, targets = workload.tokens(record)
    assert all(t in (i, IGNORED) for i, t in zip(ids, targets, strict=True))
    return [WORDS[i] for i in ids], [WORDS[t] for t in targets if t != IGNORED]


def test_every_token_of_a_text_and_only_the_completion_of_a_prompt_count(workload):
    assert supervised(workload, {"text": "a b"}) == (["<s>", "a", "b", "</s>"], ["a", "b", "</s>"])
    whole, counted = supervised(workload, {"prompt": "a b", "completion": "c d"})
    assert (whole, counted) == (["<s>", "a", "b", "c", "d", "</s>"], ["c", "d", "</s>"])
    whole, counted = supervised(workload, {"instruction": "a", "input": "b", "output": "c"})
    assert (whole, counted) == (["<s>", "a", "b", "c", "</s>"], ["c", "</s>"])


@pytest.mark.parametrize(
    "record",
    [
        {
            "messages": [
                {"role": r, "content": c}
                for r, c in [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
            ]
        },
        {
            "conversations": [
                {"from": f, "value": v} for f, v in [("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")]
            ]
        },
    ],
)
def test_every_assistant_turn_counts_in_the_checkpoints_own_template(workload, record):
    whole, counted = supervised(workload, record)
    assert " ".join(whole) == "user : a </s> assistant : b </s> user : c </s> assistant : d </s>"
    assert counted == ["b", "</s>", "d", "</s>"]


def test_without_a_template_turns_are_written_plainly():
    class NoTemplate:
        chat_template = None

    messages = conversation({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    assert chat_segments(messages, NoTemplate()) == [("user: a\n", False), ("assistant: b\n", True)]


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"prompt": "a"},
        {"messages": "hello"},
        {"messages": [{"role": "user"}]},
        {"text": ""},
        {"prompt": "a", "completion": ""},
        {"messages": [{"role": "user", "content": "a"}]},
    ],
)
def test_records_without_anything_to_learn_are_refused_with_a_reason(workload, record):
    assert workload.validate(record)
    with pytest.raises(RecordUnusable):
        base.batch_of(workload, [record], CPU)


def test_a_text_has_no_turns():
    assert conversation({"text": "a"}) is None
    assert plain_segments({"messages": []}) is None


RECORDS = [
    {"text": "a b c d"},
    {"prompt": "a", "completion": "b"},
    {"text": "d c"},
    {"prompt": "a b c a b c a b c a b c a b c a b c", "completion": "d"},
]


def test_the_loss_is_the_mean_or_the_sum_over_supervised_tokens(workload, folder):
    model = workload.model
    batch = base.batch_of(workload, RECORDS[:3], CPU)
    mean_B = base.losses_of(workload)(model, batch)
    summed = CausalLM(16, "sum")
    summed.load(folder, CPU)
    sum_B = summed.losses(model, batch)
    torch.testing.assert_close(sum_B / mean_B, torch.tensor([5.0, 2.0, 3.0]))
    alone = [float(workload.losses(model, base.batch_of(workload, [r], CPU))[0].detach()) for r in RECORDS[:3]]
    assert mean_B.tolist() == pytest.approx(alone, rel=1e-5)
    with pytest.raises(BadWorkloadOption, match="median"):
        CausalLM(16, "median")


@pytest.mark.parametrize("mask", ["neuron", "coordinate"])
def test_a_completion_that_was_cut_away_has_no_signal_and_others_do_not_feel_padding(workload, mask):
    model = workload.model
    layers = base.layers_of(workload, model)
    assert "lm_head" not in layers
    assert len(layers) == 8  # Conv1D: c_attn, c_proj, c_fc, c_proj of two blocks
    spec = RecipeSpec(layers=layers, mask=mask, dimension=96)
    trusted = [base.batch_of(workload, RECORDS[:3], CPU)]
    a = Attributor.fit(model, base.losses_of(workload), trusted, spec)
    towards = a.exact_directions({"all": trusted})
    found = a.measure(base.batch_of(workload, RECORDS, CPU), towards)
    assert found.state_B.tolist() == [Signal.OK, Signal.OK, Signal.OK, Signal.NO_SIGNAL]
    for b, record in enumerate(RECORDS[:3]):
        alone = a.measure(base.batch_of(workload, [record], CPU), towards)
        # Attention over a padded row sums its terms in another order; unit vectors of float32 agree to 1e-4.
        torch.testing.assert_close(alone.unit_BK[0], found.unit_BK[b], rtol=0, atol=1e-4)
        torch.testing.assert_close(alone.exact_BS[0], found.exact_BS[b], rtol=0, atol=1e-4)


def test_an_empty_batch_and_a_missing_checkpoint(workload):
    assert base.batch_of(workload, [], CPU).id_BT.shape == (0, 1)
    with pytest.raises(NotLoaded):
        CausalLM().collate([{"text": "a"}])


def test_a_folder_of_something_else_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "nobody-knows"}')
    with pytest.raises(CheckpointForeign):
        base.load_model(CausalLM(), tmp_path, CPU)

"""Causal language models: which tokens count, loss per example, padding, and a tiny model measured end to end."""

import shutil

import pytest
import torch

from curator.errors import (
    AdapterBaseMissing,
    BadWorkloadOption,
    CheckpointForeign,
    NotLoaded,
    RecordUnusable,
    TemplateDiffers,
)
from curator.influence.attribution import Attributor, RecipeSpec, Signal
from curator.workloads import base, checkpoints, registry
from curator.workloads.causal_lm import CausalLM, Options
from curator.workloads.tokens import IGNORED, tokenized
from curator.workloads.turns import chat_segments, conversation, last_only, plain_segments, preference

transformers = pytest.importorskip("transformers")

# peft asks transformers for it
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

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
    from tokenizers.processors import TemplateProcessing

    path = tmp_path_factory.mktemp("gpt")
    words = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
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
    found = workload.tokens(record)
    assert all(t in (i, IGNORED) for i, t in zip(found.ids, found.targets, strict=True))
    return [WORDS[i] for i in found.ids], [WORDS[t] for t in found.targets if t != IGNORED]


@pytest.mark.parametrize(
    "record",
    [
        {"text": "a b c"},
        {"prompt": "a b ", "completion": "c d"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ],
)
def test_every_position_that_the_model_sees_has_its_text(workload, record):
    [batch] = [base.batch_of(workload, [record], CPU)]
    names = base.positions_of(workload, record)
    assert len(names) == batch.id_BT.shape[1]
    assert names == [WORDS[i] for i in batch.id_BT[0].tolist()]


def test_every_token_of_a_text_and_only_the_completion_of_a_prompt_count(workload):
    assert supervised(workload, {"text": "a b"}) == (["<s>", "a", "b", "</s>"], ["a", "b", "</s>"])
    whole, counted = supervised(workload, {"prompt": "a b ", "completion": "c d"})
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


@pytest.mark.parametrize("said", ["b", "assistant", ": b"])
def test_a_conversation_may_begin_with_the_assistant(workload, said):
    """transformers renders no empty conversation, so there is no prompt to compare the first turn with."""
    turns = [("assistant", said), ("user", "c"), ("assistant", "d")]
    whole, counted = supervised(workload, {"messages": [{"role": r, "content": c} for r, c in turns]})
    assert " ".join(whole) == f"assistant : {said} </s> user : c </s> assistant : d </s>"
    assert counted == [*said.split(), "</s>", "d", "</s>"]


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
    {"prompt": "a ", "completion": "b"},
    {"text": "d c"},
    {"prompt": "a b c a b c a b c a b c a b c a b c ", "completion": "d"},
]


def test_the_loss_is_the_mean_or_the_sum_over_supervised_tokens(workload, folder):
    model = workload.model
    batch = base.batch_of(workload, RECORDS[:3], CPU)
    mean_B = base.losses_of(workload)(model, batch)
    summed = CausalLM(folder, Options(max_tokens=16, reduction="sum"))
    summed.load(folder, CPU)
    sum_B = summed.losses(model, batch)
    torch.testing.assert_close(sum_B / mean_B, torch.tensor([5.0, 2.0, 3.0]))
    alone = [float(workload.losses(model, base.batch_of(workload, [r], CPU))[0].detach()) for r in RECORDS[:3]]
    assert mean_B.tolist() == pytest.approx(alone, rel=1e-5)
    with pytest.raises(BadWorkloadOption, match="median"):
        Options(reduction="median")


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


def test_what_is_too_long_is_cut_and_counted_or_refused(workload, folder):
    fits, over = {"text": "a b"}, {"text": "a " * 20}  # with <s> and </s>: 4 and 22 tokens, of 16
    assert [base.n_cut_of(workload, record) for record in (fits, over)] == [0, 6]
    assert base.reason_against(workload, over) is None
    strict = CausalLM(folder, Options(max_tokens=16, overlong="refuse"))
    assert base.reason_against(strict, over) is None  # nothing can be counted before a tokenizer is there
    strict.load(folder, CPU)
    assert base.reason_against(strict, fits) is None
    assert base.reason_against(strict, over) == 'it is 6 tokens longer than max_tokens, 16, and overlong is "refuse"'


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


# --- what a trainer does ----------------------------------------------------------------------------------------


def test_a_token_that_runs_into_the_completion_is_supervised(workload):
    """'c' and 'd' are two tokens apart from each other and one unknown word together."""
    found = tokenized([("a c", False), ("d", True)], workload.tokenizer, special=True, limit=16)
    assert [WORDS[i] for i in found.ids] == ["<s>", "a", "<unk>"]
    assert found.targets[:2] == [IGNORED, IGNORED]
    assert found.targets[2] != IGNORED


def test_what_was_cut_is_counted(workload):
    found = tokenized([("a b c d", True)], workload.tokenizer, special=True, limit=3)
    assert ([WORDS[i] for i in found.ids], found.cut) == (["<s>", "a", "b"], 2)


def test_the_loss_may_be_on_everything(workload, folder):
    whole = CausalLM(folder, Options(loss_on="all"))
    whole.load(folder, CPU)
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert supervised(whole, record)[1] == supervised(whole, record)[0]
    assert supervised(workload, record)[1] == ["b", "</s>"]
    assert whole.validate({"prompt": "a", "completion": ""}) is None


def test_a_tokenizer_without_offsets_is_given_the_pieces(workload):
    class Slow:
        is_fast = False

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [len(word) for word in text.split()]}

    found = tokenized([("a bb", False), ("ccc", True)], Slow(), special=True, limit=16)
    assert (found.ids, found.targets) == ([1, 2, 3], [IGNORED, IGNORED, 3])


def test_another_template_than_the_checkpoints_is_refused_with_both_digests(folder, tmp_path):
    (tmp_path / "mine.jinja").write_text(TEMPLATE.replace(":", ">"))
    (tmp_path / "same.jinja").write_text(TEMPLATE)
    with pytest.raises(TemplateDiffers, match=r"[0-9a-f]{12}.*[0-9a-f]{12}"):
        CausalLM(tmp_path, Options(chat_template="mine.jinja")).load(folder, CPU)
    CausalLM(tmp_path, Options(chat_template="same.jinja")).load(folder, CPU)


@pytest.mark.parametrize(
    ("record", "answers"),
    [
        ({"prompt": "a ", "chosen": "b", "rejected": "c"}, (["b"], ["c"])),
        ({"chosen": "b", "rejected": "c"}, (["b"], ["c"])),
        (
            {
                "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}],
            },
            (["b", "</s>"], ["c", "</s>"]),
        ),
        (
            {
                "prompt": [{"role": "user", "content": "a"}],
                "chosen": [{"role": "assistant", "content": "b"}],
                "rejected": [{"role": "assistant", "content": "c"}],
            },
            (["b", "</s>"], ["c", "</s>"]),
        ),
    ],
)
def test_a_preference_is_two_answers_to_one_prompt(folder, record, answers):
    workload = CausalLM(folder, Options(objective="dpo"))
    workload.load(folder, CPU)
    assert workload.validate(record) is None
    found = [supervised(workload, part)[1] for part in preference(record)]
    assert (
        tuple(f if f[-1] != "</s>" or a[-1] == "</s>" else f[:-1] for f, a in zip(found, answers, strict=True))
        == answers
    )
    assert workload.collate([record, record]).id_BT.shape[0] == 4


def test_a_pair_needs_its_objective_and_the_objective_its_pairs(workload, folder):
    assert 'objective = "dpo"' in workload.validate({"chosen": "a", "rejected": "b"})
    other = CausalLM(folder, Options(objective="dpo"))
    other.load(folder, CPU)
    assert "no preference pair" in other.validate({"text": "a"})


def test_only_the_last_answer_of_a_preference_counts():
    assert last_only([("a", True), ("b", False), ("c", True)]) == [("a", False), ("b", False), ("c", True)]
    assert last_only([("a", False)]) == [("a", False)]


# --- adapters ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=[{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def adapter(folder, tmp_path, request):
    """An adapter of the model, far from its start, saved as PEFT does."""
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = peft.LoraConfig(
            r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False, **request.param
        )
        peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder), config).save_pretrained(
            tmp_path / "adapter"
        )
    return tmp_path / "adapter"


def test_an_adapters_gradients_are_of_its_matrices_or_of_the_merged_weights(folder, adapter):
    full, own = (CausalLM(folder, Options(weights=weights)) for weights in ("full", "adapter"))
    merged, adapted = (base.load_model(workload, adapter, CPU) for workload in (full, own))
    assert len(full.layers(merged)) == 8
    assert {name.rsplit(".", 2)[1] for name in own.layers(adapted)} == {"lora_A", "lora_B"}
    assert len(own.layers(adapted)) == 4
    batch = full.collate(RECORDS)
    torch.testing.assert_close(full.losses(merged, batch), own.losses(adapted, batch), rtol=1e-4, atol=1e-5)
    plain = base.load_model(full, folder, CPU)
    assert (full.losses(plain, batch) - full.losses(merged, batch)).abs().max() > 1e-3


def test_an_adapter_is_its_base_too(folder, adapter, tmp_path):
    before = checkpoints.digest(adapter)
    copy = tmp_path / "base"
    shutil.copytree(folder, copy)
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace(str(folder), str(copy)))
    other = checkpoints.digest(adapter)
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert len({before, other, checkpoints.digest(adapter)}) == 3


def test_an_adapter_without_its_base_is_refused(folder, adapter):
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace(str(folder), "someone/on-a-hub"))
    with pytest.raises(AdapterBaseMissing, match="'someone/on-a-hub'"):
        base.load_model(CausalLM(), adapter, CPU)
    config.write_text(config.read_text().replace("someone/on-a-hub", ""))
    with pytest.raises(AdapterBaseMissing, match="that it does not name"):
        base.load_model(CausalLM(), adapter, CPU)


def test_a_whole_model_has_no_adapter_to_measure(workload, folder):
    with pytest.raises(BadWorkloadOption, match="no LoRA"):
        CausalLM(folder, Options(weights="adapter")).layers(workload.model)


def test_bfloat16_weights_give_float32_vectors_near_those_of_float32(workload, folder):
    half = CausalLM(folder, Options(dtype="bfloat16"))
    model = base.load_model(half, folder, CPU)
    assert next(model.parameters()).dtype == torch.bfloat16
    spec = RecipeSpec(layers=half.layers(model), dimension=96, exact=False)
    found = [
        Attributor.fit(m, base.losses_of(w), [w.collate(RECORDS[:3])], spec).measure(w.collate(RECORDS[:3]))
        for w, m in ((half, model), (workload, workload.model))
    ]
    assert found[0].unit_BK.dtype == torch.float32
    torch.testing.assert_close(found[0].loss_B, found[1].loss_B, rtol=2e-2, atol=0)  # 8 bits of mantissa
    assert torch.nn.functional.cosine_similarity(found[0].unit_BK, found[1].unit_BK).min() > 0.9


def test_an_option_that_is_not_there_is_named_with_those_that_are(folder):
    with pytest.raises(BadWorkloadOption, match=r"no weihgts; there are max_tokens, .*weights"):
        registry.build("causal-lm", folder, {"weihgts": "adapter"})

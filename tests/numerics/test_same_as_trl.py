"""The tokens, the loss mask and the loss of an example are those of TRL's SFTTrainer, where that is installed."""

import pytest
import torch

from curator.workloads.causal_lm import CausalLM, Options

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainer's own making

# Marks what the assistant says, as TRL asks of a template for `assistant_only_loss`.
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXTS = ["A wise man learns more from his enemies than a fool from his friends.", "naïve café, 漢字 and \U0001f600!"]
ASKED = [
    {"prompt": "Question: what is two and two?\nAnswer:", "completion": " four, I think."},
    {"prompt": "No space at the seam", "completion": "stress is one word with it"},
]
SAID = [
    [("user", "How are you?"), ("assistant", "Well enough."), ("user", "Good."), ("assistant", "Is it? Yes.")],
    [("system", "Be brief."), ("user", "Why?"), ("assistant", "Because.")],
]
CHATS = [{"messages": [{"role": role, "content": content} for role, content in turns]} for turns in SAID]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama with a byte-level BPE of 400 tokens that puts <s> before a text, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    path = tmp_path_factory.mktemp("llama")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    bpe.train_from_iterator(
        [*TEXTS, *(part for record in ASKED for part in record.values()), TEMPLATE] * 3,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=400, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
        )
        transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("records", "options", "config"),
    [
        ([{"text": text} for text in TEXTS], {}, {}),
        (ASKED, {}, {}),
        (ASKED, {"loss_on": "all"}, {"completion_only_loss": False}),
        (CHATS, {}, {"assistant_only_loss": True}),
        (CHATS, {"loss_on": "all"}, {}),
        (ASKED, {"max_tokens": 24}, {"max_length": 24}),
    ],
    ids=["text", "completion", "prompt too", "assistant", "chat, all", "cut"],
)
def test_one_record_is_to_curator_what_it_is_to_trl(folder, tmp_path, records, options, config):
    workload = CausalLM(folder, Options(**options))
    model = workload.load(folder, torch.device("cpu"))
    # The trainer's model lives apart: it is given to an accelerator.
    trainer = trl.SFTTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        train_dataset=datasets.Dataset.from_list(records),
        args=trl.SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, **config),
    )
    for record, prepared in zip(records, trainer.train_dataset, strict=True):
        batch = trainer.data_collator([prepared])
        found = workload.tokens(record)
        assert found.ids == batch["input_ids"][0].tolist()
        assert found.targets[1:] == batch["labels"][0].tolist()[1:]  # the first token is predicted by nothing
        theirs = trainer.compute_loss(trainer.model.eval(), dict(batch))
        ours = workload.losses(model, workload.collate([record]))
        torch.testing.assert_close(ours[0].detach(), theirs.detach(), rtol=1e-5, atol=0)

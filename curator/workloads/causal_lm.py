"""Causal language models from a local Hugging Face folder.

Records: ``{"text"}`` (every token is supervised), ``{"prompt", "completion"}`` and ``{"messages"}`` (completions and
assistant turns are), ``{"instruction", "input", "output"}`` and ``{"conversations"}`` as their writers mean them.
Whether an example's loss is the sum or the mean over its supervised tokens is a choice, part of the recipe. A row with
no supervised token left has loss 0 and no gradient: it becomes `no signal`, never a score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curator.errors import BadWorkloadOption, NotLoaded, RecordUnusable
from curator.influence.capture import find_layers
from curator.workloads.base import Record
from curator.workloads.huggingface import pretrained
from curator.workloads.training import Training

KIND = "causal-lm"
IGNORED = -100
REDUCTIONS = ("mean", "sum")

Segment = tuple[str, bool]
"""A piece of text, and whether its tokens are supervised."""


@dataclass(frozen=True)
class TokenBatch:
    """Right-padded token ids, the mask of real ones, and the target of each position (IGNORED where none)."""

    id_BT: Tensor
    real_BT: Tensor
    target_BT: Tensor

    def to(self, device: torch.device) -> TokenBatch:
        """The same batch on the device."""
        return TokenBatch(self.id_BT.to(device), self.real_BT.to(device), self.target_BT.to(device))


# --- records ----------------------------------------------------------------------------------------------


def conversation(record: Record) -> list[Mapping[str, str]] | None:
    """The messages of a chat record (OpenAI, or sharegpt), None of any other."""
    if "messages" in record:
        return [{"role": str(m["role"]), "content": str(m["content"])} for m in record["messages"]]
    if "conversations" in record:
        roles = {"human": "user", "gpt": "assistant"}
        turns = record["conversations"]
        return [{"role": roles.get(t["from"], t["from"]), "content": str(t["value"])} for t in turns]
    return None


def plain_segments(record: Record) -> list[Segment] | None:
    """The segments of a record without turns, None of one with."""
    if "prompt" in record and "completion" in record:
        return [(str(record["prompt"]), False), (str(record["completion"]), True)]
    if "instruction" in record and "output" in record:
        asked = "\n\n".join(str(record[key]) for key in ("instruction", "input") if record.get(key))
        return [(asked + "\n\n", False), (str(record["output"]), True)]
    return [(str(record["text"]), True)] if "text" in record else None


def chat_segments(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> list[Segment]:
    """Assistant turns supervised, everything around them not, in the checkpoint's own chat template.

    A template is a program: the only safe way to know what a turn adds is to render the conversation with and without
    it. Where a template rewrites earlier turns, the rendered prefixes differ and only the last turn is supervised.
    """
    if not getattr(tokenizer, "chat_template", None):
        return [(f"{m['role']}: {m['content']}\n", m["role"] == "assistant") for m in messages]

    def rendered(upto: int, ask: bool) -> str:
        text = tokenizer.apply_chat_template(list(messages[:upto]), tokenize=False, add_generation_prompt=ask)
        return str(text)

    cuts = [(rendered(i, True), rendered(i + 1, False)) for i, m in enumerate(messages) if m["role"] == "assistant"]
    whole = rendered(len(messages), False)
    stable = [(before, after) for before, after in cuts if after.startswith(before) and whole.startswith(after)]
    segments: list[Segment] = []
    done = 0
    for before, after in stable:
        segments += [(whole[done : len(before)], False), (whole[len(before) : len(after)], True)]
        done = len(after)
    return [*segments, (whole[done:], False)]


# --- the workload -----------------------------------------------------------------------------------------


class CausalLM:
    """The ``causal-lm`` workload. The tokenizer comes from the checkpoint, so ``load`` comes first."""

    def __init__(self, max_tokens: int = 512, reduction: Literal["mean", "sum"] = "mean") -> None:
        if reduction not in REDUCTIONS:
            raise BadWorkloadOption(kind=KIND, reason=f"reduction is {reduction!r}, not one of {', '.join(REDUCTIONS)}")
        self.max_tokens, self.reduction = max_tokens, reduction
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The loaded checkpoint's tokenizer."""
        if self._tokenizer is None:
            raise NotLoaded(kind=KIND)
        return self._tokenizer

    def load(self, checkpoint: Path, device: torch.device) -> nn.Module:
        """The model of a folder."""
        model, self._tokenizer = pretrained(checkpoint, "AutoModelForCausalLM", device)
        loaded: nn.Module = model
        return loaded

    def layers(self, model: nn.Module) -> tuple[str, ...]:
        """Every linear layer but the output head: its vocabulary-wide factor dwarfs all others and is often tied."""
        head = getattr(model, "get_output_embeddings", lambda: None)()
        return tuple(layer.name for layer in find_layers(model) if layer.module is not head)

    def validate(self, record: Record) -> str | None:
        """One of the known shapes, with text in it."""
        try:
            messages, plain = conversation(record), plain_segments(record)
        except (KeyError, TypeError, AttributeError):
            return "its messages are not a list of {role, content}"
        if messages is None and plain is None:
            return "it has none of text, prompt + completion, messages, instruction + output, conversations"
        supervised = [m["content"] for m in messages or () if m["role"] == "assistant"]
        supervised += [text for text, counts in plain or () if counts]
        return None if any(supervised) else "nothing in it is to be learned: its completion is empty"

    def tokens(self, record: Record) -> tuple[list[int], list[int]]:
        """Token ids and targets (IGNORED where a token is not supervised), cut to ``max_tokens``."""
        if reason := self.validate(record):
            raise RecordUnusable(kind=KIND, reason=reason)
        messages, plain = conversation(record), plain_segments(record)
        segments = chat_segments(messages, self.tokenizer) if messages is not None else plain or []
        ids, targets = self._start(messages is not None)
        for text, counts in segments:
            piece = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
            ids += piece
            targets += piece if counts else [IGNORED] * len(piece)
        if messages is None and (end := self.tokenizer.eos_token_id) is not None:
            ids, targets = [*ids, end], [*targets, end]
        return ids[: self.max_tokens], targets[: self.max_tokens]

    def _start(self, chat: bool) -> tuple[list[int], list[int]]:
        """The beginning-of-text token; a chat template writes its own."""
        begin = self.tokenizer.bos_token_id
        return ([], []) if chat or begin is None else ([begin], [IGNORED])

    def collate(self, records: Sequence[Record]) -> TokenBatch:
        """A batch of B records, padded on the right to the longest."""
        rows = [self.tokens(record) for record in records]
        width = max((len(ids) for ids, _ in rows), default=1)
        pad = self.tokenizer.pad_token_id or 0
        id_BT = [ids + [pad] * (width - len(ids)) for ids, _ in rows]
        real_BT = [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]
        target_BT = [targets + [IGNORED] * (width - len(targets)) for _, targets in rows]
        return TokenBatch(*(_longs(rows, width) for rows in (id_BT, real_BT, target_BT)))

    def losses(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """Cross-entropy of the next token over supervised targets, (B,): their mean or their sum."""
        logits = model(input_ids=batch.id_BT, attention_mask=batch.real_BT, use_cache=False).logits
        target_BT = batch.target_BT[:, 1:]
        loss_BT = F.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), target_BT, ignore_index=IGNORED, reduction="none"
        )
        sum_B = loss_BT.sum(dim=1)
        counted_B = (target_BT != IGNORED).sum(dim=1).clamp_min(1)
        return sum_B if self.reduction == "sum" else sum_B / counted_B

    def training(self) -> Training:
        """A pass of fine-tuning."""
        return Training(epochs=1, batch=8, learning_rate=2e-5)

    def n_tokens(self, record: Record) -> int:
        """Tokens of the record after cutting."""
        return len(self.tokens(record)[0])


def _longs(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.long).reshape(len(rows), width)


def build(*, project: Path, max_tokens: int = 512, reduction: Literal["mean", "sum"] = "mean") -> CausalLM:
    """The workload; longer examples are cut to ``max_tokens``."""
    return CausalLM(max_tokens, reduction)

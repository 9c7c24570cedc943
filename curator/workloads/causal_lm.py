"""Causal language models from a local Hugging Face folder, with a PEFT adapter or without.

An example is what the trainer makes of it: the whole text through the checkpoint's tokenizer and chat template, cut to
``max_tokens``, with the loss on completions and assistant turns or on every token. Examples are never packed:
in a packed row tokens of one example may see another's, and its gradient would be both's. A row with no
supervised token left has loss 0 and no gradient: it becomes `no signal`, never a score.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curator.errors import BadWorkloadOption, NotLoaded, RecordUnusable, TemplateDiffers
from curator.influence.capture import Layer, examples_of_rows, find_layers
from curator.influence.dropout import at_least_float32
from curator.workloads.adam import SecondMoments, second_moments
from curator.workloads.base import Record
from curator.workloads.experts import take_apart
from curator.workloads.huggingface import Placement, Quantization, Weights, pretrained
from curator.workloads.tokens import IGNORED, TokenBatch, Tokens, padded, tokenized
from curator.workloads.training import Training, descend
from curator.workloads.turns import chat_segments, conversation, last_only, plain_segments, preference

KIND = "causal-lm"
CHOICES = {
    "reduction": ("mean", "sum"),
    "loss_on": ("completion", "all"),
    "weights": ("full", "adapter"),
    "dtype": ("float32", "bfloat16"),
    "objective": ("sft", "dpo"),
    "overlong": ("cut", "refuse"),
}


@dataclass(frozen=True)
class Options:
    """How records become losses: [workload] options of curator.toml, part of the recipe.

    ``reduction`` is over an example's supervised tokens. ``loss_on`` all learns prompts and user turns too. ``weights``
    adapter takes the gradients of a PEFT adapter's own matrices, full those of the weights it is merged into: the
    former behave almost like dot products, the latter cost little more. ``objective`` dpo takes preference pairs
    (arXiv:2305.18290, equation 7) at temperature ``beta`` against the folder ``reference``, or where that is empty
    against the checkpoint itself, which is what training starts from. A record of more than ``max_tokens`` loses its
    end, which is counted, or is refused: ``overlong``.

    ``quantization`` 4bit or 8bit, or a table of arguments of BitsAndBytesConfig, quantises the weights while they are
    loaded, as a QLoRA trainer does. ``second_moments`` is a file in the checkpoint's folder, and so part of its content
    (``curator.training.adam``): what the optimiser knew stands for the curvature. ``device_map`` and ``max_memory`` are
    accelerate's, for a model too big for one device, and no part of the recipe.
    """

    max_tokens: int = 512
    overlong: Literal["cut", "refuse"] = "cut"
    reduction: Literal["mean", "sum"] = "mean"
    loss_on: Literal["completion", "all"] = "completion"
    weights: Weights = "full"
    dtype: Literal["float32", "bfloat16"] = "float32"
    chat_template: str = ""
    objective: Literal["sft", "dpo"] = "sft"
    beta: float = 0.1
    reference: str = ""
    second_moments: str = ""
    quantization: Quantization = ""
    device_map: str | Mapping[str, Any] = ""
    max_memory: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise BadWorkloadOption(kind=KIND, reason=f"{name} is {value!r}, not one of {', '.join(known)}")
        if isinstance(self.quantization, str) and self.quantization not in ("", "4bit", "8bit"):
            reason = (
                f"quantization is {self.quantization!r}: it is 4bit, 8bit or a table of BitsAndBytesConfig's arguments"
            )
            raise BadWorkloadOption(kind=KIND, reason=reason)
        if self.second_moments != Path(self.second_moments).name:
            raise BadWorkloadOption(kind=KIND, reason="second_moments is no file name, of the checkpoint's own folder")


class CausalLM:
    """The ``causal-lm`` workload. The tokenizer comes from the checkpoint, so ``load`` comes first."""

    def __init__(self, project: Path = Path(), options: Options | None = None) -> None:
        self.project, self.options = project, options or Options()
        self._tokenizer: Any = None
        self._checkpoint: Path | None = None
        self._reference: nn.Module | None = None
        self._mixture = False

    @property
    def tokenizer(self) -> Any:
        """The loaded checkpoint's tokenizer."""
        if self._tokenizer is None:
            raise NotLoaded(kind=KIND)
        return self._tokenizer

    # --- the model ------------------------------------------------------------------------------------------

    def load(self, checkpoint: Path, device: torch.device) -> nn.Module:
        """The model of a folder.

        Raises:
            TemplateDiffers: the option ``chat_template`` is not the template stored with the checkpoint.
            AdapterBaseMissing, CheckpointForeign, ExtraMissing: see ``pretrained``.
        """
        self._reference = None  # that of a former model goes before the next one comes
        model, self._tokenizer = self._pretrained(checkpoint, device)
        self._checkpoint = checkpoint
        if self.options.chat_template:
            self._take_template(self.project / self.options.chat_template)
        if self.options.objective == "dpo" and self.options.reference:
            self._reference, _ = self._pretrained(self.project / self.options.reference, device)
        self._mixture = take_apart(model)
        return model

    def _pretrained(self, folder: Path, device: torch.device) -> tuple[nn.Module, Any]:
        return pretrained(
            folder,
            "AutoModelForCausalLM",
            device,
            dtype=getattr(torch, self.options.dtype),
            weights=self.options.weights,
            placement=Placement(self.options.device_map, self.options.max_memory),
            quantization=self.options.quantization,
        )

    def _take_template(self, file: Path) -> None:
        """The trainer's template, where the checkpoint stores none; with another one the tokens would be others."""
        given, stored = file.read_text(encoding="utf-8"), getattr(self._tokenizer, "chat_template", None)
        if stored and stored != given:
            digests = [hashlib.sha256(text.encode()).hexdigest()[:12] for text in (given, stored)]
            raise TemplateDiffers(given=file, given_digest=digests[0], stored_digest=digests[1])
        self._tokenizer.chat_template = given

    def layers(self, model: nn.Module) -> tuple[str, ...]:
        """The adapter's matrices, or every linear layer but the output head.

        The head's vocabulary-wide factor dwarfs all others and is often tied.
        """
        names = [layer.name for layer in find_layers(model) if layer.module is not _head(model)]
        own = self.options.weights == "adapter"
        names = [name for name in names if (".lora_" in name) == own]
        if own and not names:
            raise BadWorkloadOption(kind=KIND, reason='weights is "adapter", and the checkpoint has no LoRA matrices')
        return tuple(names)

    def second_moments(self, layers: Sequence[Layer]) -> SecondMoments | None:
        """Those of the run that made the checkpoint, where the option names their file.

        Raises:
            SecondMomentsUnfit, CheckpointMissing, PickleRefused: see ``adam.second_moments``.
        """
        if not self.options.second_moments or self._checkpoint is None:
            return None
        return second_moments(self._checkpoint / self.options.second_moments, layers)

    # --- records --------------------------------------------------------------------------------------------

    def validate(self, record: Record) -> str | None:
        """One of the known shapes, with text in it, and not too long where that is refused."""
        pair = preference(record) if self.options.objective == "dpo" else None
        if self.options.objective == "dpo" and pair is None:
            return "it is no preference pair: it has not both chosen and rejected"
        try:
            unlearnable = (reason for part in pair or (record,) if (reason := self._unlearnable(part)))
            return next(unlearnable, None) or self._overlong(record)
        except (KeyError, TypeError, AttributeError):
            return "its messages are not a list of {role, content}"

    def _unlearnable(self, record: Record) -> str | None:
        messages, plain = conversation(record), plain_segments(record)
        if messages is None and plain is None:
            if preference(record):
                return 'it is a preference pair: set objective = "dpo" in [workload] options'
            return "it has none of text, prompt + completion, messages, instruction + output, conversations"
        learned = [m["content"] for m in messages or () if self._all or m["role"] == "assistant"]
        learned += [text for text, counts in plain or () if self._all or counts]
        return None if any(learned) else "nothing in it is to be learned: its completion is empty"

    def _overlong(self, record: Record) -> str | None:
        """Only a tokenizer can tell, so before a checkpoint is loaded nothing is too long."""
        if self.options.overlong == "cut" or self._tokenizer is None or not (cut := self.n_cut(record)):
            return None
        return f'it is {cut} tokens longer than max_tokens, {self.options.max_tokens}, and overlong is "refuse"'

    @property
    def _all(self) -> bool:
        return self.options.loss_on == "all"

    def tokens(self, record: Record) -> Tokens:
        """Token ids and targets of one text, cut to ``max_tokens``.

        Raises:
            RecordUnusable: it is of no known shape.
        """
        messages = conversation(record)
        if messages is not None:
            segments = chat_segments(messages, self.tokenizer)
            if self.options.objective == "dpo":
                segments = last_only(segments)
        else:
            segments = plain_segments(record) or []
            end = self.tokenizer.eos_token
            if end and segments and not segments[-1][0].endswith(end):
                segments = [*segments, (end, True)]
        if self._all:
            segments = [(text, True) for text, _ in segments]
        # A chat template writes the beginning of the text itself.
        return tokenized(segments, self.tokenizer, special=messages is None, limit=self.options.max_tokens)

    def collate(self, records: Sequence[Record]) -> TokenBatch:
        """A batch of B records, padded on the right to the longest; of preferences 2 B rows, the preferred one first.

        Raises:
            RecordUnusable: one of them is not valid.
        """
        for record in records:
            if reason := self.validate(record):
                raise RecordUnusable(kind=KIND, reason=reason)
        texts = [text for record in records for text in preference(record) or (record,)]
        return padded([self.tokens(text) for text in texts], self.tokenizer.pad_token_id or 0)

    def training(self) -> Training:
        """A pass of fine-tuning."""
        return Training(epochs=1, batch=8, learning_rate=2e-5)

    def train(
        self, model: nn.Module, records: Sequence[Record], *, seed: int, device: torch.device, how: Training
    ) -> None:
        """As by default; preferences are learned, and measured afterwards, against the checkpoint it began with.

        Without a reference of its own a model is measured against itself, which every model ties with.
        """
        if self.options.objective == "dpo" and self._reference is None:
            self._reference = deepcopy(model).eval().requires_grad_(False)
        descend(self, model, records, device, how)

    def n_tokens(self, record: Record) -> int:
        """Tokens of the record after cutting."""
        return sum(len(self.tokens(text).ids) for text in preference(record) or (record,))

    def n_cut(self, record: Record) -> int:
        """Tokens of the record that were cut off."""
        return sum(self.tokens(text).cut for text in preference(record) or (record,))

    def positions(self, record: Record) -> list[str]:
        """The text of each token; none of a preference, whose two answers share their positions."""
        if self.options.objective == "dpo":
            return []
        return [self.tokenizer.decode([token]) for token in self.tokens(record).ids]

    # --- losses ---------------------------------------------------------------------------------------------

    def losses(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """(B,): cross-entropy of the supervised tokens, their mean or their sum; or the DPO loss of B pairs."""
        if self.options.objective == "dpo":
            return self._preference_losses(model, batch)
        sum_B, counted_B = self._cross_entropy(model, batch)
        return sum_B if self.options.reduction == "sum" else sum_B / counted_B.clamp_min(1)

    def _preference_losses(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        example_L = torch.arange(len(batch.id_BT), device=batch.id_BT.device) // 2
        margin_B = self._margin(model, batch, example_L)
        with torch.no_grad():
            start_B = margin_B if self._reference is None else self._margin(self._reference, batch, example_L)
        return -F.logsigmoid(self.options.beta * (margin_B - start_B.detach()))

    def _margin(self, model: nn.Module, batch: TokenBatch, example_L: Tensor) -> Tensor:
        """The log-probability of the preferred answer minus that of the rejected one, (B,)."""
        loss_BP = self._cross_entropy(model, batch, example_L)[0].view(-1, 2)
        return loss_BP[:, 1] - loss_BP[:, 0]

    def _cross_entropy(
        self, model: nn.Module, batch: TokenBatch, example_L: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The sum over each row's supervised targets, and how many there are; ``example_L``: whose row it is."""
        rows = torch.arange(len(batch.id_BT), device=batch.id_BT.device) if example_L is None else example_L
        if self._mixture:  # its blocks see one row a token
            rows = rows.repeat_interleave(batch.id_BT.shape[1])
        named = example_L is not None or self._mixture
        # Targets are shifted, and not the logits: a part of these would be copied before anything is computed.
        target_BT = F.pad(batch.target_BT[:, 1:], (0, 1), value=IGNORED)
        with examples_of_rows(rows) if named else nullcontext():
            # All ones: transformers warns of padding where no mask is given.
            logits = model(input_ids=batch.id_BT, attention_mask=torch.ones_like(batch.id_BT), use_cache=False).logits
        loss_L = F.cross_entropy(
            at_least_float32(logits).flatten(0, 1), target_BT.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return loss_L.view_as(target_BT).sum(dim=1), (target_BT != IGNORED).sum(dim=1)


def _head(model: nn.Module) -> nn.Module | None:
    head: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
    return head


def build(*, project: Path, **options: Any) -> CausalLM:
    """The workload of a project; see ``Options``.

    Raises:
        BadWorkloadOption: an option that is not there, or a value that is none of its own.
    """
    known = [option.name for option in fields(Options)]
    if unknown := sorted(options.keys() - set(known)):
        raise BadWorkloadOption(kind=KIND, reason=f"there is no {', '.join(unknown)}; there are {', '.join(known)}")
    return CausalLM(project, Options(**options))

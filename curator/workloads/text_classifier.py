"""Text classification: a small built-in model in one safetensors file, or a Hugging Face folder.

The built-in model is a mean of hashed word 1- and 2-gram embeddings -> Linear -> ReLU -> Linear. Hashing is CRC-32 of
the n-gram's UTF-8 bytes modulo the number of buckets, so a checkpoint needs no vocabulary and means the same on every
machine. The embedding is not captured: its gradient is as sparse as the text, and a mask would keep almost nothing.
Records are ``{"text", "label"}``; the label is one of the checkpoint's names.
"""

from __future__ import annotations

import json
import re
import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from curator.errors import CheckpointForeign, NotLoaded, RecordUnusable
from curator.workloads.base import Record
from curator.workloads.huggingface import ONE_DEVICE, Placement, pretrained
from curator.workloads.training import Training

KIND = "text-classifier"
FORMAT = "curator.text-classifier/1"
WORD = re.compile(r"<\w+>|\w+|[!?$%]")


# --- text to numbers --------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Lower-case words, masked tokens such as ``<url>``, and the punctuation that shouts."""
    return WORD.findall(unicodedata.normalize("NFC", text).casefold())


def hashed_ngrams(text: str, buckets: int) -> list[int]:
    """The distinct hashed 1- and 2-grams, ascending; a text without words is the one bucket 0."""
    tokens = words(text)
    grams = [*tokens, *(f"{a} {b}" for a, b in pairwise(tokens))]
    return sorted({zlib.crc32(gram.encode()) % buckets for gram in grams}) or [0]


@dataclass(frozen=True)
class TextBatch:
    """Ragged n-gram ids as nn.EmbeddingBag takes them (bag b starts at ``offset_B[b]``), and the labels."""

    id_N: Tensor
    offset_B: Tensor
    label_B: Tensor

    def to(self, device: torch.device) -> TextBatch:
        """The same batch on the device."""
        return TextBatch(self.id_N.to(device), self.offset_B.to(device), self.label_B.to(device))


def bags(texts: Sequence[str], label_B: Sequence[int], buckets: int) -> TextBatch:
    """Texts and label numbers as a batch."""
    parts = [hashed_ngrams(text, buckets) for text in texts]
    ends = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
    flat = torch.tensor([i for part in parts for i in part], dtype=torch.long)
    return TextBatch(flat, ends[:-1], torch.tensor(label_B, dtype=torch.long))


# --- the built-in model -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextConfig:
    """The shape of a built-in model and the names of its labels, in the order of the logits."""

    labels: tuple[str, ...]
    buckets: int = 1 << 15
    width: int = 64
    hidden: int = 64


class HashedText(nn.Module):
    """Mean of n-gram embeddings -> Linear -> ReLU -> Linear."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.EmbeddingBag(config.buckets, config.width, mode="mean")
        self.first = nn.Linear(config.width, config.hidden)
        self.second = nn.Linear(config.hidden, len(config.labels))
        # A mean over n-grams is short; from a small start it would stay so, and training would take long.
        nn.init.normal_(self.embedding.weight, std=0.5)

    def forward(self, batch: TextBatch) -> Tensor:
        """Logits, (B, labels)."""
        hidden = torch.relu(self.first(self.embedding(batch.id_N, batch.offset_B)))
        logits: Tensor = self.second(hidden)
        return logits


FROM_NOTHING = Training(epochs=6, batch=64, learning_rate=1e-2, weight_decay=0.0)
FURTHER = Training(epochs=4, batch=32, learning_rate=1e-2)
FINE_TUNING = Training(epochs=3, batch=16, learning_rate=2e-5)


def fit(
    texts: Sequence[str], labels: Sequence[str], config: TextConfig, seed: int, how: Training = FROM_NOTHING
) -> HashedText:
    """Train a model from nothing; the same on every run of one machine. The caller's random state is left alone."""
    numbers = [config.labels.index(label) for label in labels]
    # Hashed once: the same texts come by in every epoch.
    rows = [bags([text], [number], config.buckets) for text, number in zip(texts, numbers, strict=True)]
    return fit_hashed(rows, config, seed, how)


def fit_hashed(rows: Sequence[TextBatch], config: TextConfig, seed: int, how: Training = FROM_NOTHING) -> HashedText:
    """``fit`` on texts that are hashed already, each a batch of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HashedText(config)
        adam = torch.optim.Adam(model.parameters(), lr=how.learning_rate, weight_decay=how.weight_decay, fused=True)
        for _ in range(how.epochs):
            for picks in torch.split(torch.randperm(len(rows)), how.batch):
                batch = joined([rows[i] for i in picks.tolist()])
                adam.zero_grad()
                F.cross_entropy(model(batch), batch.label_B).backward()  # type: ignore[no-untyped-call]
                adam.step()
    return model.eval()


def joined(rows: Sequence[TextBatch]) -> TextBatch:
    """Batches as one."""
    size_R = torch.tensor([row.id_N.numel() for row in rows])
    bags_R = torch.tensor([row.offset_B.numel() for row in rows])
    before_B = (size_R.cumsum(0) - size_R).repeat_interleave(bags_R)
    offset_B = torch.cat([row.offset_B for row in rows]) + before_B
    return TextBatch(torch.cat([row.id_N for row in rows]), offset_B, torch.cat([row.label_B for row in rows]))


def save(model: HashedText, path: Path) -> None:
    """Write one safetensors file with the configuration in its metadata."""
    config = json.dumps(asdict(model.config), sort_keys=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path, metadata={"format": FORMAT, "config": config})


def load(path: Path, device: torch.device) -> HashedText:
    """Read what ``save`` wrote.

    Raises:
        CheckpointForeign: a safetensors file of something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise CheckpointForeign(path=path, kind=KIND, reason=error) from error
    if metadata.get("format") != FORMAT:
        raise CheckpointForeign(path=path, kind=KIND, reason="its metadata does not name the format " + FORMAT)
    values = json.loads(metadata["config"])
    model = HashedText(TextConfig(**{**values, "labels": tuple(values["labels"])}))
    model.load_state_dict(tensors)
    return model.to(device).eval()


# --- the workload -----------------------------------------------------------------------------------------


class _Reader(Protocol):
    """What differs between the built-in model and a Hugging Face folder."""

    @property
    def labels(self) -> Mapping[str, int]: ...

    def batch(self, texts: Sequence[str], label_B: Sequence[int]) -> Any: ...

    @property
    def training(self) -> Training: ...

    def logits(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]: ...

    def positions(self, text: str) -> list[str]: ...

    def n_cut(self, text: str) -> int: ...


@dataclass(frozen=True)
class _Hashed:
    labels: Mapping[str, int]
    buckets: int
    training: Training = FURTHER

    def batch(self, texts: Sequence[str], label_B: Sequence[int]) -> TextBatch:
        return bags(texts, label_B, self.buckets)

    def logits(self, model: nn.Module, batch: TextBatch) -> tuple[Tensor, Tensor]:
        return model(batch), batch.label_B

    def positions(self, text: str) -> list[str]:
        return []  # the model sees the mean of all words

    def n_cut(self, text: str) -> int:
        return 0


@dataclass(frozen=True)
class _Tokenized:
    labels: Mapping[str, int]
    tokenizer: Any
    max_tokens: int
    training: Training = FINE_TUNING

    def batch(self, texts: Sequence[str], label_B: Sequence[int]) -> dict[str, Tensor]:
        if not texts:
            empty = torch.zeros(0, 1, dtype=torch.long)
            return {"input_ids": empty, "attention_mask": empty, "label_B": torch.zeros(0, dtype=torch.long)}
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        return {**tokens, "label_B": torch.tensor(label_B, dtype=torch.long)}

    def positions(self, text: str) -> list[str]:
        ids = self.tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"]
        return [self.tokenizer.decode([token]) for token in ids]

    def n_cut(self, text: str) -> int:
        # Not verbose: transformers warns of texts longer than the model, and these are cut.
        return max(0, len(self.tokenizer(text, verbose=False)["input_ids"]) - self.max_tokens)

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        inputs = {name: tensor for name, tensor in batch.items() if name != "label_B"}
        return model(**inputs).logits.float(), batch["label_B"]


class TextClassification:
    """The ``text-classifier`` workload. Labels and tokenizer come from the checkpoint, so ``load`` comes first."""

    def __init__(self, max_tokens: int = 512, placement: Placement = ONE_DEVICE) -> None:
        self.max_tokens, self.placement = max_tokens, placement
        self._reader: _Reader | None = None

    @property
    def reader(self) -> _Reader:
        """What the loaded checkpoint reads records with."""
        if self._reader is None:
            raise NotLoaded(kind=KIND)
        return self._reader

    def load(self, checkpoint: Path, device: torch.device) -> nn.Module:
        """The built-in model of a file, or the Hugging Face model of a folder."""
        if checkpoint.is_dir():
            kind = "AutoModelForSequenceClassification"
            model, tokenizer = pretrained(checkpoint, kind, device, placement=self.placement)
            self._reader = _Tokenized(dict(model.config.label2id), tokenizer, self.max_tokens)
            loaded: nn.Module = model
            return loaded
        built_in = load(checkpoint, device)
        numbered = {label: number for number, label in enumerate(built_in.config.labels)}
        self._reader = _Hashed(numbered, built_in.config.buckets)
        return built_in

    def validate(self, record: Record) -> str | None:
        """A text, and a label the checkpoint knows (any string before one is loaded)."""
        if not isinstance(record.get("text"), str):
            return "it has no text"
        if not isinstance(label := record.get("label"), str):
            return "it has no label"
        if self._reader is not None and label not in self._reader.labels:
            return f"the checkpoint has no label {label!r}, only {', '.join(self._reader.labels)}"
        return None

    def collate(self, records: Sequence[Record]) -> Any:
        """A batch of B records.

        Raises:
            RecordUnusable: one of them is not valid.
        """
        labels = self.reader.labels
        for record in records:
            if reason := self.validate(record):
                raise RecordUnusable(kind=KIND, reason=reason)
        return self.reader.batch([r["text"] for r in records], [labels[r["label"]] for r in records])

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """Cross-entropy of the label, (B,)."""
        return F.cross_entropy(*self.reader.logits(model, batch), reduction="none")

    def correct(self, model: nn.Module, batch: Any) -> Tensor:
        """1 where the label is the likeliest, else 0, (B,)."""
        logits, label_B = self.reader.logits(model, batch)
        return logits.argmax(1) == label_B

    def training(self) -> Training:
        """How the loaded checkpoint is trained further."""
        return self.reader.training

    def positions(self, record: Record) -> list[str]:
        """The text of each token that a Hugging Face model sees; the built-in one sees no positions."""
        return self.reader.positions(record["text"])

    def n_tokens(self, record: Record) -> int:
        """Words of the text, at least 1."""
        return max(len(words(record["text"])), 1)

    def n_cut(self, record: Record) -> int:
        """Tokens that a Hugging Face model does not see; the built-in one reads texts of any length."""
        return self.reader.n_cut(record["text"])


def build(*, project: Path, max_tokens: int = 512, **placing: Any) -> TextClassification:
    """The workload. For Hugging Face models ``max_tokens`` cuts texts, and ``placing`` is that of ``Placement``."""
    return TextClassification(max_tokens, Placement(**placing))

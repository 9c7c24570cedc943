"""Token ids and targets as a trainer makes them, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from curator.workloads.turns import Segment

IGNORED = -100
"""The target of a position that is not learned, as in torch's cross-entropy."""


@dataclass(frozen=True)
class Tokens:
    """One example: its token ids, the target of each (IGNORED where it is not supervised), and how many were cut."""

    ids: list[int]
    targets: list[int]
    cut: int = 0


@dataclass(frozen=True)
class TokenBatch:
    """Right-padded token ids and the target of each position (IGNORED where none).

    Nothing says which tokens are real: a causal model's token never sees what is behind it, and a padded position that
    a mask left nothing to look at (as in a sliding window) would be NaN, which spreads in the backward pass.
    """

    id_BT: Tensor
    target_BT: Tensor

    def to(self, device: torch.device) -> TokenBatch:
        """The same batch on the device."""
        return TokenBatch(self.id_BT.to(device), self.target_BT.to(device))


def tokenized(segments: Sequence[Segment], tokenizer: Any, *, special: bool, limit: int) -> Tokens:
    """The segments as ONE text, cut to ``limit`` tokens.

    Trainers tokenize the whole text: a tokenizer that is given the pieces one by one may cut it elsewhere. A token is
    supervised where its last character is, so one that runs from a prompt into the completion is (as in TRL, whose
    completion begins where the tokens of the prompt alone and of the whole part); what a tokenizer adds at the end
    counts with the last segment.

    Args:
        segments: pieces of text, and whether each is supervised.
        tokenizer: of transformers. One without character offsets (not "fast") is given the pieces.
        special: let the tokenizer add what it adds around a text; a chat template has written that itself.
        limit: tokens kept, from the start.
    """
    if getattr(tokenizer, "is_fast", False):
        text = "".join(piece for piece, _ in segments)
        encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        ids = list(encoded["input_ids"])
        learned = _learned(segments, encoded["offset_mapping"])
    else:
        pieces = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece, _ in segments]
        ids = [i for piece in pieces for i in piece]
        learned = [counts for piece, (_, counts) in zip(pieces, segments, strict=True) for _ in piece]
    targets = [i if counts else IGNORED for i, counts in zip(ids, learned, strict=True)]
    return Tokens(ids[:limit], targets[:limit], max(0, len(ids) - limit))


def _learned(segments: Sequence[Segment], offsets: Sequence[tuple[int, int]]) -> list[bool]:
    ends = list(accumulate(len(piece) for piece, _ in segments))
    found = []
    at = 0
    for place, (start, end) in enumerate(offsets):
        if start == end:  # no characters of the text: what the tokenizer adds
            found.append(bool(segments) and place > 0 and segments[-1][1])
            continue
        while at < len(ends) - 1 and end > ends[at]:
            at += 1
        found.append(segments[at][1])
    return found


def padded(rows: Sequence[Tokens], pad: int) -> TokenBatch:
    """A batch of B examples, padded on the right to the longest."""
    width = max((len(row.ids) for row in rows), default=1)
    id_BT = [row.ids + [pad] * (width - len(row.ids)) for row in rows]
    target_BT = [row.targets + [IGNORED] * (width - len(row.targets)) for row in rows]
    return TokenBatch(*(torch.tensor(x, dtype=torch.long).reshape(len(rows), width) for x in (id_BT, target_BT)))

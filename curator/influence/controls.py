"""What is said of an example without any gradient: how like its words, and the model's last thoughts, are to a slice.

Both are controls: a score that is not better than these has earned nothing. Taken against what is frozen with the
directions, so an arrival's depend on nothing but itself. Where a direction leads away from examples too, so do these.

``embedding_similarity``  the mean cosine of pooled last hidden states with those of the slice's examples (RDS+,
                          arXiv:2503.01807): positions weigh by their place, and only those count that the loss
                          depends on, so neither padding nor an unlearned prompt does.
``bm25``                  Okapi BM25 of the example's words, the slice's examples as queries, averaged over them
                          (Robertson and Zaragoza 2009; Lucene's idf, never negative).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from curator.errors import LayerNotFound
from curator.influence.layers import find_layers

Floats = NDArray[np.float64]

K1, B = 1.2, 0.75


class LastHidden:
    """What enters the model's last linear layer, pooled to one vector an example. A context around a pass."""

    def __init__(self, model: nn.Module) -> None:
        try:
            self.module: nn.Module | None = find_layers(model)[-1].module
        except LayerNotFound:
            self.module = None
        self.pooled: list[Tensor] = []

    def __enter__(self) -> LastHidden:
        self.handle = self.module.register_forward_pre_hook(self._see, with_kwargs=True) if self.module else None
        return self

    def __exit__(self, *_: object) -> None:
        if self.handle:
            self.handle.remove()

    def _see(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if x.requires_grad:
            # Which positions count is known in the backward pass.
            x.register_hook(partial(self._take, x.detach()))
        elif torch.is_grad_enabled():
            self._take(x.detach(), None)

    def _take(self, x: Tensor, d: Tensor | None) -> None:
        self.pooled.append(pool(x, d))

    def hidden_BH(self, batch: int) -> Tensor | None:
        """One vector an example, of length 1 or 0; None where the layer was not called once, with a row an example."""
        if len(self.pooled) != 1 or self.pooled[0].shape[:1] != (batch,) or self.pooled[0].ndim != 2:
            return None
        x_BH = self.pooled[0].float().cpu()
        return torch.nan_to_num(nn.functional.normalize(x_BH, dim=1))


def pool(x: Tensor, d: Tensor | None) -> Tensor:
    """The mean over positions, weighed by their place from 1, of those whose gradient is not nothing; x_BH as it is."""
    if x.ndim != 3:
        return x
    place_T = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=torch.float32)
    used_BT = torch.ones(x.shape[:2], device=x.device) if d is None else (d != 0).any(dim=2).float()
    weight_BT = used_BT * place_T
    total_B = weight_BT.sum(dim=1, keepdim=True)
    return torch.einsum("bt,bth->bh", weight_BT / torch.where(total_B > 0, total_B, 1.0), x.float())


def terms(words: Iterable[str]) -> list[int]:
    """Words as numbers that mean the same on every machine."""
    return [zlib.crc32(word.encode()) for word in words]


@dataclass(frozen=True)
class Controls:
    """What arrivals are compared with: the mean unit hidden state of each slice, and the weight of every word in it."""

    hidden_SH: Floats | None
    term_T: NDArray[np.int64]
    weight_ST: Floats
    length: float

    @classmethod
    def fit(cls, hidden_NH: Tensor | None, documents: Sequence[Sequence[int]], part_SN: Floats) -> Controls:
        """From N validation examples.

        Args:
            hidden_NH: their pooled hidden states, where the model gives any.
            documents: their words as ``terms``.
            part_SN: what each adds to each slice: 1 / n, or -1 / n of those a slice leads away from.
        """
        distinct = [np.unique(np.asarray(document, np.int64)) for document in documents]
        term_T, at = np.unique(np.concatenate([*distinct, np.zeros(0, np.int64)]), return_inverse=True)
        example = np.repeat(np.arange(len(distinct)), [len(each) for each in distinct])
        df_T = np.bincount(at, minlength=len(term_T))
        idf_T = np.log1p((len(documents) - df_T + 0.5) / (df_T + 0.5))
        weight_ST = np.zeros((len(part_SN), len(term_T)))
        for s, part_N in enumerate(part_SN):
            weight_ST[s] = np.bincount(at, weights=part_N[example], minlength=len(term_T)) * idf_T
        hidden_SH = None if hidden_NH is None else part_SN @ hidden_NH.double().numpy()
        return cls(hidden_SH, term_T, weight_ST, float(np.mean([len(d) for d in documents] or [0])))

    def similarity_BS(self, hidden_BH: Tensor) -> Tensor:
        """The mean cosine with each slice's examples."""
        assert self.hidden_SH is not None
        return (hidden_BH.double() @ torch.from_numpy(self.hidden_SH).T).float()

    def bm25_BS(self, documents: Sequence[Sequence[int]]) -> Tensor:
        """The mean BM25 of each document for each slice's examples as queries."""
        found = [self._bm25_S(np.asarray(document, np.int64)) for document in documents]
        return torch.from_numpy(np.array(found, np.float32).reshape(len(documents), len(self.weight_ST)))

    def _bm25_S(self, document: NDArray[np.int64]) -> Floats:
        term_U, tf_U = np.unique(document, return_counts=True)
        at = np.searchsorted(self.term_T, term_U)
        known = at < len(self.term_T)
        known[known] = self.term_T[at[known]] == term_U[known]
        tf = tf_U[known]
        saturated = tf / (tf + K1 * (1 - B + B * len(document) / max(self.length, 1e-9)))
        return np.asarray(self.weight_ST[:, at[known]] @ saturated)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """As named arrays."""
        found: dict[str, NDArray[Any]] = {
            "term_T": self.term_T,
            "weight_ST": self.weight_ST.astype(np.float32),
            "length": np.array([self.length]),
        }
        return found if self.hidden_SH is None else {**found, "hidden_SH": self.hidden_SH.astype(np.float32)}

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]]) -> Controls:
        """Back from ``arrays``."""
        hidden = arrays.get("hidden_SH")
        return cls(
            None if hidden is None else hidden.astype(np.float64),
            arrays["term_T"],
            arrays["weight_ST"].astype(np.float64),
            float(arrays["length"][0]),
        )

"""Topics of mails, so that a vendor can get whole ones wrong: k-means on latent semantic analysis."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from curator.workloads.text_classifier import hashed_ngrams

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BUCKETS = 1 << 15
TOPICS = 40
DIMENSIONS = 40
RAREST, COMMONEST = 3, 0.3
"""Words in fewer mails than the one, or a larger share than the other, say nothing of a topic."""


def campaigns(texts: Sequence[str], seed: int = 0) -> Ints:
    """The campaign of each text, (len(texts),), numbered from 0."""
    return kmeans(latent(texts, seed), TOPICS, seed)


def latent(texts: Sequence[str], seed: int, rounds: int = 3) -> Floats:
    """Unit rows in the space of the top singular vectors of tf-idf, by subspace iteration."""
    grams = [hashed_ngrams(text, BUCKETS) for text in texts]
    row = np.repeat(np.arange(len(texts)), [len(g) for g in grams])
    column = np.concatenate([np.asarray(g, np.int64) for g in grams])
    seen = np.bincount(column, minlength=BUCKETS)
    told = (seen >= RAREST) & (seen < COMMONEST * len(texts))
    idf = np.where(told, np.log(len(texts) / np.maximum(seen, 1)), 0.0)
    kept = idf[column] > 0
    row, column = row[kept], column[kept]
    value = idf[column] / np.sqrt(np.bincount(row, idf[column] ** 2, len(texts)))[row]
    by_column = np.argsort(column, kind="stable")
    basis = np.random.Generator(np.random.Philox(seed)).standard_normal((BUCKETS, DIMENSIONS))
    for _ in range(rounds):
        left = _summed(row, column, value, basis, len(texts))
        basis = np.linalg.qr(_summed(column[by_column], row[by_column], value[by_column], left, BUCKETS))[0]
    out = _summed(row, column, value, basis, len(texts))
    return np.asarray(out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12), np.float64)


def _summed(sorted_group: Ints, pick: Ints, weight: Floats, rows: Floats, groups: int) -> Floats:
    """Weighted sum of the picked rows by group; the groups come sorted. A sparse matrix times a dense one."""
    first = np.searchsorted(sorted_group, np.arange(groups))
    pick_N, first_G, weight_N, rows_RK = map(torch.from_numpy, (pick, first, weight, rows))
    out: Floats = F.embedding_bag(pick_N, rows_RK, first_G, mode="sum", per_sample_weights=weight_N).numpy()
    return out


def kmeans(points: Floats, k: int, seed: int, steps: int = 15) -> Ints:
    """Lloyd's algorithm from a k-means++ start: the cluster of each point."""
    centres = _spread_out(points, k, np.random.Generator(np.random.Philox(seed)))
    nearest = np.zeros(len(points), np.int64)
    for _ in range(steps):
        nearest = ((centres**2).sum(1)[None] - 2 * points @ centres.T).argmin(1)
        for cluster in np.unique(nearest):
            centres[cluster] = points[nearest == cluster].mean(0)
    return nearest


def _spread_out(points: Floats, k: int, rng: np.random.Generator) -> Floats:
    centres = points[[rng.integers(len(points))]]
    distance = ((points - centres[0]) ** 2).sum(1)
    while len(centres) < k:
        pick = rng.choice(len(points), p=distance / distance.sum())
        centres = np.vstack([centres, points[pick]])
        distance = np.minimum(distance, ((points - points[pick]) ** 2).sum(1))
    return centres

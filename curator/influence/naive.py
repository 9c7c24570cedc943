"""The slow, obviously right twin of every fast path: one example at a time, float64, no hook that adds anything up.

Scores here never take a square root of a matrix: with q(x, y) = x^T (F + damping)^-1 y by a linear solve,
``influence = q``, ``normalised = q(x, y) / sqrt(q(x, x) q(y, y))``. So they check the whitening, not repeat it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from curator.influence.capture import Layer
from curator.influence.dropout import LayerMask

Floats = NDArray[np.float64]
Loss = Callable[[], Tensor]
"""The loss of one example, (1,) or scalar."""

ByLayer = Mapping[str, Floats]


# --- gradients of one example -------------------------------------------------------------------------------


def gradients(loss: Loss, layers: Sequence[Layer]) -> dict[str, Floats]:
    """G_OI of each layer from the weights' own gradient; with bias, the bias gradient is the last column."""
    return {layer.name: _gradient(loss, layer) for layer in layers}


def _gradient(loss: Loss, layer: Layer) -> Floats:
    weight, bias = layer.module.get_parameter("weight"), layer.module._parameters.get("bias")
    wanted = [weight] + ([bias] if layer.bias and bias is not None else [])
    found = torch.autograd.grad(loss().sum(), wanted, allow_unused=True, materialize_grads=True)
    G = found[0] if isinstance(layer.module, nn.Linear) else found[0].T
    columns = [G, *(extra[:, None] for extra in found[1:])]
    return np.asarray(torch.cat(columns, dim=1).double().numpy())


def factors(loss: Loss, layer: Layer) -> tuple[Floats, Floats]:
    """Inputs a_TI and output gradients d_TO of one example, over all calls of the layer."""
    calls: list[tuple[Tensor, Tensor]] = []

    def remember(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        calls.append((args[0], output))
        return output.clone()  # what comes next may work in place

    handle = layer.module.register_forward_hook(remember)
    try:
        value = loss().sum()
    finally:
        handle.remove()
    d = torch.autograd.grad(value, [output for _, output in calls], allow_unused=True)
    used = [(a.detach(), x) for (a, _), x in zip(calls, d, strict=True) if x is not None]
    a_TI = np.concatenate([a.double().numpy().reshape(-1, a.shape[-1]) for a, _ in used])
    d_TO = np.concatenate([x.double().numpy().reshape(-1, x.shape[-1]) for _, x in used])
    return (np.hstack([a_TI, np.ones((len(a_TI), 1))]) if layer.bias else a_TI), d_TO


def norm(G: ByLayer) -> float:
    """Length of the full gradient."""
    return float(np.sqrt(sum(float((g * g).sum()) for g in G.values())))


# --- masks --------------------------------------------------------------------------------------------------


def kept(G_OI: Floats, mask: LayerMask) -> Floats:
    """The kept entries, picked from the full gradient one by one."""
    rows, columns = mask.coordinates()
    scale_k = np.broadcast_to(np.asarray(mask.scale, np.float64), len(rows))
    cells = zip(rows.tolist(), columns.tolist(), scale_k.tolist(), strict=True)
    return np.array([scale * G_OI[o, i] for o, i, scale in cells])


def shuffled(raw: Sequence[int], n: int) -> list[int]:
    """Fisher-Yates over the whole list, from one raw 64-bit number a step; the first ``len(raw)`` places are drawn."""
    items = list(range(n))
    for i, x in enumerate(raw):
        j = i + x * (n - i) // 2**64
        items[i], items[j] = items[j], items[i]
    return items[: len(raw)]


def priority_sample(u: Sequence[float], weight: Sequence[float], m: int) -> tuple[list[int], list[float]]:
    """The m smallest u/w, one candidate at a time, and min(1, w tau) with tau the next."""
    keys = sorted((x / w, j) for j, (x, w) in enumerate(zip(u, weight, strict=True)))
    tau = keys[m][0] if m < len(keys) else np.inf
    return [j for _, j in keys[:m]], [min(1.0, weight[j] * tau) for _, j in keys[:m]]


def energy(gradients_N: Sequence[Floats]) -> Floats:
    """Mean of the squared entries of one layer's gradients, each scaled to length 1."""
    squares = [g**2 / (g**2).sum() if np.any(g) else np.zeros_like(g) for g in gradients_N]
    return np.asarray(np.mean(squares, axis=0))


# --- curvature ----------------------------------------------------------------------------------------------


def fisher(rows: Sequence[Floats], angular: bool) -> Floats:
    """Mean of g g^T, of g or of g scaled to length 1."""
    total = np.zeros((len(rows[0]), len(rows[0])))
    for g in rows:
        length = np.sqrt(g @ g) if angular else 1.0
        total += np.outer(g, g) / length**2 if length > 0 else 0.0
    return total / len(rows)


def damped(F: Floats, damping: float) -> Floats:
    """F + damping * tr(F) / k * I."""
    floor: Floats = damping * np.trace(F) / len(F) * np.eye(len(F))
    return F + floor


def kronecker(pairs: Sequence[tuple[Floats, Floats]], damping: float, angular: bool) -> Floats:
    """The damped Kronecker Fisher of one layer as one (O I) x (O I) matrix, from each example's (a_TI, d_TO)."""
    a_all = np.concatenate([a for a, _ in pairs])
    A: Floats = np.mean([np.outer(a, a) for a in a_all], axis=0)
    S: Floats = np.mean([_outer(a, d, angular) for a, d in pairs], axis=0)
    return np.asarray(np.kron(damped(S, damping), damped(A, damping)), dtype=np.float64)


def corrected_kronecker(
    pairs: Sequence[tuple[Floats, Floats]], gradients_N: Sequence[Floats], damping: float, angular: bool
) -> Floats:
    """EK-FAC of one layer as one (O I) x (O I) matrix: KFAC's eigenvectors, second moments along each of them."""
    A = np.mean([np.outer(a, a) for a in np.concatenate([a for a, _ in pairs])], axis=0)
    S = np.mean([_outer(a, d, angular) for a, d in pairs], axis=0)
    Q = np.kron(np.linalg.eigh(S)[1], np.linalg.eigh(A)[1])
    rows = [g.ravel() / (np.linalg.norm(g) if angular and np.any(g) else 1.0) for g in gradients_N]
    values = np.mean([(Q.T @ g) ** 2 for g in rows], axis=0)
    return np.asarray(Q @ np.diag(values + damping * values.mean()) @ Q.T)


def _outer(a_TI: Floats, d_TO: Floats, angular: bool) -> Floats:
    square = float(((d_TO.T @ a_TI) ** 2).sum()) if angular else 1.0
    return d_TO.T @ d_TO / (square if square > 0 else 1.0)


# --- codes --------------------------------------------------------------------------------------------------


def sjlt(bucket_sK: ArrayLike, sign_sK: ArrayLike, width: int) -> Floats:
    """The transform as an explicit (C, K) matrix."""
    bucket, sign = np.asarray(bucket_sK), np.asarray(sign_sK, np.float64)
    S = np.zeros((width, bucket.shape[1]))
    for r, j in np.ndindex(*bucket.shape):
        S[bucket[r, j], j] += sign[r, j] / np.sqrt(len(bucket))
    return S


def principal_projector(rows: Sequence[Floats], width: int) -> Floats:
    """The projector onto the leading directions of a sample, by a singular value decomposition."""
    _, _, v = np.linalg.svd(np.stack(rows), full_matrices=False)
    return np.asarray(v[:width].T @ v[:width])


def rank_one(G: Floats) -> Floats:
    """The nearest matrix of rank one."""
    u, s, v = np.linalg.svd(G)
    return np.asarray(s[0] * np.outer(u[:, 0], v[0]))


def signs(y: Floats) -> Floats:
    """One number at a time."""
    scale = float(np.mean(np.abs(y)))
    return np.array([scale if value >= 0 else -scale for value in y])


def inverse_root(F: Floats, damping: float) -> Floats:
    """(F + damping tr(F)/k)^-1/2."""
    values, vectors = np.linalg.eigh(damped(F, damping))
    return np.asarray((vectors / np.sqrt(values)) @ vectors.T)


# --- scores -------------------------------------------------------------------------------------------------


def product(x: ByLayer, y: ByLayer, F: ByLayer) -> float:
    """Sum over layers of x^T F^-1 y, F already damped; matrices are read row by row."""
    return sum(float(x[n].ravel() @ np.linalg.solve(F[n], y[n].ravel())) for n in F)


def influence(z: ByLayer, validation: Sequence[ByLayer], F: ByLayer, slopes: Sequence[float] | None = None) -> float:
    """Mean over validation examples of slope_v g_v^T F^-1 g_z; positive helps (arXiv:1703.04730)."""
    slopes = [1.0] * len(validation) if slopes is None else slopes
    return sum(s * product(v, z, F) for s, v in zip(slopes, validation, strict=True)) / len(validation)


def normalised_influence(z: ByLayer, validation: Sequence[ByLayer], F: ByLayer) -> float:
    """Mean over validation examples of the cosine of F^-1/2 g_v and F^-1/2 g_z."""
    return sum(cosine(v, z, F) for v in validation) / len(validation)


def cosine(x: ByLayer, y: ByLayer, F: ByLayer) -> float:
    """The cosine between two whitened gradients."""
    return product(x, y, F) / float(np.sqrt(product(x, x, F) * product(y, y, F)))


def by_layer(z: ByLayer, validation: Sequence[ByLayer], F: ByLayer) -> tuple[dict[str, float], dict[str, float]]:
    """Influence and normalised influence of each layer alone, the lengths still those of all layers."""
    own = product(z, z, F)
    parts, shares = {}, {}
    for n in F:
        terms = [product({n: v[n]}, {n: z[n]}, {n: F[n]}) for v in validation]
        lengths = [np.sqrt(own * product(v, v, F)) for v in validation]
        parts[n] = sum(terms) / len(terms)
        shares[n] = sum(t / length for t, length in zip(terms, lengths, strict=True)) / len(terms)
    return parts, shares


def by_position(a_TI: Floats, d_TO: Floats, validation: Sequence[Floats], F: Floats) -> Floats:
    """Influence of each position's own outer product in one layer, (T,)."""
    G_T = [np.outer(d, a) for a, d in zip(a_TI, d_TO, strict=True)]
    return np.array([influence({"": G}, [{"": v} for v in validation], {"": F}) for G in G_T])


def mixture(scores: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """A weighted sum of one example's scores by slice."""
    return sum(weight * scores[name] for name, weight in weights.items())


def ensemble(scores: Sequence[float]) -> tuple[float, float, int]:
    """Mean, standard error and number of one example's scores, those of the checkpoints that gave one."""
    n = len(scores)
    error = float(np.std(scores, ddof=1) / np.sqrt(n)) if n > 1 else np.nan
    return (float(np.mean(scores)) if n else 0.0), error, n


def low_rank(U_MOI: Sequence[ByLayer], rank: int) -> list[dict[str, Floats]]:
    """Every direction brought to length 1 over its layers, projected onto the leading rows and columns of all, back."""
    lengths = [norm(U) for U in U_MOI]
    found: list[dict[str, Floats]] = [{} for _ in U_MOI]
    for n in U_MOI[0]:
        scaled = [U[n] / length if length else U[n] for U, length in zip(U_MOI, lengths, strict=True)]
        rows = principal_projector([column for u in scaled for column in u.T], rank)
        columns = principal_projector([row for u in scaled for row in u], rank)
        for U, out in zip(U_MOI, found, strict=True):
            out[n] = rows @ U[n] @ columns
    return found


# --- confidence and evaluation ------------------------------------------------------------------------------


def conformal_p(evidence_B: ArrayLike, reference_N: ArrayLike) -> Floats:
    """By counting."""
    references = np.asarray(reference_N, dtype=np.float64)
    return np.array([(1 + sum(r >= e for r in references)) / (1 + len(references)) for e in np.asarray(evidence_B)])


def benjamini_hochberg(p_B: ArrayLike) -> Floats:
    """By definition: the smallest level at which an example would be rejected."""
    p = np.asarray(p_B, dtype=np.float64)
    levels = [float(min(x * len(p) / (p <= x).sum(), 1.0)) for x in p]
    return np.array([min(q for q, x in zip(levels, p, strict=True) if x >= mine) for mine in p])


def auc(evidence_N: ArrayLike, bad_N: ArrayLike) -> float:
    """By all pairs."""
    evidence, bad = np.asarray(evidence_N, dtype=np.float64), np.asarray(bad_N, dtype=bool)
    wins = [(b > g) + 0.5 * (b == g) for b in evidence[bad] for g in evidence[~bad]]
    return float(np.mean(wins))


def temperature(loss_N: ArrayLike) -> float:
    """By trying 4,000 temperatures between 1/20 and 20."""
    m = [-np.log(np.expm1(x)) for x in np.asarray(loss_N, dtype=np.float64)]
    tried = np.geomspace(0.05, 20, 4000)
    return float(tried[np.argmin([np.mean([np.log1p(np.exp(-x / t)) for x in m]) for t in tried])])


def linear_datamodelling(score_NV: Floats, kept_MN: Floats, outcome_MV: Floats) -> Floats:
    """One query and one subset at a time."""
    found = []
    for v in range(score_NV.shape[1]):
        predicted = [sum(score_NV[n, v] for n in np.flatnonzero(kept)) for kept in kept_MN]
        x, y = _rank(predicted), _rank(list(outcome_MV[:, v]))
        found.append(np.corrcoef(x, y)[0, 1])
    return np.array(found)


def _rank(values: Sequence[float]) -> Floats:
    return np.array([sum(b < a for b in values) + (1 + sum(b == a for b in values)) / 2 for a in values])

"""Lengths and inner products of gradients sum_t d_t a_t^T that nobody keeps (arXiv:1510.01799, arXiv:2406.11011)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from curator.influence.dropout import at_least_float32

LARGEST_STRIPE = 1 << 22
"""Elements of the per-example gradients that are formed at once."""


def stripes(a_BTI: Tensor, d_BTO: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The gradients of a batch, some rows at a time: which rows, and (B, rows, I) of them."""
    n_out = d_BTO.shape[2]
    rows = max(LARGEST_STRIPE // max(len(a_BTI) * a_BTI.shape[2], 1), 1)
    for start in range(0, n_out, rows):
        chosen = slice(start, min(start + rows, n_out))
        yield chosen, d_BTO[:, :, chosen].transpose(1, 2) @ a_BTI


def ghost_inner(a_BTI: Tensor, d_BTO: Tensor) -> Tensor:
    """|sum_t d_t a_t^T|^2 of each example, (B,), the cheaper of two ways.

    Two T x T Gram matrices (arXiv:2110.05679, eq. 3) take T^2 (I + O) multiplications, the gradient itself T I O.
    Either costs about as much as a weight gradient.
    """
    a, d = at_least_float32(a_BTI), at_least_float32(d_BTO)
    positions, n_in, n_out = a.shape[1], a.shape[2], d.shape[2]
    if positions == 1:
        return a.square().sum(dim=(1, 2)) * d.square().sum(dim=(1, 2))
    if positions * (n_in + n_out) > n_in * n_out:
        return torch.stack([G_BrI.square().sum(dim=(1, 2)) for _, G_BrI in stripes(a, d)]).sum(dim=0)
    gram_BTT = (a @ a.transpose(1, 2)) * (d @ d.transpose(1, 2))
    # Rounding can leave a tiny negative where the gradient is zero.
    return gram_BTT.sum(dim=(1, 2)).clamp_min(0)


def weighted_inner(a_BTI: Tensor, d_BTO: Tensor, weight_OI: Tensor) -> Tensor:
    """|R o sum_t d_t a_t^T|^2 of each example, (B,). A weight on each entry has no Gram form."""
    if a_BTI.shape[1] == 1:
        return ((d_BTO[:, 0].square() @ weight_OI.square()) * a_BTI[:, 0].square()).sum(dim=1)
    parts = [(G_BrI * weight_OI[rows]).square().sum(dim=(1, 2)) for rows, G_BrI in stripes(a_BTI, d_BTO)]
    return torch.stack(parts).sum(dim=0)


def ghost_products(a_BTI: Tensor, d_BTO: Tensor, u_SOI: Tensor) -> Tensor:
    """<u_s, sum_t d_t a_t^T> of each example and direction, (B, S).

    With several positions the gradient is formed once for all directions, T I O + S I O multiplications; position by
    position it would be S T I O.
    """
    if a_BTI.shape[1] == 1 or len(u_SOI) < 2:
        return ghost_terms(a_BTI, d_BTO, u_SOI).sum(dim=1)
    return ghost_scores(a_BTI, d_BTO, u_SOI)[0]


def ghost_scores(a_BTI: Tensor, d_BTO: Tensor, u_SOI: Tensor) -> tuple[Tensor, Tensor]:
    """``ghost_products``, (B, S), and ``ghost_inner``, (B,), of gradients that are formed once for both."""
    a, d = at_least_float32(a_BTI), at_least_float32(d_BTO)
    if a.shape[1] == 1:
        return ghost_terms(a, d, u_SOI).sum(dim=1), ghost_inner(a, d)
    u = u_SOI.to(d.dtype)
    products_BS, square_B = d.new_zeros(len(d), len(u)), d.new_zeros(len(d))
    for rows, G_BrI in stripes(a, d):
        G = G_BrI.flatten(1)
        products_BS += G @ u[:, rows].flatten(1).T
        square_B += G.square().sum(dim=1)
    return products_BS, square_B


def ghost_terms(a_BTI: Tensor, d_BTO: Tensor, u_SOI: Tensor) -> Tensor:
    """d_t^T u_s a_t of every position, (B, T, S), which sum over t to ``ghost_products``."""
    a, d = at_least_float32(a_BTI), at_least_float32(d_BTO)
    terms = [((d @ u_OI.to(d.dtype)) * a).sum(dim=2) for u_OI in u_SOI]
    return torch.stack(terms, dim=2) if terms else a.new_zeros(*a.shape[:2], 0)

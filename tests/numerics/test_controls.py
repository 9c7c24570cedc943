"""The controls that need no gradient: pooled hidden states and BM25, against their definitions."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from curator.influence.attribution import Attributor, RecipeSpec
from curator.influence.controls import K1, B, Controls, LastHidden, pool, terms


def test_pooling_weighs_by_place_and_leaves_out_what_the_loss_does_not_depend_on() -> None:
    x, d = torch.randn(2, 4, 3), torch.ones(2, 4, 3)
    d[0, 3] = 0
    d[1, :2] = 0
    found = pool(x, d)
    assert torch.allclose(found[0], (x[0, 0] + 2 * x[0, 1] + 3 * x[0, 2]) / 6, atol=1e-6)
    assert torch.allclose(found[1], (3 * x[1, 2] + 4 * x[1, 3]) / 7, atol=1e-6)
    assert torch.equal(pool(x, torch.zeros_like(d)), torch.zeros(2, 3))


class Tagger(nn.Module):
    """Two linear layers over the positions of a sequence; the mean loss of those that count."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x_BTI: torch.Tensor, counts_BT: torch.Tensor) -> torch.Tensor:
        out = self.last(torch.tanh(self.first(x_BTI)))
        return (out.square().sum(dim=2) * counts_BT).sum(dim=1)


def measured(model: Tagger, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    losses = lambda m, batch: m(*batch)  # noqa: E731
    spec = RecipeSpec(dimension=16, exact=False, measurement="loss")
    found = Attributor.fit(model, losses, [(x, counts)], spec).measure((x, counts)).hidden_BH
    assert found is not None
    return found


def test_a_pass_gives_the_unit_pooled_input_of_the_last_layer_whatever_the_padding() -> None:
    torch.manual_seed(0)
    model, x, counts = Tagger(), torch.randn(3, 4, 5), torch.ones(3, 4)
    found = measured(model, x, counts)
    h = torch.tanh(model.first(x)).detach()
    expected = nn.functional.normalize((h * torch.arange(1, 5)[None, :, None]).sum(1), dim=1)
    assert torch.allclose(found, expected, atol=1e-5)
    padded = torch.cat([x, torch.randn(3, 2, 5)], dim=1)
    longer = measured(model, padded, torch.cat([counts, torch.zeros(3, 2)], dim=1))
    assert torch.allclose(found, longer, atol=1e-5)


def test_a_model_that_calls_its_last_layer_otherwise_has_no_hidden_state() -> None:
    layer = nn.Linear(3, 2)
    with LastHidden(layer) as last:
        layer(torch.randn(4, 3))
        layer(torch.randn(4, 3))
    assert last.hidden_BH(4) is None
    with LastHidden(layer) as last:
        layer(torch.randn(8, 3))
    assert last.hidden_BH(4) is None
    with LastHidden(nn.ReLU()) as last:
        assert last.hidden_BH(0) is None


def bm25(document: list[str], queries: list[list[str]], corpus: list[list[str]]) -> float:
    """Straight from the formula, a term at a time, and the mean over the queries."""
    average = sum(map(len, corpus)) / len(corpus)
    total = 0.0
    for query in queries:
        for term in set(query):
            df = sum(term in each for each in corpus)
            tf = document.count(term)
            idf = math.log(1 + (len(corpus) - df + 0.5) / (df + 0.5))
            total += idf * tf / (tf + K1 * (1 - B + B * len(document) / average))
    return total / len(queries)


def test_bm25_is_the_formula() -> None:
    trusted = ["the cat sat", "the dog sat on the mat", "prices rose again", "prices fell"]
    corpus = [text.split() for text in trusted]
    part_SN = np.array([[0.5, 0.5, 0, 0], [0, 0, 0.5, -0.5]])
    controls = Controls.of(Controls.fit(None, [terms(d) for d in corpus], part_SN).arrays())
    arrivals = ["the cat and the dog", "prices rose", "", "unheard of", "fell fell fell again"]
    found = controls.bm25_BS([terms(text.split()) for text in arrivals])
    for text, row in zip(arrivals, found.tolist(), strict=True):
        animals = bm25(text.split(), corpus[:2], corpus)
        money = (bm25(text.split(), corpus[2:3], corpus) - bm25(text.split(), corpus[3:], corpus)) / 2
        assert row == pytest.approx([animals, money], abs=1e-6)


def test_similarity_is_the_mean_cosine_with_a_slice() -> None:
    random = np.random.default_rng(0)
    unit = torch.nn.functional.normalize(torch.from_numpy(random.normal(size=(7, 4))).float(), dim=1)
    part_SN = np.zeros((2, 5))
    part_SN[0, :2], part_SN[1, 2:] = 1 / 2, 1 / 3
    controls = Controls.of(Controls.fit(unit[:5], [[]] * 5, part_SN).arrays())
    cosine = unit[5:] @ unit[:5].T
    expected = torch.stack([cosine[:, :2].mean(1), cosine[:, 2:].mean(1)], dim=1)
    assert torch.allclose(controls.similarity_BS(unit[5:]), expected, atol=1e-6)

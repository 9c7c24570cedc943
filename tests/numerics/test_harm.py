"""Harm: what it is made of, on which scale, and that directions keep the rule that they were made with."""

import numpy as np
import pytest
import torch

from curator.influence.attribution import Measured
from curator.influence.harm import EVIDENCE, WEIGHTS, Harm, evidence, nearest_trusted
from curator.influence.scoring import directions, unit
from curator.stages import yardstick

KEY = (1, "all")


def test_neighbours_are_the_nearest_along_a_line():
    vote, known = nearest_trusted([[0.1, -0.9, 0.2, 0.8]], 2)
    assert vote[0] == pytest.approx((0.8 - 0.9) / 2)
    assert known[0] == pytest.approx((0.8 + 0.9) / 2)
    assert nearest_trusted([[0.1, 0.3]], 10)[0][0] == pytest.approx(0.2)


def test_every_kind_of_evidence_is_higher_for_worse():
    good = evidence([0.5], [1.0], [0.1], [0.5], [0.9])
    for column, worse in enumerate([[-0.5, 1, 0.1, 0.5, 0.9], [0.5, 9, 0.1, 0.5, 0.9], [0.5, 1, 3, 0.5, 0.9],
                                    [0.5, 1, 0.1, -0.5, 0.9], [0.5, 1, 0.1, 0.5, 0.1]]):  # fmt: skip
        (changed,) = np.flatnonzero(evidence(*([x] for x in worse))[0] > good[0])
        assert changed == column
    assert len(EVIDENCE) == len(WEIGHTS) == good.shape[1]


def test_the_parts_add_up_to_what_harm_is_made_from():
    rng = np.random.default_rng(0)
    made = Harm.fit(rng.normal(size=(50, len(EVIDENCE))))
    x_BC = rng.normal(size=(9, len(EVIDENCE)))
    z_B = made.parts(x_BC).sum(axis=1)
    np.testing.assert_allclose(made(x_BC), (1 + z_B / (1 + abs(z_B))) / 2)
    np.testing.assert_allclose(
        made.parts(x_BC), (x_BC - made.centre_C) / made.spread_C * [0.25, 0.125, 0.25, 0.25, 0.125]
    )


def test_directions_of_before_familiarity_score_as_they_did():
    """What is frozen stays: a score that is taken again after an upgrade is the same."""
    centre, spread = np.array([-0.4, 0.2, -2.0]), np.array([0.1, 0.4, 1.0])
    x_BC = np.random.default_rng(0).normal(size=(9, len(EVIDENCE)))
    z_B = ((x_BC[:, :3] - centre) / spread) @ [1.0, 0.5, 1.0] / 2.5
    np.testing.assert_allclose(Harm.of({"centre": centre, "spread": spread})(x_BC), (1 + z_B / (1 + abs(z_B))) / 2)


def trusted(n: int, seed: int = 0) -> Measured:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unit_BK, norm_B = unit(torch.randn(n, 6))
    loss_B = norm_B / 3
    return Measured(unit_BK, norm_B, norm_B, loss_B, loss_B, torch.ones(n), torch.zeros(n, dtype=torch.int8))


@pytest.mark.parametrize("chunk", [3, 1000])
def test_a_trusted_example_is_held_against_the_others(monkeypatch, chunk):
    """Its own gradient is its nearest: with it, no trusted example would be like an arrival."""
    monkeypatch.setattr(yardstick, "CHUNK", chunk)
    m = trusted(20)
    rows = {KEY: torch.arange(20)}
    made = yardstick.fit([KEY], rows, m, directions({"1/all": (m.unit_BK, m.whitened_norm_B)})).harms[0]
    alone = []
    for n in range(20):
        others = torch.cat([torch.arange(n), torch.arange(n + 1, 20)])
        cosine = (m.unit_BK[[n]] @ m.unit_BK[others].T).numpy()
        facts = m.whitened_norm_B[[n]].square(), m.calibrated_loss_B[[n]]
        alone.append(evidence(cosine.mean(axis=1), *facts, *nearest_trusted(cosine))[0])
    expected = Harm.fit(np.array(alone))
    np.testing.assert_allclose(made.centre_C, expected.centre_C, rtol=1e-5)
    np.testing.assert_allclose(made.spread_C, expected.spread_C, rtol=1e-5)

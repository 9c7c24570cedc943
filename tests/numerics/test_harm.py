"""Harm: what it is made of, on which scale, and that directions keep the rule that they were made with."""

import numpy as np
import pytest
import torch

from curator.influence.attribution import Measured
from curator.influence.harm import EVIDENCE, EXPECTED, Harm, evidence, fitted_weights, nearest_trusted
from curator.influence.scoring import directions, unit
from curator.stages import yardstick

KEY = (1, "all")


def test_neighbours_are_the_nearest_along_a_line():
    vote, known = nearest_trusted([[0.1, -0.9, 0.2, 0.8]], 2)
    assert vote[0] == pytest.approx((0.8 - 0.9) / 2)
    assert known[0] == pytest.approx((0.8 + 0.9) / 2)
    assert nearest_trusted([[0.1, 0.3]], 10)[0][0] == pytest.approx(0.2)


WORSE = [
    [-0.5, 1, 0.1, 0.5, 0.9],
    [0.5, 9, 0.1, 0.5, 0.9],
    [0.5, 1, 3, 0.5, 0.9],
    [0.5, 1, 0.1, -0.5, 0.9],
    [0.5, 1, 0.1, 0.5, 0.1],
]


def test_every_kind_of_evidence_is_higher_for_worse():
    good = evidence([0.5], [1.0], [0.1], [0.5], [0.9])
    for column, worse in enumerate(WORSE):
        (changed,) = np.flatnonzero(evidence(*([x] for x in worse))[0] > good[0])
        assert changed == column
    assert len(EVIDENCE) == len(EXPECTED) == good.shape[1]


def faulty(shift_C, n=400, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 5)), rng.normal(size=(n, 5)) + shift_C


@pytest.mark.parametrize("rehearse", [False, True])
def test_the_parts_add_up_to_what_harm_is_made_from(rehearse):
    right_NC, faulty_NC = faulty([1, 0, 1, 0, 0])
    made = Harm.rehearsed(right_NC, faulty_NC) if rehearse else Harm.fit(right_NC)
    z_B = made.parts(faulty_NC).sum(axis=1)
    np.testing.assert_allclose(made(faulty_NC), (1 + z_B / (1 + abs(z_B))) / 2)
    again = Harm.of(made.arrays())
    np.testing.assert_array_equal(again(faulty_NC), made(faulty_NC))


def test_without_a_rehearsal_three_columns_are_added_as_they_are():
    """So are those of directions from before there was one: a score taken again after an upgrade is the same."""
    centre, spread = np.array([-0.4, 0.2, -2.0]), np.array([0.1, 0.4, 1.0])
    x_BC = np.random.default_rng(0).normal(size=(9, 5))
    z_B = ((x_BC[:, :3] - centre) / spread) @ [1.0, 0.5, 1.0] / 2.5
    np.testing.assert_allclose(Harm.of({"centre": centre, "spread": spread})(x_BC), (1 + z_B / (1 + abs(z_B))) / 2)


def test_what_sees_the_rehearsed_faults_counts_and_what_does_not_hardly_does():
    made = Harm.rehearsed(*faulty([0, 0, 2, 0, 0]))
    share_C = made.weights / made.weights.sum()
    assert share_C.argmax() == 2
    assert share_C[2] > 0.7
    assert (share_C >= 0).all()


def test_evidence_that_points_the_wrong_way_counts_nothing():
    assert Harm.rehearsed(*faulty([1, -2, 1, 0, 0])).weights[1] == 0


def test_few_examples_leave_the_weights_near_what_was_expected():
    """Of ten that say nothing, and where nothing can be told at all."""
    some = Harm.rehearsed(*faulty([0.3] * 5, n=10)).weights
    many = Harm.rehearsed(*faulty([0.3, 0, 0, 0, 0], n=4000)).weights
    expected = EXPECTED / EXPECTED.sum()
    assert abs(some / some.sum() - expected).max() < abs(many / many.sum() - expected).max()
    same = np.zeros((20, 5))
    np.testing.assert_allclose(Harm.rehearsed(same, same).weights / EXPECTED, Harm.rehearsed(same, same).weights[0])


def test_the_weights_are_the_penalised_maximum_of_the_likelihood():
    """Beside a plain gradient descent on the same sum, where no weight is at its bound."""
    right, wrong = faulty([1, 1, 1, 1, 1], n=200)
    x, bad = np.concatenate([right, wrong]), np.repeat([False, True], 200)
    found = fitted_weights(x, bad, EXPECTED, 1.0)
    line = np.column_stack([x @ EXPECTED, np.ones(400)])
    scale = descend(line, bad, np.array([1.0, 0.0]), np.array([1e-3, 1e-6]))
    start = np.append(scale[0] * EXPECTED, scale[1])
    expected = descend(np.column_stack([x, np.ones(400)]), bad, start, np.r_[np.ones(5), 1e-6])
    np.testing.assert_allclose(found, expected[:-1], atol=1e-4)


def descend(design, bad, start, pull):
    b = start.copy()
    for _ in range(20_000):
        b -= 2e-3 * (design.T @ (1 / (1 + np.exp(-design @ b)) - bad) + pull * (b - start))
    return b


def trusted(n: int, seed: int = 0) -> Measured:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unit_BK, norm_B = unit(torch.randn(n, 6))
    loss_B = norm_B / 3
    return Measured(unit_BK, norm_B, norm_B, loss_B, loss_B, torch.ones(n), torch.zeros(n, dtype=torch.int8))


def test_harm_is_on_the_scale_of_what_no_direction_has_seen():
    """Those behind a direction have a part in it, and in the curvature: they look better than any arrival."""
    m, aside, wrong = trusted(20), trusted(12, 1), trusted(12, 2)
    made = yardstick.fit([KEY], {KEY: torch.arange(20)}, m, directions({"1/all": (m.unit_BK, m.whitened_norm_B)}),
                         rehearsal={KEY: (aside, wrong)}).harms[0]  # fmt: skip
    cosine = (aside.unit_BK @ m.unit_BK.T).numpy()
    facts = aside.whitened_norm_B.square(), aside.calibrated_loss_B
    expected = evidence(cosine.mean(axis=1), *facts, *nearest_trusted(cosine))
    np.testing.assert_allclose(made.centre_C, np.median(expected, axis=0), rtol=1e-5)
    assert made.weight_C is not None

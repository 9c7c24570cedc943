from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from curator.stages import selections
from curator.stages.selections import Pool
from tests.store.conftest import Curator
from tests.store.read_world import World

Floats = NDArray[np.float32]


def pool_of(unit_BK: Floats, normalised_BS: NDArray[Any]) -> Pool:
    return Pool(1, 1, unit_BK.shape[1], np.arange(len(unit_BK)), normalised_BS.astype(np.float32))


def unit(random: np.random.Generator, *shape: int) -> Floats:
    x = random.normal(size=shape)
    rows: Floats = (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)
    return rows


def naive(pool: Pool, unit_BK: Floats, budget: int, similarity: float) -> list[int]:
    """The same choice, one candidate at a time over all that was chosen."""
    merit_B = selections.balanced(pool.normalised_BS)
    chosen: list[int] = []
    for i in np.argsort(-merit_B, kind="stable").tolist():
        if len(chosen) < budget and all(unit_BK[i] @ unit_BK[j] <= similarity for j in chosen):
            chosen.append(i)
    return chosen


@pytest.mark.parametrize("round_", [1, 7, 512])
@pytest.mark.parametrize("budget", [1, 20, 500])
def test_rounds_choose_what_one_at_a_time_would(monkeypatch: pytest.MonkeyPatch, round_: int, budget: int) -> None:
    monkeypatch.setattr(selections, "ROUND", round_)
    random = np.random.default_rng(1)
    unit_BK = unit(random, 200, 3)
    pool = pool_of(unit_BK, random.normal(size=(200, 2)))
    choice = selections.compute(pool, budget, lambda ids: unit_BK[ids], similarity=0.95)
    assert list(choice.positions) == naive(pool, unit_BK, budget, 0.95)


def test_no_slice_decides_by_its_scale() -> None:
    merit_B = selections.balanced(np.array([[0.001, 100.0], [0.003, 0.0], [0.002, 50.0]], np.float32))
    assert merit_B == pytest.approx([0, 0, 0], abs=1e-5)


def test_a_slice_without_spread_says_nothing() -> None:
    merit_B = selections.balanced(np.array([[1.0, 0.5], [2.0, 0.5]], np.float32))
    assert merit_B == pytest.approx([-0.5, 0.5])


def test_equals_are_settled_by_the_seed_and_by_nothing_else() -> None:
    unit_BK = np.eye(50, dtype=np.float32)
    pool = pool_of(unit_BK, np.zeros((50, 1)))
    chosen = [selections.compute(pool, 10, lambda ids: unit_BK[ids], seed=seed).positions for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_duplicates_fill_the_budget_only_when_similarity_is_ignored() -> None:
    unit_BK = np.concatenate([np.tile([[1.0, 0, 0]], (5, 1)), np.eye(3)[1:]]).astype(np.float32)
    pool = pool_of(unit_BK, np.array([[9.0]] * 5 + [[1.0], [0.5]]))
    apart = selections.compute(pool, 3, lambda ids: unit_BK[ids])
    assert set(apart.positions[1:]) == {5, 6}
    assert apart.too_similar == 4
    assert set(selections.compute(pool, 3, lambda ids: unit_BK[ids], similarity=1).positions) <= set(range(5))


def test_select_leaves_out_flags_and_near_duplicates(curator: Curator, world: World) -> None:
    [made] = curator.rows("select", "--budget", "100000", "--name", "all", "--similarity", "0.99")
    rows = curator.rows("valuable", "--selection", "all", "--limit", "0")
    chosen = {row["example_id"] for row in rows}
    assert len(chosen) == made["chosen"] == made["candidates"] - made["too_similar"]
    assert not chosen & set(world.flagged)
    assert len(chosen & set(world.duplicates)) == 1
    assert made["expected_gain"] == pytest.approx(sum(row["gain"] for row in rows), rel=1e-4)


def test_select_promises_more_than_a_random_draw(curator: Curator) -> None:
    [made] = curator.rows("select", "--budget", "50")
    assert made["expected_gain"] > made["gain_of_random"] > 0


def test_the_same_seed_chooses_the_same(curator: Curator) -> None:
    for name in ("a", "b"):
        curator("select", "--budget", "30", "--name", name)
    first, second = (
        [row["example_id"] for row in curator.rows("valuable", "--selection", name)] for name in ("a", "b")
    )
    assert first == second
    assert len(first) == 30


def test_a_budget_that_cannot_be_filled_is_said(curator: Curator) -> None:
    assert "nobody else is unflagged" in curator("select", "--budget", "100000").stderr


def test_a_selection_is_never_changed(curator: Curator) -> None:
    assert curator("select", "--budget", "3", "--name", "mine").exit_code == 0
    result = curator("select", "--budget", "4", "--name", "mine")
    assert result.exit_code == 2
    assert "CUR-SEL-002" in result.stderr
    assert len(curator.rows("valuable", "--selection", "mine")) == 3


def test_nothing_scored_is_refused(new_curator: Curator) -> None:
    result = new_curator("select", "--budget", "3")
    assert result.exit_code == 2
    assert "CUR-SEL-001" in result.stderr

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sqlalchemy import text

from curator.stages import selections
from curator.stages.selections import Choice, Pool, Wish
from curator.store.engine import begin, make_engine
from tests.store.conftest import Curator
from tests.store.read_world import World

Singles = NDArray[np.float32]


def unit(random: np.random.Generator, *shape: int) -> Singles:
    x = random.normal(size=shape)
    rows: Singles = (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)
    return rows


def pool_of(unit_BK: Singles, normalised_BS: NDArray[Any] | None = None) -> Pool:
    n = len(unit_BK)
    normalised_BS = np.zeros((n, 1)) if normalised_BS is None else normalised_BS
    return Pool(
        recipe_id=1,
        direction_set_id=1,
        dimension=unit_BK.shape[1],
        ids_B=np.arange(n),
        digests=[b"%d" % i for i in range(n)],
        normalised_BS=normalised_BS,
        trust_B=np.ones(n),
        size_B=np.ones(n),
        counts_B=np.ones(n, bool),
        tokens_B=np.arange(n) % 5 + 1,
        sources=("a", "b"),
        source_B=np.arange(n) % 2,
        slices=("first", "second"),
    )


def choose(pool: Pool, unit_BK: Singles, **wish: Any) -> Choice:
    return selections.compute(pool, Wish(**wish), lambda ids: unit_BK[ids])


@pytest.fixture
def unit_BK() -> Singles:
    return unit(np.random.default_rng(0), 200, 8)


def test_the_seed_and_the_content_decide_and_nothing_else(unit_BK: Singles) -> None:
    pool = pool_of(unit_BK)
    chosen = [choose(pool, unit_BK, budget=10, seed=seed).positions for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_a_slice_that_few_speak_for_gets_as_much(unit_BK: Singles) -> None:
    speaks = np.zeros((200, 2))
    speaks[:180, 0] = speaks[180:, 1] = 1
    shares = [
        np.mean([row >= 180 for row in choose(pool_of(unit_BK, speaks), unit_BK, budget=12, seed=s).positions])
        for s in range(10)
    ]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.12)  # 10 % of the candidates speak for it


def test_what_is_not_trusted_is_left_out_and_counted_as_harmful(unit_BK: Singles) -> None:
    doubted = np.arange(200) % 4 == 0
    pool = replace(pool_of(unit_BK), trust_B=np.where(doubted, 0.2, 0.95))
    choice = choose(pool, unit_BK, budget=50)
    assert not doubted[list(choice.positions)].any()
    assert choice.promise.harmful == pytest.approx(0.05)
    assert choice.of_random.harmful == pytest.approx(0.05 + 0.25 * 0.75, abs=0.08)
    assert doubted[list(choose(pool, unit_BK, budget=200, trust=0, similarity=1).positions)].sum() == 50


def test_a_budget_in_tokens_is_kept_to(unit_BK: Singles) -> None:
    pool = pool_of(unit_BK)
    choice = choose(pool, unit_BK, budget=100, in_tokens=True)
    assert 95 < pool.tokens_B[list(choice.positions)].sum() <= 100


@pytest.mark.parametrize(
    ("wish", "of_a", "of_b"), [({"share": 0.3}, 15, 15), ({"quota": {"a": 0.1}}, 5, 45), ({"quota": {"b": 0}}, 50, 0)]
)
def test_no_source_gets_more_than_its_share(unit_BK: Singles, wish: dict[str, Any], of_a: int, of_b: int) -> None:
    choice = choose(pool_of(unit_BK), unit_BK, budget=50, **wish)
    assert np.bincount([row % 2 for row in choice.positions], minlength=2).tolist() == [of_a, of_b]


# --- the command ------------------------------------------------------------------------------------------------


def test_select_leaves_out_flags_and_near_duplicates(curator: Curator, world: World) -> None:
    [made] = curator.rows("select", "--budget", "100000", "--name", "all", "--similarity", "0.99", "--trust", "0")
    rows = curator.rows("valuable", "--selection", "all", "--limit", "0")
    chosen = {row["example_id"] for row in rows}
    assert len(chosen) == made["chosen"] == made["candidates"] - made["too_similar"]
    assert not chosen & set(world.flagged)
    assert chosen & set(world.duplicates) == {world.duplicates[0]}


def test_texts_that_the_intake_linked_are_taken_once(curator: Curator, world: World) -> None:
    """Of a flagged one there is none, and under another label the same text is another example."""
    unflagged = [n for n in range(100, 200) if n not in world.flagged]
    labels = [[n for n in unflagged if n % 2 == odd] for odd in (0, 1)]
    head, *copies = labels[0][:10]
    other, of_bad = labels[1][:2]
    links = [*((n, head) for n in (*copies, other)), (of_bad, world.flagged[5])]
    with begin(make_engine(curator.url, pooled=False)) as connection:
        connection.execute(
            text("INSERT INTO curator.sketches (example_id, bands, of_id, similarity) VALUES (:id, '{1}', :of, 1)"),
            [{"id": n, "of": of} for n, of in links],
        )
    curator("select", "--budget", "100000", "--name", "all", "--similarity", "1", "--trust", "0")
    chosen = {row["example_id"] for row in curator.rows("valuable", "--selection", "all", "--limit", "0")}
    assert {head, other} <= chosen
    assert not chosen & {*copies, of_bad}


def test_select_promises_more_than_a_random_draw(curator: Curator) -> None:
    [made] = curator.rows("select", "--budget", "50")
    assert 1 > made["expected_gain"] > made["gain_of_random"] > 0
    assert made["expected_harmful"] <= made["harmful_of_random"]


def test_what_a_person_kept_is_trusted(curator: Curator, world: World) -> None:
    doubted = int(world.p_BS.min(1).argmin()) + 1
    everything = ("select", "--budget", "100000", "--similarity", "1", "--name")
    curator(*everything, "before")
    assert curator("review", str(doubted), "--keep").exit_code == 0
    curator(*everything, "after")
    before, after = (
        {row["example_id"] for row in curator.rows("valuable", "--selection", name, "--limit", "0")}
        for name in ("before", "after")
    )
    assert doubted not in before
    assert doubted in after


def test_the_same_seed_chooses_the_same(curator: Curator) -> None:
    for name in ("a", "b"):
        curator("select", "--budget", "30", "--name", name)
    first, second = (
        [row["example_id"] for row in curator.rows("valuable", "--selection", name)] for name in ("a", "b")
    )
    assert first == second
    assert len(first) == 30


def test_tokens_are_what_gradients_counted(curator: Curator, world_url: str) -> None:
    with begin(make_engine(world_url, pooled=False)) as connection:
        connection.execute(text("UPDATE curator.gradients SET tokens = 7"))
    [made] = curator.rows("select", "--tokens", "100")
    assert (made["unit"], made["chosen"], made["tokens"]) == ("tokens", 14, 98)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "either --budget N or --tokens N"),
        (("--budget", "3", "--tokens", "3"), "either --budget N or --tokens N"),
        (("--budget", "3", "--quota", "vendor-a"), "is not SOURCE=SHARE"),
        (("--budget", "3", "--quota", "vendor-a=2"), "is not SOURCE=SHARE"),
        (("--budget", "3", "--quota", "vendor-x=0.5"), "CUR-SEL-004"),
        (("--budget", "3", "--seed", "-1"), "--seed"),
    ],
)
def test_a_wish_that_makes_no_sense_is_refused(curator: Curator, arguments: tuple[str, ...], message: str) -> None:
    result = curator("select", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_budget_that_cannot_be_filled_is_said(curator: Curator) -> None:
    assert "nobody else is trusted" in curator("select", "--budget", "100000").stderr


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


def test_two_selections_are_compared_by_source(curator: Curator) -> None:
    curator("select", "--budget", "40", "--name", "a")
    curator("select", "--budget", "40", "--name", "b", "--seed", "1", "--quota", "vendor-b=0")
    rows = {row["source"]: row for row in curator.rows("selections", "diff", "a", "b")}
    ids = {
        name: {row["example_id"]: row["source"] for row in curator.rows("valuable", "--selection", name)}
        for name in "ab"
    }
    assert {source: (row["added"], row["removed"], row["kept"]) for source, row in rows.items()} == {
        source: tuple(
            sum(found[number] == source for number in numbers)
            for numbers, found in (
                (ids["b"].keys() - ids["a"].keys(), ids["b"]),
                (ids["a"].keys() - ids["b"].keys(), ids["a"]),
                (ids["a"].keys() & ids["b"].keys(), ids["a"]),
            )
        )
        for source in {*ids["a"].values(), *ids["b"].values()}
    }
    assert [row["name"] for row in curator.rows("selections", "list")] == ["b", "a"]
    assert "CUR-SEL-003" in curator("selections", "diff", "a", "nobody").stderr

"""A batch is judged once all its examples are through, on one set of directions: never without some."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
from sqlalchemy import Connection, Engine, text

from curator.settings import Settings
from curator.stages import reviews, scores, upkeep, verdicts
from curator.stages.turn import Turn
from curator.store import offers, work
from curator.store import verdicts as store
from curator.store.engine import begin, read
from curator.types import Counts, Lease, Review, Stage, Verdict

BATCH = 10


@pytest.fixture
def arrived(engine: Engine) -> Engine:
    """A closed batch of ten examples that are measured and scored on the directions in use."""
    with begin(engine) as connection:
        for statement in (
            "INSERT INTO curator.sources (name) VALUES ('vendor')",
            "INSERT INTO curator.intakes (source_id, origin, digest) VALUES (1, 'file', '')",
            "INSERT INTO curator.batches (intake_id, ordinal, examples, closed) VALUES (1, 0, 10, true)",
            "INSERT INTO curator.examples (digest, source_id, batch_id, record)"
            " SELECT sha256(n::text::bytea), 1, 1, '{}' FROM generate_series(1, 10) n",
            "INSERT INTO curator.checkpoints (name, path, digest, in_use) VALUES ('base', '', '', true)",
            "INSERT INTO curator.validation_sets (name, version, digest) VALUES ('trusted', 1, '')",
        ):
            connection.execute(text(statement))
        add_recipe(connection)
    return engine


def add_recipe(connection: Connection) -> None:
    """The next recipe, in use, with directions, and every example scored on them."""
    connection.execute(text("UPDATE curator.recipes SET in_use = false"))
    recipe = connection.scalar(
        text(
            "INSERT INTO curator.recipes (key, checkpoint_id, spec, dimension, state, in_use)"
            " SELECT count(*)::text::bytea, 1, '{}', 8, 'ready', true FROM curator.recipes RETURNING id"
        )
    )
    add_directions(connection, recipe)
    for stage in ("gradients", "scores"):
        connection.execute(
            text(
                "INSERT INTO curator.work (stage, recipe_id, subject, batch_id, state)"
                " SELECT :stage, :recipe, id, batch_id, 'done' FROM curator.examples"
            ),
            {"stage": stage, "recipe": recipe},
        )
    connection.execute(
        text(
            "INSERT INTO curator.gradients (recipe_id, example_id, state, whitened_norm, calibrated_loss)"
            " SELECT :recipe, id, 'ok', 1, 1 FROM curator.examples"
        ),
        {"recipe": recipe},
    )
    score(connection, recipe, range(1, BATCH + 1))


def add_directions(connection: Connection, recipe: int) -> None:
    connection.execute(text("UPDATE curator.direction_sets SET in_use = false WHERE recipe_id = :r"), {"r": recipe})
    connection.execute(
        text(
            "INSERT INTO curator.direction_sets (recipe_id, key, validation_set_ids, state, in_use)"
            " SELECT :r, count(*)::text::bytea, '{1}', 'ready', true FROM curator.direction_sets"
        ),
        {"r": recipe},
    )
    connection.execute(
        text(
            "INSERT INTO curator.directions (direction_set_id, validation_set_id, slice, ordinal, n)"
            " SELECT max(id), 1, 'all', 1, 1 FROM curator.direction_sets"
        )
    )


def score(connection: Connection, recipe: int, ids: Sequence[int], p_value: float = 0.001) -> None:
    """Scores on the directions in use that make each example a flag."""
    connection.execute(
        text(
            "INSERT INTO curator.scores (recipe_id, example_id, direction_set_id, influence, stderr, normalised,"
            " percentile, self_influence, harm, p_value)"
            " SELECT :recipe, n, (SELECT id FROM curator.direction_sets WHERE in_use AND recipe_id = :recipe),"
            " '{-1}', '{0.1}', '{-1}', '{0}', 1, '{1}', ARRAY[:p]::real[] FROM unnest(CAST(:ids AS bigint[])) n"
            " ON CONFLICT (recipe_id, example_id) DO UPDATE SET direction_set_id = excluded.direction_set_id"
        ),
        {"recipe": recipe, "ids": list(ids), "p": p_value},
    )


def judged(engine: Engine) -> list[tuple[int, int]]:
    """(direction set, examples) of each judgement."""
    with read(engine) as connection:
        rows = connection.execute(text("SELECT direction_set_id, judged FROM curator.judged_batches ORDER BY 1"))
        return [(row.direction_set_id, row.judged) for row in rows]


def judge(engine: Engine, settings: Settings) -> Counts:
    return Turn(engine, settings).run(verdicts, 30)


def offer(engine: Engine, recipe: int = 1) -> int:
    with begin(engine) as connection:
        return offers.verdicts(connection, recipe, [1])


def test_a_batch_that_is_through_is_offered_and_judged_once(arrived: Engine, settings: Settings) -> None:
    assert offer(arrived) == 1
    judge(arrived, settings)
    assert judged(arrived) == [(1, BATCH)]
    assert offer(arrived) == 0


@pytest.mark.parametrize(
    "missing",
    [
        "DELETE FROM curator.scores WHERE example_id = 3",
        "UPDATE curator.work SET state = 'leased' WHERE subject = 3",
        "DELETE FROM curator.scores WHERE example_id = 3; DELETE FROM curator.gradients WHERE example_id = 3;"
        " DELETE FROM curator.work WHERE subject = 3",  # nobody has offered it yet: its intake commits late
        "UPDATE curator.batches SET closed = false",
    ],
)
def test_a_batch_is_not_offered_while_one_of_its_examples_is_missing(arrived: Engine, missing: str) -> None:
    with begin(arrived) as connection:
        for statement in missing.split(";"):
            connection.execute(text(statement))
    assert offer(arrived) == 0


@pytest.mark.parametrize("why", ["no signal", "quarantined"])
def test_a_batch_without_any_score_is_judged_too(arrived: Engine, settings: Settings, why: str) -> None:
    """Else it would wait for ever, and every sweep would look at it again."""
    with begin(arrived) as connection:
        connection.execute(text("DELETE FROM curator.scores"))
        if why == "no signal":
            connection.execute(text("UPDATE curator.gradients SET state = 'no_signal'"))
        else:
            connection.execute(
                text(
                    "INSERT INTO curator.quarantine (example_id, code, detail) SELECT id, '', '' FROM curator.examples"
                )
            )
    assert offer(arrived) == 1
    judge(arrived, settings)
    assert judged(arrived) == [(1, 0)]


def test_replaced_directions_do_not_judge_half_a_batch(arrived: Engine, settings: Settings) -> None:
    """The batch waits to be judged; the directions are replaced, and half of it is scored anew."""
    offer(arrived)
    with begin(arrived) as connection:
        add_directions(connection, 1)
        assert offers.scores(connection, 1) == BATCH
        score(connection, 1, range(1, 6))
        connection.execute(text("UPDATE curator.work SET state = 'done' WHERE stage = 'scores' AND subject <= 5"))
    assert judge(arrived, settings) == Counts()
    assert judged(arrived) == []
    with begin(arrived) as connection:
        score(connection, 1, range(6, 11))
        connection.execute(text("UPDATE curator.work SET state = 'done' WHERE stage = 'scores'"))
    assert offer(arrived) == 1
    judge(arrived, settings)
    assert judged(arrived) == [(2, BATCH)]


def test_two_who_finish_a_batch_at_once_offer_it(arrived: Engine) -> None:
    """Each would see the other still at work, and the batch would wait for the next sweep."""
    with begin(arrived) as connection:
        connection.execute(text("UPDATE curator.work SET state = 'ready' WHERE stage = 'scores'"))
        leases = [work.claim(connection, Stage.SCORES, BATCH // 2, 30) for _ in range(2)]

    def finish(connection: Connection, lease: Lease | None) -> int:
        assert lease is not None
        assert work.finish(connection, lease)
        return offers.verdicts(connection, 1, [1])

    offered: list[int] = []

    def second() -> None:
        with begin(arrived) as connection:
            offered.append(finish(connection, leases[1]))

    with begin(arrived) as connection:
        assert finish(connection, leases[0]) == 0
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.5)
        assert offered == [], "it waits for the first to commit"
    thread.join()
    assert offered == [1]


def test_an_example_that_is_given_up_leaves_its_batch_to_be_judged(arrived: Engine, settings: Settings) -> None:
    with begin(arrived) as connection:
        connection.execute(text("DELETE FROM curator.scores WHERE example_id = 3"))
        connection.execute(
            text(
                "UPDATE curator.work SET state = 'ready', attempts = 3, last_error = 'it died'"
                " WHERE stage = 'scores' AND subject = 3"
            )
        )
        upkeep.run(connection, settings)
    judge(arrived, settings)
    assert judged(arrived) == [(1, BATCH - 1)]


def test_judging_a_batch_is_never_given_up(arrived: Engine, settings: Settings) -> None:
    offer(arrived)
    with begin(arrived) as connection:
        connection.execute(text("UPDATE curator.work SET attempts = 9 WHERE stage = 'verdicts'"))
        upkeep.run(connection, settings)
    judge(arrived, settings)
    assert judged(arrived) == [(1, BATCH)]


def test_scores_on_directions_that_were_replaced_go_back(arrived: Engine, settings: Settings) -> None:
    """Whoever replaced them could not offer work that was leased: it would stay on the old ones."""
    with begin(arrived) as connection:
        connection.execute(text("UPDATE curator.work SET state = 'ready' WHERE stage = 'scores'"))
    with begin(arrived) as connection:
        batch = scores.claim(connection, settings)
    assert batch is not None
    with begin(arrived) as connection:
        add_directions(connection, 1)
        offers.scores(connection, 1)
    with begin(arrived) as connection:
        assert scores.record(connection, settings, batch, None) == Counts(lost=BATCH)  # type: ignore[arg-type]
        assert work.waiting(connection) == {Stage.SCORES: BATCH}


def test_a_former_recipe_does_not_overrule_the_one_in_use(arrived: Engine, settings: Settings) -> None:
    """Its last batch may end after the batch was judged on the new one: its word came too late."""
    offer(arrived)
    with begin(arrived) as connection:
        late = verdicts.claim(connection, settings)
        add_recipe(connection)
    assert late is not None
    offer(arrived, 2)
    judge(arrived, settings)
    with begin(arrived) as connection:
        result = verdicts.compute(settings, late)
        assert verdicts.record(connection, settings, late, result) == Counts(lost=1)
        recipes = connection.scalars(
            text(
                "SELECT DISTINCT v.recipe_id FROM curator.verdicts v"
                " JOIN curator.verdicts_in_force f ON f.verdict_id = v.id"
            )
        ).all()
    assert recipes == [2]


def test_a_review_stands_though_the_batch_was_being_judged(arrived: Engine, settings: Settings) -> None:
    offer(arrived)
    with begin(arrived) as connection:
        batch = verdicts.claim(connection, settings)
    assert batch is not None
    with begin(arrived) as connection:
        reviews.review(connection, 3, Review.KEEP, actor="ada")
    with begin(arrived) as connection:
        verdicts.record(connection, settings, batch, verdicts.compute(settings, batch))
        said = store.in_force(connection, 3)
    assert said is not None
    assert (said.verdict, said.actor) == (Verdict.NEUTRAL, "ada")

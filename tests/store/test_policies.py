"""Policies: what each says of a batch, its version in every verdict, and what a change of them judges again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Engine, text

from curator.errors import BadSetting, UnknownPolicySlice, UnknownSetting
from curator.settings import Policy, Settings, load
from curator.stages import policies, upkeep, verdicts
from curator.stages.turn import Turn
from curator.store import offers
from curator.store.engine import begin, read
from tests.store.test_batches import BATCH, add_directions, arrived, offer, score  # noqa: F401 - a fixture

SLICES = ("maths", "safety")


def run(engine: Engine, settings: Settings) -> None:
    Turn(engine, settings, strict=True).run(verdicts, 30)


def judging(settings: Settings, **policy: Policy) -> Settings:
    return replace(settings, policy=policy)


def with_veto(settings: Settings, *slices: str) -> Settings:
    return replace(settings, verdicts=replace(settings.verdicts, veto=slices))


def history(engine: Engine, columns: str = "example_id, verdict, policy", review: str = "") -> list[Sequence[Any]]:
    with read(engine) as connection:
        rows = connection.execute(text(f"SELECT {columns} FROM curator.verdict_history {review} ORDER BY at, 1"))
        return [tuple(row) for row in rows]


@pytest.fixture
def two_slices(arrived: Engine) -> Engine:  # noqa: F811
    """Ten harmless examples on two slices; the first one helps maths and harms safety, beyond its error."""
    with begin(arrived) as connection:
        connection.execute(text("UPDATE curator.directions SET slice = 'maths'"))
        for statement in (
            "INSERT INTO curator.directions (direction_set_id, validation_set_id, slice, ordinal, n)"
            " VALUES (1, 1, 'safety', 2, 50)",
            "UPDATE curator.scores SET p_value = '{.9,.9}', normalised = '{.5,.1}', normalised_stderr = '{.05,.05}',"
            " influence = '{5,1}', stderr = '{1,1}', harm = '{.1,.1}'",
            "UPDATE curator.scores SET normalised = '{.9,-.4}' WHERE example_id = 1",
            "UPDATE curator.scores SET normalised = '{.8,-.04}' WHERE example_id = 2",
        ):
            connection.execute(text(statement))
    offer(arrived)
    return arrived


def test_without_a_veto_the_best_on_its_weakest_slice_is_valuable(two_slices: Engine, settings: Settings) -> None:
    run(two_slices, settings)
    assert [row[1] for row in history(two_slices)] == ["valuable"] * 2
    assert 1 not in {row[0] for row in history(two_slices)}


def test_what_harms_a_vetoed_slice_is_flagged_whatever_it_helps(two_slices: Engine, settings: Settings) -> None:
    """The second is below zero too, but by less than its error."""
    chooses = judging(settings, valuable=Policy(kind="valuable", slices=("trusted/maths",)))
    run(two_slices, with_veto(chooses, "trusted/safety"))
    said = {row[0]: row[1:] for row in history(two_slices)}
    assert said[1] == ("harmful", "veto")
    assert said[2] == ("valuable", "valuable")
    with read(two_slices) as connection:
        flag = connection.execute(text("SELECT validation_set, slice, reason FROM curator.flagged_examples")).one()
    assert flag[:2] == ("trusted", "safety")
    assert "works against trusted/safety" in flag.reason


def test_a_policy_on_a_slice_that_is_not_there_waits_and_says_so(two_slices: Engine, settings: Settings) -> None:
    with pytest.raises(UnknownPolicySlice, match=r"trusted/maths, trusted/safety"):
        run(two_slices, with_veto(settings, "trusted/safty"))
    assert history(two_slices) == []
    with read(two_slices) as connection:
        error = connection.scalar(text("SELECT last_error FROM curator.work WHERE stage = 'verdicts'"))
    assert "CUR-POL-001" in error


def test_an_outlier_is_one_among_the_references(two_slices: Engine, settings: Settings) -> None:
    with begin(two_slices) as connection:
        connection.execute(text("UPDATE curator.scores SET self_influence = 99 WHERE example_id = 3"))
        connection.execute(
            text(
                "INSERT INTO curator.validation_examples (validation_set_id, digest, record, slice, role)"
                " SELECT 1, n::text::bytea, '{}', 'maths', 'reference' FROM generate_series(1, 99) n"
            )
        )
        connection.execute(
            text(
                "INSERT INTO curator.reference_scores SELECT 1, id, '{0,0}', '{0,0}', '{0,0}', 2 + id"
                " FROM curator.validation_examples"
            )
        )
        connection.execute(text("UPDATE curator.scores SET self_influence = 200 WHERE example_id = 3"))
    run(two_slices, judging(settings, strange=Policy(kind="outlier", fdr=0.2)))
    assert (3, "harmful", "strange") in history(two_slices)
    assert [row[0] for row in history(two_slices) if row[1] == "harmful"] == [3]


def sketch(engine: Engine) -> None:
    """4, which holds an escaped NUL, and 5 are nearly the same as 3, and 5 has another label."""
    with begin(engine) as connection:
        connection.execute(
            text("UPDATE curator.examples SET record = :record WHERE id = 4"), {"record": '{"text": "\\u0000"}'}
        )
        connection.execute(text('UPDATE curator.examples SET record = \'{"label": "x"}\' WHERE id = 5'))
        connection.execute(
            text(
                "INSERT INTO curator.sketches (example_id, bands, of_id, similarity)"
                " SELECT n, '{1}', CASE WHEN n IN (4, 5) THEN 3 END, 1 FROM generate_series(1, 10) n"
            )
        )
        connection.execute(text("UPDATE curator.work SET not_before = now()"))


def test_copies_are_flagged_where_that_is_asked_and_the_first_to_arrive_is_not(
    two_slices: Engine, settings: Settings
) -> None:
    sketch(two_slices)
    run(two_slices, settings)
    assert "harmful" not in [row[1] for row in history(two_slices)]
    run(two_slices, judging(settings, copies=Policy(kind="duplicate")))
    flags = history(two_slices, "example_id, policy, p_value, q_value, reason", "WHERE verdict = 'harmful'")
    assert flags == [(4, "copies", 0, 0, "is nearly the same as example 3, which came before it")]


def test_a_batch_waits_for_the_search_for_copies(two_slices: Engine, settings: Settings) -> None:
    asking = judging(settings, copies=Policy(kind="duplicate"))
    run(two_slices, asking)
    assert history(two_slices) == []
    sketch(two_slices)
    run(two_slices, asking)
    assert (4, "harmful", "copies") in history(two_slices)


def test_every_verdict_carries_what_it_rests_on(arrived: Engine, settings: Settings) -> None:  # noqa: F811
    offer(arrived)
    run(arrived, settings)
    columns = "policy, policy_version, p_value, q_value, checkpoint, recipe, directions, actor, evidence"
    rows = history(arrived, columns)
    assert len(rows) == BATCH
    version = policies.version(settings.policies()["harmful"])
    policy, found, p, q, checkpoint, recipe, directions, actor, evidence = rows[0]
    assert (policy, found, checkpoint, recipe, directions, actor) == ("harmful", version, "base", "30", 1, "curator")
    assert (p, q) == (pytest.approx(0.001), pytest.approx(0.001))
    assert evidence["policies"]["harmful"] == {"p": pytest.approx(0.001), "q": pytest.approx(0.001)}
    assert evidence["harm"] == 1


def test_a_changed_policy_judges_again_what_it_concerns(two_slices: Engine, settings: Settings) -> None:
    """There and back: each time what is in force is what the policies say now, and nothing is said twice."""
    run(two_slices, settings)
    first = history(two_slices)
    vetoing = with_veto(settings, "trusted/safety")
    run(two_slices, vetoing)
    assert history(two_slices)[len(first) :] == [(1, "harmful", "veto")]
    run(two_slices, vetoing)
    assert len(history(two_slices)) == len(first) + 1
    run(two_slices, settings)
    assert history(two_slices)[len(first) + 1 :] == [(1, "neutral", "harmful")]


def test_upkeep_notices_changed_policies(two_slices: Engine, settings: Settings) -> None:
    """A daemon has nothing to judge when its settings change: somebody has to offer the batches again."""
    run(two_slices, settings)
    with begin(two_slices) as connection:
        upkeep.run(connection, with_veto(settings, "trusted/safety"))
        ready = connection.scalar(
            text("SELECT count(*) FROM curator.work WHERE stage = 'verdicts' AND state = 'ready'")
        )
    assert ready == 1


def test_former_directions_in_use_again_bring_their_verdicts_back(arrived: Engine, settings: Settings) -> None:  # noqa: F811
    offer(arrived)
    run(arrived, settings)
    with begin(arrived) as connection:
        add_directions(connection, 1)
        score(connection, 1, range(1, BATCH + 1))
        connection.execute(text("UPDATE curator.scores SET p_value = '{.9}', normalised = '{-1}'"))
    offer(arrived)
    run(arrived, settings)
    assert [row[1] for row in history(arrived)].count("neutral") == BATCH
    with begin(arrived) as connection:
        connection.execute(text("UPDATE curator.direction_sets SET in_use = false WHERE id = 2"))
        connection.execute(text("UPDATE curator.direction_sets SET in_use = true WHERE id = 1"))
        connection.execute(text("UPDATE curator.scores SET p_value = '{.001}', direction_set_id = 1"))
    assert offer(arrived) == 1
    run(arrived, settings)
    with read(arrived) as connection:
        assert connection.scalar(text("SELECT count(*) FROM curator.flagged_examples")) == BATCH
    assert offer(arrived) == 0


# --- a small batch is judged with earlier arrivals ---------------------------------------------------------------


@pytest.fixture
def small_after_large(arrived: Engine) -> Engine:  # noqa: F811
    """A second batch of one example, after the ten of the first, which nobody has judged."""
    with begin(arrived) as connection:
        for statement in (
            "INSERT INTO curator.batches (intake_id, ordinal, examples, closed) VALUES (1, 1, 1, true)",
            "INSERT INTO curator.examples (digest, source_id, batch_id, record) VALUES ('x', 1, 2, '{}')",
            "INSERT INTO curator.gradients (recipe_id, example_id, state, whitened_norm, calibrated_loss)"
            " VALUES (1, 11, 'ok', 1, 1)",
        ):
            connection.execute(text(statement))
        score(connection, 1, [11])
    return arrived


def judge_second(engine: Engine, settings: Settings) -> int | None:
    with begin(engine) as connection:
        offers.verdicts(connection, 1, [2])
    run(engine, settings)
    with read(engine) as connection:
        return connection.scalar(text("SELECT pool FROM curator.judged_batches WHERE batch_id = 2"))


def test_a_small_batch_waits_for_the_arrivals_it_is_judged_with(small_after_large: Engine, settings: Settings) -> None:
    """Else its flags would depend on who was faster."""
    with begin(small_after_large) as connection:
        connection.execute(text("UPDATE curator.work SET state = 'leased' WHERE stage = 'scores' AND subject = 4"))
    assert judge_second(small_after_large, settings) is None
    with begin(small_after_large) as connection:
        connection.execute(text("UPDATE curator.work SET state = 'done', not_before = now() WHERE subject = 4"))
        connection.execute(text("UPDATE curator.work SET not_before = now() WHERE stage = 'verdicts'"))
    assert judge_second(small_after_large, settings) == BATCH + 1


def test_fresh_arrivals_do_not_wait_for_back_fill(small_after_large: Engine, settings: Settings) -> None:
    with begin(small_after_large) as connection:
        connection.execute(
            text("UPDATE curator.work SET state = 'ready', priority = 5 WHERE stage = 'gradients' AND subject <= 4")
        )
    assert judge_second(small_after_large, settings) == BATCH - 4 + 1


# --- the rate over the stream ------------------------------------------------------------------------------------


def test_what_a_batch_spends_of_the_rate_is_kept_for_the_next(small_after_large: Engine, settings: Settings) -> None:
    """In the database: a restart forgets nothing, and a batch that is judged again pays once."""
    offer(small_after_large)
    run(small_after_large, settings)
    judge_second(small_after_large, settings)
    with read(small_after_large) as connection:
        rows = connection.execute(
            text("SELECT batch_id, stream, ordinal, n, level, rejected FROM curator.stream_levels ORDER BY ordinal")
        ).all()
    assert [(row.batch_id, row.stream, row.ordinal, row.n, row.rejected) for row in rows] == [
        (1, "vendor", 1, BATCH, BATCH),
        (2, "vendor", 2, 1, 1),
    ]
    assert 0 < rows[0].level < settings.verdicts.fdr
    with begin(small_after_large) as connection:
        connection.execute(text("DELETE FROM curator.judged_batches WHERE batch_id = 1"))
    offer(small_after_large)
    run(small_after_large, settings)
    with read(small_after_large) as connection:
        again = connection.scalar(text("SELECT level FROM curator.stream_levels WHERE batch_id = 1"))
    assert again == rows[0].level


def test_a_flag_has_to_hold_over_the_stream_where_that_is_asked(arrived: Engine, settings: Settings) -> None:  # noqa: F811
    """p = .08 is a flag at .10 in its batch; the first batch of a stream may spend less than half of that."""
    with begin(arrived) as connection:
        connection.execute(text("UPDATE curator.scores SET p_value = '{.08}', normalised = '{-1}'"))
    offer(arrived)
    strict = replace(settings, verdicts=replace(settings.verdicts, stream="source"))
    run(arrived, strict)
    assert history(arrived) == []
    run(arrived, settings)
    flags = history(arrived, "verdict, stream_q > stream_level")
    assert flags == [("harmful", True)] * BATCH


# --- settings ----------------------------------------------------------------------------------------------------


@pytest.fixture
def written(project: Any) -> Any:
    file = project / "curator.toml"

    def write(more: str) -> Settings:
        before = file.read_text()
        file.write_text(before + more)
        try:
            return load(project, {})
        finally:
            file.write_text(before)

    return write


def test_a_policy_takes_from_verdicts_what_it_does_not_say(written: Any) -> None:
    found = written('[verdicts]\nfdr = 0.05\n[policy.toxic]\nscore = "influence"\nslices = ["bad"]\n').policies()
    assert found["toxic"] == Policy("harmful", "influence", ("bad",), fdr=0.05, share=0.2)
    assert sorted(found) == ["harmful", "toxic", "valuable"]


def test_a_built_in_policy_can_be_changed_and_switched_off(written: Any) -> None:
    found = written("[policy.harmful]\nfdr = 0.2\n[policy.valuable]\nenabled = false\n")
    assert {name: each.fdr for name, each in found.policies().items()} == {"harmful": 0.2}
    rows = {key: origin for key, _, origin in found.rows()}
    assert rows["policy.harmful.fdr"] == "curator.toml"


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ('[policy.x]\nkind = "bad"\n', BadSetting),
        ("[policy.x]\nfdr = 0.9\n", BadSetting),
        ("[policy]\nx = 3\n", BadSetting),
        ('[policy."a b"]\n', BadSetting),
        ("[policy.x]\nslice = 3\n", UnknownSetting),
    ],
)
def test_a_policy_that_cannot_be_is_refused(written: Any, more: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        written(more)


def test_the_same_words_are_the_same_version() -> None:
    assert policies.version(Policy(fdr=0.1)) == policies.version(Policy(fdr=0.1))
    assert policies.version(Policy(fdr=0.1)) != policies.version(Policy(fdr=0.2))

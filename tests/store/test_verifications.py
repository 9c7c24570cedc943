"""A verification on its way in: the arms are what they say, and stay so; and what the command refuses."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sqlalchemy import text

from curator.settings import Limits, Settings
from curator.sources.files import open_records
from curator.stages import verifications
from curator.stages.arms import Pool, Trial, Wish, members, trials
from curator.store import offers, work
from curator.store import verifications as store
from curator.store.engine import begin, make_engine, read
from curator.types import Arm
from tests.store.conftest import Curator
from tests.store.read_world import World

Longs = NDArray[np.int64]


@pytest.fixture
def pool() -> Pool:
    rng = np.random.default_rng(0)
    flagged_N = np.arange(200) % 10 == 0
    return Pool(np.arange(1000, 1200), flagged_N, rng.random(200) + flagged_N, rng.integers(1, 50, 200))


def sets(pool: Pool, found: list[Trial], arm: Arm) -> list[set[int]]:
    """The examples of each trial of an arm, by a naive reading of what is left out and picked."""
    return [
        set(map(int, pool.ids_N if trial.picked is None else trial.picked))
        - set(map(int, [] if trial.left_out is None else trial.left_out))
        for trial in found
        if trial.arm == arm
    ]


def test_each_arm_is_what_it_says(pool: Pool) -> None:
    chosen = pool.ids_N[5:150:5][pool.ids_N[5:150:5] % 10 != 0]
    found = trials(pool, chosen, Wish(seeds=4, draws=3))
    everything, flagged = set(pool.ids_N.tolist()), set(pool.ids_N[pool.flagged_N].tolist())
    assert sets(pool, found, Arm.BASE) == [set()]
    assert sets(pool, found, Arm.ALL) == [everything]
    assert sets(pool, found, Arm.KEPT) == [everything - flagged]
    assert sets(pool, found, Arm.SELECTED) == [set(chosen.tolist())]
    [kept] = sets(pool, found, Arm.HIGHEST_LOSS_DROPPED)
    dropped = sorted(everything - kept)
    loss = dict(zip(pool.ids_N.tolist(), pool.loss_N.tolist(), strict=True))
    assert len(dropped) == len(flagged)
    assert min(loss[i] for i in dropped) > max(loss[i] for i in kept)
    for arm, size, among in (
        (Arm.RANDOM_DROPPED, len(everything - flagged), everything),
        (Arm.RANDOM_SELECTED, len(chosen), everything),
        (Arm.RANDOM_KEPT, len(chosen), everything - flagged),
    ):
        drawn = sets(pool, found, arm)
        assert [len(each) for each in drawn] == [size] * 12
        assert all(each <= among for each in drawn)
        assert len({frozenset(each) for each in drawn}) == 12, "each seed has draws of its own"


def test_every_arm_has_a_run_for_each_seed_and_every_draw_is_of_one(pool: Pool) -> None:
    found = trials(pool, pool.ids_N[1:5], Wish(seeds=3, draws=4, seed=7))
    for arm in Arm:
        of_arm = [trial for trial in found if trial.arm == arm]
        runs = [(seed, trial.draw) for trial in of_arm for seed in trial.seeds]
        if arm == Arm.BASE:
            assert runs == [(7, 0)]
        elif arm.startswith("random"):
            assert runs == [(seed, draw) for seed in (7, 8, 9) for draw in (1, 2, 3, 4)]
        else:
            assert runs == [(7, 0), (8, 0), (9, 0)]


def test_a_draw_takes_every_example_alike(pool: Pool) -> None:
    """400 draws of a tenth: each example is left out 40 times, give or take five deviations."""
    found = [t for t in trials(pool, None, Wish(seeds=100, draws=4)) if t.arm == Arm.RANDOM_DROPPED]
    times = np.bincount(np.concatenate([t.left_out for t in found if t.left_out is not None]) - 1000, minlength=200)
    assert np.abs(times - 40).max() < 5 * np.sqrt(400 * 0.1 * 0.9)


def test_a_selection_in_tokens_has_a_counterpart_of_as_many(pool: Pool) -> None:
    chosen = pool.ids_N[np.argsort(-pool.tokens_N)[:30]]
    found = trials(pool, np.sort(chosen), Wish(), by_tokens=True)
    tokens = dict(zip(pool.ids_N.tolist(), pool.tokens_N.tolist(), strict=True))
    spent = sum(tokens[i] for i in chosen.tolist())
    drawn = [sum(tokens[i] for i in each) for each in sets(pool, found, Arm.RANDOM_SELECTED)]
    assert all(spent - 50 < n <= spent for n in drawn)
    assert min(len(each) for each in sets(pool, found, Arm.RANDOM_SELECTED)) > 30


def test_the_seed_decides_and_nothing_else(pool: Pool) -> None:
    def drawn(seed: int) -> list[set[int]]:
        return sets(pool, trials(pool, None, Wish(seed=seed)), Arm.RANDOM_DROPPED)

    assert drawn(1) == drawn(1) != drawn(2)


def test_without_flags_there_are_only_the_selection_and_its_counterpart(pool: Pool) -> None:
    clean = Pool(pool.ids_N, np.zeros(200, bool), pool.loss_N, pool.tokens_N)
    arms = {trial.arm for trial in trials(clean, pool.ids_N[:9], Wish())}
    assert arms == {Arm.BASE, Arm.ALL, Arm.SELECTED, Arm.RANDOM_SELECTED}


def test_members_are_in_the_order_of_the_pool() -> None:
    ids = np.array([3, 5, 8, 9])
    assert members(ids, [9, 3], None).tolist() == [3, 9]
    assert members(ids, None, [5]).tolist() == [3, 8, 9]
    assert members(ids, [], None).tolist() == []


# --- what follows from the runs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    """A run that is over, on 30 validation examples of one slice, and 20 and 4 held-out ones of two."""

    arm: str
    seed: int
    validation_loss: list[float]
    held_out_loss: list[float]
    validation_correct: list[float] | None = None
    held_out_correct: list[float] | None = None


SLICES = {"validation": ["set/a"] * 30, "held-out": ["set/a"] * 20 + ["set/b"] * 4}


def runs(rng: np.random.Generator) -> list[Done]:
    """Losses fall by .1 where arms keep and rise by .2 where they drop at random; of slice b the other way round."""
    shift = {"base": 0.0, "all": 0.1, "kept": -0.1, "random-dropped": 0.2, "highest-loss-dropped": -0.05}
    found = []
    for arm, by in shift.items():
        for seed in (0,) if arm == "base" else (0, 1, 2):
            for _ in range(3 if arm == "random-dropped" else 1):
                loss = 1 + by + 0.01 * rng.normal(size=30)
                held = 1 + by * np.repeat([1, -1], [20, 4]) + 0.01 * rng.normal(size=24)
                right = (held < 1).astype(float).tolist()
                found.append(Done(arm, seed, loss.tolist(), held.tolist(), [1.0] * 30, right))
    return found


def test_a_result_is_the_mean_difference_turned_so_that_more_is_better() -> None:
    done = runs(np.random.default_rng(0))
    rows = {tuple(row[k] for k in ("arm", "beside", "part", "slice", "measure")): row
            for row in verifications.results(done, SLICES)}  # fmt: skip

    def mean(arm: str, column: str, of: slice = slice(None)) -> float:
        return float(np.mean([np.array(getattr(run, column))[of] for run in done if run.arm == arm]))

    found = rows["kept", "random-dropped", "held-out", "", "loss"]
    assert found["effect"] == pytest.approx(mean("random-dropped", "held_out_loss") - mean("kept", "held_out_loss"))
    assert found["mean"] == pytest.approx(mean("kept", "held_out_loss"))
    assert found["ci_low"] < found["effect"] < found["ci_high"]
    found = rows["kept", "all", "held-out", "set/a", "loss"]
    assert found["effect"] == pytest.approx(0.2, abs=0.01)
    found = rows["kept", "all", "held-out", "", "accuracy"]
    assert found["effect"] == pytest.approx(mean("kept", "held_out_correct") - mean("all", "held_out_correct"))
    assert rows["base", "base", "validation", "", "loss"]["effect"] == 0
    assert {key[3] for key in rows} == {"", "set/a"}, "four examples of a slice say nothing"
    assert {key[3] for key in rows if key[2] == "validation"} == {""}, "one slice is all there is"
    assert {key[1] for key in rows if key[0] == "kept"} == {"base", "all", "random-dropped", "highest-loss-dropped"}


def test_a_workload_that_cannot_tell_right_from_wrong_has_no_accuracy() -> None:
    done = [replace(run, validation_correct=None, held_out_correct=None) for run in runs(np.random.default_rng(0))]
    assert {row["measure"] for row in verifications.results(done, SLICES)} == {"loss"}


def test_the_view_and_the_words_say_what_the_results_do(curator: Curator) -> None:
    number = ask(curator, "--seeds", "3")
    worse = [replace(run, held_out_loss=[-x for x in run.held_out_loss]) for run in runs(np.random.default_rng(0))]
    with begin(make_engine(curator.url, pooled=False)) as connection:
        store.conclude(connection, number, list(verifications.results(worse, SLICES)))
    result = curator("verifications", "show", "--json")
    rows = {(row["arm"], row["slice"], row["measure"]): row for row in json.loads(result.stdout)}
    kept = rows["kept", None, "loss"]
    assert (kept["random_arm"], kept["control_arm"]) == ("random-dropped", "highest-loss-dropped")
    assert kept["beside_random"] < 0 < kept["validation_effect"]
    assert kept["beside_random_low"] < kept["beside_random"] < kept["beside_random_high"] < 0
    assert rows["all", None, "loss"]["random_arm"] is None
    assert "kept is WORSE than random-dropped: held-out loss better by -0.2" in result.stderr
    assert "slice set/a: kept is WORSE than random-dropped: held-out loss" in result.stderr


# --- the command ------------------------------------------------------------------------------------------------


def ask(curator: Curator, *arguments: str) -> int:
    result = curator("verify", "--no-wait", *arguments)
    assert result.exit_code == 0, result.output
    return int(curator.rows("verifications", "list")[0]["verification"])


def frozen(curator: Curator, number: int) -> list[tuple[Any, ...]]:
    with read(make_engine(curator.url, pooled=False)) as connection:
        rows = connection.execute(
            text(
                "SELECT arm, draw, picked, left_out, examples FROM curator.verification_trials"
                " WHERE verification_id = :id ORDER BY id"
            ),
            {"id": number},
        )
        return [tuple(row) for row in rows]


def test_what_is_asked_for_is_frozen(curator: Curator, world: World) -> None:
    number = ask(curator, "--seeds", "3")
    before = frozen(curator, number)
    [kept] = [row for row in before if row[0] == "kept"]
    assert kept[3] == list(world.flagged)
    curator("review", f"id:{world.flagged[0]}", "--keep")
    assert frozen(curator, number) == before
    [kept] = [row for row in frozen(curator, ask(curator, "--seeds", "3")) if row[0] == "kept"]
    assert kept[3] == list(world.flagged[1:])


def test_the_latest_selection_is_verified_or_the_one_that_is_named_or_none(curator: Curator) -> None:
    for name, budget in (("first", "20"), ("second", "30")):
        curator("select", "--budget", budget, "--name", name)
    sizes = [
        {row[4] for row in frozen(curator, ask(curator, *arguments)) if row[0] in ("selected", "random-selected")}
        for arguments in ((), ("--selection", "first"), ("--no-selection",))
    ]
    assert sizes == [{30}, {20}, set()]


def test_a_selection_of_which_nothing_can_be_trained_on_is_refused(curator: Curator) -> None:
    """Else the arm that is curator's, and the draws beside it, would be fifty trainings on nothing."""
    curator("select", "--budget", "2", "--name", "spent")
    with read(make_engine(curator.url, pooled=False)) as connection:
        chosen = connection.scalars(text("SELECT example_id FROM curator.selection_examples")).all()
    for number in chosen:
        curator("review", str(number), "--drop")
    for arguments in ((), ("--selection", "spent")):
        result = curator("verify", "--no-wait", *arguments)
        assert (result.exit_code, "CUR-VRF-011" in result.stderr) == (2, True)
    assert ask(curator, "--no-selection") == 1


def test_nothing_is_trained_on_that_it_is_measured_with(curator: Curator, tmp_path: Path) -> None:
    with begin(make_engine(curator.url, pooled=False)) as connection:
        connection.execute(
            text(
                "UPDATE curator.validation_examples SET digest = (SELECT digest FROM curator.examples WHERE id = 7)"
                " WHERE id = (SELECT min(id) FROM curator.validation_examples)"
            )
        )
        arrived = connection.scalar(text("SELECT record FROM curator.examples WHERE id = 9"))
    others = [{"text": f"a held-out text {n}", "label": "sport"} for n in range(6)]
    file = tmp_path / "held.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in [arrived, *others]))
    with begin(make_engine(curator.url, pooled=False)) as connection:  # its digest as the file's reader computes it
        digest = next(iter(open_records(file, Limits()))).digest  # type: ignore[union-attr]
        connection.execute(text("UPDATE curator.examples SET digest = :d WHERE id = 9"), {"d": digest})
    number = ask(curator, "--held-out", str(file))
    with read(make_engine(curator.url, pooled=False)) as connection:
        pool = connection.scalar(text("SELECT pool FROM curator.verifications WHERE id = :id"), {"id": number})
        held_out = connection.scalar(text("SELECT count(*) FROM curator.verification_records"))
    assert set(range(1, 601)) - set(pool) == {7, 9}
    assert held_out == 7


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--seeds", "2"), "CUR-VRF-004"),
        (("--draws", "1"), "CUR-VRF-004"),
        (("--seed", "-1"), "--seed"),
        (("--selection", "nobody"), "CUR-SEL-003"),
        (("--selection", "a", "--no-selection"), "exclude each other"),
    ],
)
def test_what_makes_no_sense_is_refused(curator: Curator, arguments: tuple[str, ...], code: str) -> None:
    result = curator("verify", *arguments)
    assert result.exit_code == 2
    assert code in result.stderr
    assert curator.rows("verifications", "list") == []


def test_a_held_out_file_of_trusted_examples_leaves_nothing(curator: Curator, tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text('{"text": "one", "label": "sport"}\n' * 9)
    result = curator("verify", "--held-out", str(tmp_path / "held.jsonl"))
    assert result.exit_code == 2
    assert "CUR-VRF-005: held.jsonl: at least 5 held-out examples" in result.stderr


def test_without_a_checkpoint_or_verdicts_there_is_nothing_to_verify(new_curator: Curator, curator: Curator) -> None:
    assert "CUR-CKP-014" in new_curator("verify").stderr
    with begin(make_engine(curator.url, pooled=False)) as connection:
        connection.execute(text("DELETE FROM curator.judged_batches"))
    assert "CUR-VRF-002" in curator("verify").stderr


def test_without_flags_and_without_a_selection_all_arms_would_be_one(curator: Curator) -> None:
    with begin(make_engine(curator.url, pooled=False)) as connection:
        connection.execute(text("UPDATE curator.verdicts_in_force SET verdict = 'neutral' WHERE verdict = 'harmful'"))
    result = curator("verify")
    assert (result.exit_code, "CUR-VRF-003" in result.stderr) == (2, True)
    curator("select", "--budget", "30")
    assert "so only the selection is verified" in curator("verify", "--no-wait").stderr


def test_one_that_is_cancelled_leaves_no_work(curator: Curator) -> None:
    number = ask(curator)
    assert {
        row["state"]: row["n"] for row in curator.rows("status")[0]["stages"] if row["stage"] == "verifications"
    } == {"ready": 31}
    assert curator("verifications", "cancel", str(number)).exit_code == 0
    assert curator.rows("verifications", "list")[0]["state"] == "cancelled"
    assert [row for row in curator.rows("status")[0]["stages"] if row["stage"] == "verifications"] == []
    assert "CUR-VRF-009" in curator("verifications", "cancel", str(number)).stderr
    for command in ("cancel", "show"):
        assert "CUR-VRF-008" in curator("verifications", command, "99").stderr


def test_a_run_that_comes_back_to_a_cancelled_verification_is_not_begun(curator: Curator) -> None:
    number = ask(curator)
    engine = make_engine(curator.url, pooled=False)
    with begin(engine) as connection:
        connection.execute(text("DELETE FROM curator.work WHERE stage = 'verifications'"))
        assert offers.missing(connection) >= 31, "a ledger that lost its rows has them again"
        batch = verifications.claim(connection, Settings(curator.project))
        assert batch is not None
    curator("verifications", "cancel", str(number))
    with begin(engine) as connection:
        work.give_back(connection, batch.lease)
        assert verifications.claim(connection, Settings(curator.project)) is None
        assert offers.verifications(connection) == 0
    assert {
        row["state"]: row["n"] for row in curator.rows("status")[0]["stages"] if row["stage"] == "verifications"
    } == {"done": 1}


def test_another_checkpoint_or_validation_set_takes_no_run_away(curator: Curator) -> None:
    """What is withdrawn with a recipe is what was to be measured under it."""
    ask(curator)
    with begin(make_engine(curator.url, pooled=False)) as connection:
        work.withdraw(connection, 99, 99)
        left = connection.scalar(text("SELECT count(*) FROM curator.work WHERE stage = 'verifications'"))
    assert left == 31

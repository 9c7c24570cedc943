"""Verifications: what is trained on what, what came of each run, and what follows from all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, text

from curator.store.reads import Rows
from curator.types import Arm


@dataclass(frozen=True, slots=True)
class Run:
    """One training: on which examples of the verification's pool, from which seed. None: as the workload says."""

    id: int
    verification_id: int
    state: str
    recipe_id: int
    arm: str
    draw: int
    seed: int
    picked: Sequence[int] | None
    left_out: Sequence[int] | None
    epochs: int | None
    batch: int | None
    learning_rate: float | None


@dataclass(frozen=True, slots=True)
class Inputs:
    """What all runs of a verification have in common: records to train on by number, and to measure with, in order."""

    pool: Mapping[int, Mapping[str, Any]]
    validation: Sequence[Mapping[str, Any]]
    held_out: Sequence[Mapping[str, Any]]


# --- asked for ------------------------------------------------------------------------------------------------


def pool(connection: Connection, recipe_id: int, set_id: int, held_out: Sequence[bytes]) -> Rows:
    """(example_id, flagged, loss, tokens) of what has been judged on the directions in use, in the order of arrival.

    Not of what is also, or nearly, in a validation set in use or among the ``held_out`` digests: whoever trains on the
    answers has proved nothing.
    """
    return list(
        connection.execute(
            text(
                """
                SELECT s.example_id, f.verdict IS NOT DISTINCT FROM 'harmful' AS flagged, g.loss, g.tokens
                FROM curator.scores s
                JOIN curator.examples e ON e.id = s.example_id
                JOIN curator.gradients g ON g.recipe_id = s.recipe_id AND g.example_id = s.example_id
                LEFT JOIN curator.verdicts_in_force f ON f.example_id = s.example_id
                WHERE s.recipe_id = :recipe AND s.direction_set_id = :directions
                  AND EXISTS (SELECT FROM curator.judged_batches j
                              WHERE j.batch_id = e.batch_id AND j.direction_set_id = :directions)
                  AND NOT EXISTS (SELECT FROM curator.validation_leaks l WHERE l.example_id = s.example_id)
                  AND e.digest <> ALL(CAST(:held_out AS bytea[]))
                ORDER BY s.example_id
                """
            ),
            {"recipe": recipe_id, "directions": set_id, "held_out": list(held_out)},
        )
    )


def chosen(connection: Connection, selection_id: int) -> list[int]:
    """The examples of a selection."""
    return list(
        connection.scalars(
            text("SELECT example_id FROM curator.selection_examples WHERE selection_id = :id"), {"id": selection_id}
        )
    )


def add(connection: Connection, facts: Mapping[str, Any], held_out: Sequence[str]) -> int:
    """A new verification with its held-out records, as JSON, where they are not the references. Returns its number."""
    number = connection.scalar(
        text(
            "INSERT INTO curator.verifications (recipe_id, direction_set_id, selection, held_out, seeds, draws, seed,"
            " epochs, batch, learning_rate, pool, actor) VALUES (:recipe_id, :direction_set_id, :selection, :held_out,"
            " :seeds, :draws, :seed, :epochs, :batch, :learning_rate, :pool, :actor) RETURNING id"
        ),
        dict(facts),
    )
    assert isinstance(number, int)
    if held_out:
        connection.execute(
            text(
                "INSERT INTO curator.verification_records (verification_id, position, record)"
                " VALUES (:id, :position, CAST(:record AS json))"
            ),
            [{"id": number, "position": position, "record": record} for position, record in enumerate(held_out)],
        )
    return number


def add_trials(connection: Connection, verification_id: int, trials: Sequence[Mapping[str, Any]]) -> list[int]:
    """The trials (arm, draw, seeds, picked, left_out, examples) with a run a seed; the runs, all arms seed by seed."""
    for trial in trials:
        connection.execute(
            text(
                "WITH trial AS (INSERT INTO curator.verification_trials"
                " (verification_id, arm, draw, picked, left_out, examples)"
                " VALUES (:id, :arm, :draw, :picked, :left_out, :examples) RETURNING id)"
                " INSERT INTO curator.verification_runs (trial_id, seed)"
                " SELECT trial.id, s FROM trial, unnest(CAST(:seeds AS bigint[])) s"
            ),
            {"id": verification_id, **trial, "arm": str(trial["arm"]), "seeds": list(trial["seeds"])},
        )
    rows = connection.execute(
        text(
            "SELECT r.id FROM curator.verification_runs r JOIN curator.verification_trials t ON t.id = r.trial_id"
            " WHERE t.verification_id = :id ORDER BY r.seed, r.id"
        ),
        {"id": verification_id},
    )
    return list(rows.scalars())


# --- worked off -----------------------------------------------------------------------------------------------

_OF_RUN = """
    FROM curator.verification_runs r
    JOIN curator.verification_trials t ON t.id = r.trial_id
    JOIN curator.verifications v ON v.id = t.verification_id
"""


def run(connection: Connection, run_id: int) -> Run:
    """A run, and what it is to be trained on."""
    row = connection.execute(
        text(
            "SELECT r.id, v.id AS verification_id, v.state, v.recipe_id, t.arm, t.draw, r.seed, t.picked, t.left_out,"
            f" v.epochs, v.batch, v.learning_rate {_OF_RUN} WHERE r.id = :id"
        ),
        {"id": run_id},
    ).one()
    return Run(*row)


def inputs(connection: Connection, verification_id: int) -> Inputs:
    """What its runs are trained on and measured with."""
    pool = connection.execute(
        text(
            "SELECT e.id, e.record FROM curator.verifications v JOIN curator.examples e ON e.id = ANY(v.pool)"
            " WHERE v.id = :id ORDER BY e.id"
        ),
        {"id": verification_id},
    )
    held_out = connection.scalars(
        text("SELECT record FROM curator.verification_records WHERE verification_id = :id ORDER BY position"),
        {"id": verification_id},
    ).all()
    measured = trusted(connection, verification_id)
    by_role = {role: [row.record for row in measured if row.role == role] for role in ("direction", "reference")}
    return Inputs({row.id: row.record for row in pool}, by_role["direction"], held_out or by_role["reference"])


def trusted(connection: Connection, verification_id: int) -> Rows:
    """(slice as set/slice, role, record) of the trusted examples behind its directions, in a fixed order."""
    return list(
        connection.execute(
            text(
                """
                SELECT s.name || '/' || e.slice AS slice, e.role, e.record
                FROM curator.verifications v
                JOIN curator.direction_sets d ON d.id = v.direction_set_id
                JOIN curator.validation_sets s ON s.id = ANY(d.validation_set_ids)
                JOIN curator.validation_examples e ON e.validation_set_id = s.id AND e.role <> 'contrast'
                WHERE v.id = :id ORDER BY e.validation_set_id, e.id
                """
            ),
            {"id": verification_id},
        )
    )


def lock(connection: Connection, verification_id: int) -> Row[Any]:
    """(state, held_out) of a verification, locked: of two that finish its last runs, the second sees the first's."""
    return connection.execute(
        text("SELECT state, held_out FROM curator.verifications WHERE id = :id FOR NO KEY UPDATE"),
        {"id": verification_id},
    ).one()


def record_run(connection: Connection, run_id: int, result: Mapping[str, Any]) -> None:
    """What came of a run: the columns of ``verification_runs``."""
    connection.execute(
        text(
            "UPDATE curator.verification_runs SET validation_loss = :validation_loss,"
            " validation_correct = :validation_correct, held_out_loss = :held_out_loss,"
            " held_out_correct = :held_out_correct, training = :training, seconds = :seconds,"
            " finished_at = clock_timestamp() WHERE id = :id"
        ),
        {"id": run_id, **result},
    )


def unfinished(connection: Connection, verification_id: int) -> int:
    """How many of its runs are still to come."""
    query = text(f"SELECT count(*) {_OF_RUN} WHERE v.id = :id AND r.finished_at IS NULL")
    return int(connection.scalar(query, {"id": verification_id}) or 0)


def outcomes(connection: Connection, verification_id: int) -> Rows:
    """(arm, seed, validation_loss, validation_correct, held_out_loss, held_out_correct) of all its runs."""
    return list(
        connection.execute(
            text(
                "SELECT t.arm, r.seed, r.validation_loss, r.validation_correct, r.held_out_loss, r.held_out_correct"
                f" {_OF_RUN} WHERE v.id = :id ORDER BY r.seed, r.id"
            ),
            {"id": verification_id},
        )
    )


def conclude(connection: Connection, verification_id: int, results: Sequence[Mapping[str, Any]]) -> None:
    """Write what follows from all runs (the columns of ``verification_results``): it is done."""
    connection.execute(
        text(
            "INSERT INTO curator.verification_results (verification_id, arm, beside, part, slice, measure, mean,"
            " effect, ci_low, ci_high) VALUES (:id, :arm, :beside, :part, :slice, :measure, :mean, :effect, :ci_low,"
            " :ci_high)"
        ),
        [{"id": verification_id, **row} for row in results],
    )
    _end(connection, verification_id, "done", None)


def fail(connection: Connection, run_id: int, reason: str) -> None:
    """A run cannot be finished, so nothing can be concluded: what is left of its verification is not begun."""
    found = run(connection, run_id)
    if lock(connection, found.verification_id).state == "running":
        where = f"arm {found.arm}, {f'draw {found.draw}, ' if found.draw else ''}seed {found.seed}"
        _end(connection, found.verification_id, "failed", f"{where}: {reason}")


def cancel(connection: Connection, verification_id: int) -> None:
    """Give it up: runs that are under way end, and are kept."""
    _end(connection, verification_id, "cancelled", None)


def _end(connection: Connection, verification_id: int, state: str, detail: str | None) -> None:
    connection.execute(
        text(
            "UPDATE curator.verifications SET state = :state, detail = :detail, finished_at = clock_timestamp()"
            " WHERE id = :id"
        ),
        {"id": verification_id, "state": state, "detail": detail},
    )
    connection.execute(
        text(
            f"""
            DELETE FROM curator.work WHERE stage = 'verifications' AND state = 'ready'
              AND subject IN (SELECT r.id {_OF_RUN} WHERE v.id = :id)
            """  # noqa: S608 - the joins above
        ),
        {"id": verification_id},
    )


# --- looked at ------------------------------------------------------------------------------------------------


def listing(connection: Connection) -> Rows:
    """Every verification, the latest first."""
    return list(
        connection.execute(
            text(
                f"""
                SELECT v.id AS verification, v.state, v.at, v.finished_at, v.actor, c.name AS checkpoint, v.selection,
                       v.held_out, v.seeds, v.draws, v.seed, v.detail, count(r.finished_at) AS finished,
                       count(*) AS runs, max(r.training) AS training, sum(r.seconds) AS seconds
                {_OF_RUN}
                JOIN curator.recipes p ON p.id = v.recipe_id JOIN curator.checkpoints c ON c.id = p.checkpoint_id
                GROUP BY v.id, c.name ORDER BY v.id DESC
                """
            )
        )
    )


def failed(connection: Connection) -> Row[Any] | None:
    """(verification, detail) of the latest, if it failed: one that was asked for since takes its place."""
    return connection.execute(
        text(
            "SELECT id AS verification, detail FROM curator.verifications"
            " WHERE state = 'failed' AND id = (SELECT max(id) FROM curator.verifications)"
        )
    ).one_or_none()


def progress(connection: Connection, verification_id: int) -> Row[Any] | None:
    """(state, detail, finished, runs, waits_for) of a verification; ``waits_for``: what the operator has to mend."""
    return connection.execute(
        text(
            f"""
            SELECT v.state, v.detail, count(r.finished_at) AS finished, count(*) AS runs,
                   max(w.last_error) FILTER (WHERE w.state = 'ready') AS waits_for
            {_OF_RUN}
            LEFT JOIN curator.work w ON w.stage = 'verifications' AND w.subject = r.id
            WHERE v.id = :id GROUP BY v.id
            """
        ),
        {"id": verification_id},
    ).one_or_none()


def arms(connection: Connection, verification_id: int) -> Rows:
    """The rows of the public view of a verification: all examples together first, then slice by slice."""
    return list(
        connection.execute(
            text(
                "SELECT * FROM curator.verification_arms WHERE verification = :id"
                " ORDER BY slice NULLS FIRST, measure DESC, array_position(CAST(:arms AS text[]), arm)"
            ),
            {"id": verification_id, "arms": list(Arm)},
        )
    )

"""The agreement of compressed with exact scores, day by day, and its alarm."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from sqlalchemy import Connection, text

from curator.store import fidelity as store
from curator.store.engine import begin, make_engine
from curator.views import fidelity
from curator.views.doctor import measures
from curator.views.status import status


@pytest.fixture
def writable(world_url: str) -> Iterator[Connection]:
    with begin(make_engine(world_url, pooled=False)) as connection:
        yield connection


def spread(connection: Connection, days: int) -> None:
    """Arrivals of so many days, the last of them today."""
    connection.execute(
        text("UPDATE curator.gradients SET computed_at = now() - make_interval(days => (example_id % :days)::integer)"),
        {"days": days},
    )


def test_every_day_s_figure_is_the_rank_correlation_of_its_pairs(writable: Connection) -> None:
    spread(writable, 2)
    store.measure(writable)
    rows = writable.execute(text("SELECT ordinal, day, n, spearman FROM curator.fidelities")).all()
    assert len(rows) == 3 * 2, "two slices and both together, two days"
    for row in rows:
        wanted = [row.ordinal] if row.ordinal else [1, 2]
        pairs = writable.execute(
            text(
                "SELECT s.normalised, g.exact FROM curator.scores s JOIN curator.gradients g"
                " USING (recipe_id, example_id, direction_set_id)"
                " WHERE g.exact IS NOT NULL AND (g.computed_at AT TIME ZONE 'UTC')::date = :day"
            ),
            {"day": row.day},
        ).all()
        compressed, exact = (
            np.array([[values[n - 1] for n in wanted] for values in column]).mean(axis=1)
            for column in zip(*pairs, strict=True)
        )
        ranks = [
            np.searchsorted(np.sort(x), x) + np.searchsorted(np.sort(x), x, side="right") for x in (compressed, exact)
        ]
        assert row.n == len(pairs)
        assert row.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-5)


def test_measured_again_a_late_day_is_replaced_and_an_early_one_stays(writable: Connection) -> None:
    spread(writable, 4)
    store.measure(writable)
    writable.execute(text("UPDATE curator.fidelities SET spearman = 0"))
    store.measure(writable)
    kept = writable.execute(
        text("SELECT day, bool_and(spearman = 0) AS stays FROM curator.fidelities GROUP BY day ORDER BY day")
    ).all()
    assert [row.stays for row in kept] == [True, True, False, False], "from the day before the last on"


def test_scores_of_later_directions_are_not_compared_with_exact_ones_of_former(writable: Connection) -> None:
    writable.execute(text("UPDATE curator.gradients SET direction_set_id = 0"))
    store.measure(writable)
    assert store.days(writable) == []


def history(connection: Connection, figures: Sequence[tuple[float, int]], ordinal: int = 0) -> None:
    today = datetime.date(2026, 3, 1)
    (set_id,) = connection.scalars(text("SELECT id FROM curator.direction_sets WHERE in_use"))
    connection.execute(
        text(
            "INSERT INTO curator.fidelities (direction_set_id, ordinal, day, n, spearman)"
            " VALUES (:set, :ordinal, :day, :n, :s)"
        ),
        [
            {"set": set_id, "ordinal": ordinal, "day": today + datetime.timedelta(days=i), "n": n, "s": s}
            for i, (s, n) in enumerate(figures)
        ],
    )


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ([(0.9, 500), (0.91, 500), (0.9, 500), (0.88, 500)], None),
        ([(0.9, 500), (0.5, 500)], "below 0.7"),
        ([(0.95, 500), (0.94, 500), (0.96, 500), (0.75, 500)], "0.95 in the first days"),
        ([(0.95, 100), (0.75, 100)], None),
        ([(0.9, 500), (0.1, 30)], None),
    ],
    ids=["steady", "below the floor", "fallen", "fallen within the noise", "too few to judge"],
)
def test_the_alarm_is_raised_below_the_floor_and_for_a_fall(
    writable: Connection, figures: list[tuple[float, int]], said: str | None
) -> None:
    history(writable, figures)
    (found,) = fidelity.latest(writable)
    assert (found.alarm is None) if said is None else (said in str(found.alarm))


def test_a_single_slice_may_agree_less_but_must_not_fall(writable: Connection) -> None:
    history(writable, [(0.4, 500), (0.42, 500), (0.41, 500)], ordinal=1)
    history(writable, [(0.5, 500), (0.52, 500), (0.2, 500)], ordinal=2)
    steady, fallen = fidelity.latest(writable)
    assert steady.alarm is None
    assert "in the first days" in str(fallen.alarm)


def test_status_and_doctor_say_it(world_url: str) -> None:
    engine = make_engine(world_url, pooled=False)
    with begin(engine) as connection:
        history(connection, [(0.3, 500)])
        assert any("raise [gradients] dimension" in note for note in status(connection).notes)
    (check,) = [check for check in measures(engine) if check.check == "fidelity"]
    assert (check.outcome, "0.30" in check.detail) == ("warn", True)


def test_doctor_says_when_the_trusted_data_behind_the_curvature_was_replaced(world_url: str) -> None:
    engine = make_engine(world_url, pooled=False)
    assert not [check for check in measures(engine) if check.check == "curvature"]
    with begin(engine) as connection:
        connection.execute(text("UPDATE curator.validation_sets SET digest = 'replaced'"))
        connection.execute(
            text(
                "INSERT INTO curator.validation_sets (name, version, digest, in_use)"
                " VALUES ('former', 1, 'former', false)"
            )
        )
        connection.execute(
            text("UPDATE curator.recipes SET fitted_on = (SELECT array_agg(id) FROM curator.validation_sets)")
        )
    (check,) = [check for check in measures(engine) if check.check == "curvature"]
    assert (check.outcome, "former v1" in check.detail) == ("warn", True)


def test_the_view_has_every_day(writable: Connection) -> None:
    spread(writable, 2)
    store.measure(writable)
    rows = writable.execute(text("SELECT * FROM curator.recipe_fidelity")).all()
    assert {(row.checkpoint, row.in_use) for row in rows} == {("base", True)}
    assert all(-1 <= row.spearman <= 1 and row.n >= 20 for row in rows)

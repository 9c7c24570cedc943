"""Groups of examples beside the trusted level: by source in SQL and in the report, by any field of the records."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Connection, text

from curator.store.engine import begin, make_engine, read
from curator.views import groups
from tests.store.conftest import Curator
from tests.store.read_world import SLICES, World

ANNOTATORS = ("ann", "bob", "cid", "dan")


def annotated(curator: Curator) -> Mapping[int, str | None]:
    """Give every record an annotator in its meta: dan drew the bad ones."""
    named = {n: "dan" if n % 8 == 1 else ANNOTATORS[n % 3] for n in range(1, 601)}
    with begin(make_engine(curator.url, pooled=False)) as connection:
        connection.execute(
            text("UPDATE curator.examples SET record = CAST(:record AS json) WHERE id = :id"),
            [
                {"id": n, "record": json.dumps({"text": "x", "batch": n % 2, "meta": {"who": {"name": name}}})}
                for n, name in named.items()
            ],
        )
    return named


def rows_of(curator: Curator, field: str) -> dict[tuple[str | None, str], groups.Group]:
    with read(make_engine(curator.url, pooled=False)) as connection:
        return {(row.value, row.slice): row for row in groups.by(connection, field)}


def test_a_group_is_the_mean_of_its_examples(curator: Curator, world: World) -> None:
    named = annotated(curator)
    found = rows_of(curator, "who.name")
    for s, slice_ in enumerate(SLICES):
        for name in ANNOTATORS:
            own = [n for n, who in named.items() if who == name]
            x = world.normalised_BS[np.array(own) - 1, s]
            row = found[name, slice_]
            assert row.n == len(own)
            assert row.mean_influence == pytest.approx(x.mean(), abs=1e-6)
            assert row.ci_low is not None
            assert row.mean_influence - row.ci_low == pytest.approx(1.97 * x.std(ddof=1) / np.sqrt(len(x)), rel=0.02)
            assert row.flagged == len(set(own) & set(world.flagged))


def test_who_drew_the_bad_ones_is_told_from_the_others(curator: Curator) -> None:
    annotated(curator)
    found = rows_of(curator, "who.name")
    bad = found["dan", SLICES[0]]
    assert bad.q_value is not None
    assert bad.q_value < 1e-6
    assert bad.beside_trusted is not None
    assert bad.beside_trusted < -0.5


def test_a_field_of_the_record_itself_groups_too(curator: Curator) -> None:
    annotated(curator)
    assert {value for value, _ in rows_of(curator, "batch")} == {"0", "1"}


def test_q_values_allow_for_the_number_of_groups(curator: Curator) -> None:
    annotated(curator)
    rows = list(rows_of(curator, "who.name").values())
    p = sorted(row.p_value for row in rows if row.p_value is not None)
    assert max(row.q_value for row in rows if row.q_value is not None) == pytest.approx(p[-1])
    assert min(row.q_value for row in rows if row.q_value is not None) >= p[0]


def test_a_record_that_cannot_be_read_into_has_no_group(curator: Curator) -> None:
    annotated(curator)
    with begin(make_engine(curator.url, pooled=False)) as connection:
        connection.execute(
            text("UPDATE curator.examples SET record = CAST(:r AS json) WHERE id <= 7"),
            {"r": '{"text": "\\u0000", "meta": {"who": {"name": "ann"}}}'},
        )
    assert rows_of(curator, "who.name")[None, SLICES[0]].n == 7


def test_a_field_that_nobody_has_is_refused_with_the_nearest(curator: Curator) -> None:
    annotated(curator)
    result = curator("report", "--by", "bacth")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "CUR-SRC-002" in result.stderr
    assert "Did you mean 'batch'?" in result.stderr
    assert "batch, text, who" in result.stderr


def test_a_project_without_scores_has_no_groups(new_curator: Curator) -> None:
    assert new_curator.rows("report", "--by", "source") == []
    assert new_curator.rows("report", "--by", "anything") == []


def test_the_view_and_the_report_say_the_same_of_a_source(connection: Connection) -> None:
    by_view: list[Mapping[str, Any]] = [
        row._mapping for row in connection.execute(text("SELECT * FROM curator.source_influence"))
    ]
    by_report = {(row.value, row.slice): row for row in groups.by(connection)}
    assert len(by_view) == len(by_report) == 6
    names = ("mean_influence", "ci_low", "ci_high", "flagged_share", "flagged_low", "flagged_high", "beside_trusted")
    for row in by_view:
        other = by_report[row["source"], row["slice"]]
        for name in names:
            assert row[name] == pytest.approx(getattr(other, name), abs=1e-6), name


def test_the_interval_beside_trusted_in_sql_is_welch_s(connection: Connection, world: World) -> None:
    """It excludes zero just where the test says that the source differs."""
    query = "SELECT source, slice, n, beside_trusted_low AS low, beside_trusted_high AS high"
    rows = connection.execute(text(f"{query} FROM curator.source_influence"))
    by_report = {(row.value, row.slice): row for row in groups.by(connection)}
    for row in rows:
        p = by_report[row.source, row.slice].p_value
        assert (row.low is None) == (p is None) == (row.n < 5)
        if p is not None:
            assert (row.low > 0 or row.high < 0) == (p < 0.05)


def test_the_page_has_a_table_of_the_groups(curator: Curator, tmp_path: Any) -> None:
    annotated(curator)
    out = tmp_path / "report.html"
    assert curator("report", "--out", str(out), "--by", "who.name").exit_code == 0
    body = out.read_text()
    assert "<h2>By who.name</h2>" in body
    assert '<td class="name">dan</td>' in body


def test_report_without_a_target_says_what_is_missing(curator: Curator) -> None:
    result = curator("report")
    assert result.exit_code == 2
    assert "--out FILE" in result.stderr

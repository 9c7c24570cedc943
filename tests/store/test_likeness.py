"""What is nearly the same is linked to what came first; what is in a validation set too is found in either order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import Engine, text

from curator.settings import Settings
from curator.stages import examples, likeness
from curator.stages.turn import Turn
from curator.store import likeness as store
from curator.store.engine import begin, read

MAIL = "the quick brown fox jumps over the lazy dog and then it goes home to sleep for a day or two by the fire " * 2
OTHER = "a completely different letter that speaks of ships and shoes and sealing wax, of cabbages and of kings " * 2


def take_in(engine: Engine, settings: Settings, texts: Sequence[str]) -> None:
    with begin(engine) as connection:
        connection.execute(
            text(
                "INSERT INTO curator.inbox (source, record)"
                " SELECT 'sql', CAST(r AS json) FROM unnest(CAST(:r AS text[])) r"
            ),
            {"r": [json.dumps({"text": said}) for said in texts]},
        )
    Turn(engine, settings).run(examples, 30)


def trust(engine: Engine, said: str, name: str = "trusted") -> None:
    with begin(engine) as connection:
        number = connection.scalar(
            text("INSERT INTO curator.validation_sets (name, version, digest) VALUES (:name, 1, 'x') RETURNING id"),
            {"name": name},
        )
        connection.execute(
            text(
                "INSERT INTO curator.validation_examples (validation_set_id, digest, record, slice, role)"
                " VALUES (:set, 'd', CAST(:record AS json), 'all', 'direction')"
            ),
            {"set": number, "record": json.dumps({"text": said})},
        )


def rows(engine: Engine, view: str) -> list[dict[str, Any]]:
    with read(engine) as connection:
        return [dict(row._mapping) for row in connection.execute(text(f"SELECT * FROM curator.{view} ORDER BY 1"))]


@pytest.mark.parametrize("chunk", [1, 2, 500])
def test_a_near_copy_is_linked_to_the_first_of_its_kind(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(likeness, "CHUNK", chunk)
    take_in(engine, settings, [MAIL, OTHER, MAIL + "!", MAIL + " really", OTHER.upper(), "short", "brief"])
    assert likeness.run(engine, 0.8, 60) == 7
    found = rows(engine, "near_duplicates")
    assert [(row["example_id"], row["of_example_id"]) for row in found] == [(3, 1), (4, 1), (5, 2)]
    assert all(0.8 <= row["similarity"] <= 1 for row in found)
    assert likeness.run(engine, 0.8, 60) == 0, "everything has its sketch"


def test_who_comes_later_is_found_too(engine: Engine, settings: Settings) -> None:
    take_in(engine, settings, [MAIL])
    likeness.run(engine, 0.8, 60)
    take_in(engine, settings, [MAIL + " x"])
    likeness.run(engine, 0.8, 60)
    assert [row["of_example_id"] for row in rows(engine, "near_duplicates")] == [1]


def test_what_says_nothing_is_like_nothing(engine: Engine, settings: Settings) -> None:
    take_in(engine, settings, ["?!", "...", "--"])
    assert likeness.run(engine, 0.8, 60) == 3
    assert rows(engine, "near_duplicates") == []


@pytest.mark.parametrize("order", ["trusted first", "arrivals first"])
def test_a_leak_is_found_whichever_came_first(engine: Engine, settings: Settings, order: str) -> None:
    steps = [lambda: trust(engine, MAIL), lambda: take_in(engine, settings, [OTHER, MAIL + " x", MAIL + " y"])]
    for step in steps if order == "trusted first" else reversed(steps):
        step()
        likeness.run(engine, 0.8, 60)
    found = rows(engine, "validation_leaks")
    assert [(row["example_id"], row["validation_set"]) for row in found] == [(2, "trusted"), (3, "trusted")]


def test_a_look_for_candidates_goes_by_the_bands(engine: Engine, settings: Settings) -> None:
    take_in(engine, settings, [f"mail {n} {MAIL}"[:40] for n in range(300)])
    likeness.run(engine, 1.0, 60)
    values = {"ids": [1, 2], "bands": ["{1,2}", "{3}"], "most": 8}
    with begin(engine) as connection:
        connection.exec_driver_sql("ANALYZE curator.sketches")
        store._prefer_bands(connection, True)
        plan = connection.scalars(text("EXPLAIN " + store.CANDIDATES_OF.text), values).all()
    assert "sketches_of_heads" in "\n".join(plan)

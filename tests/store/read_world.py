"""A small finished world for the read side: two slices, three vendors, scores, flags, refusals; no model in sight.

Vectors are drawn, everything else is computed from them as the daemon would, so what a command shows can be checked
against NumPy. Example 1 holds everything a record may do to a reader (docs/faults.md, 21).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Engine, text

from curator.influence.parts import COLUMNS
from curator.store import directions, recipes, scores, tensors, validation, vectors, verdicts
from curator.store.engine import begin

EVIL = "<script>alert(1)</script> \x1b[31mred\x1b[0m \u202egnp.exe =cmd()"
EVIL_SOURCE = "=cmd|' /C calc'!A0"
SLICES = ("science", "sport")
CENTRE_SC = np.array([[-0.5, 0.1, -1.0, -0.3, -0.6], [-0.4, 0.2, -2.0, -0.2, -0.7]])
SPREAD_SC = np.array([[0.2, 0.5, 1.5, 0.3, 0.2], [0.1, 0.4, 1.0, 0.2, 0.1]])
WEIGHT_SC = np.array([[1.0, 0.0, 2.0, 0.5, 0.5], [2.0, 1.0, 3.0, 1.5, 0.5]])
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class World:
    """What was put in: enough to compute every number again."""

    recipe_id: int
    direction_set_id: int
    unit_BK: Floats
    direction_SVK: Floats
    normalised_BS: Floats
    p_BS: Floats
    flagged: tuple[int, ...]
    duplicates: tuple[int, ...]


def populate(engine: Engine, *, examples: int = 600, trusted: int = 40, dimension: int = 32, seed: int = 0) -> World:
    """Fill an empty, migrated database. Every eighth example is bad; the last ten are copies of the best."""
    random = np.random.default_rng(seed)
    spread = 0.5 / np.sqrt(dimension)
    mean_SK = _unit(random.normal(size=(len(SLICES), dimension)))
    direction_SVK = _half(_unit(mean_SK[:, None, :] + random.normal(size=(2, trusted, dimension)) * spread))
    reference_RK = _unit(mean_SK.mean(0) + random.normal(size=(2 * trusted, dimension)) * spread)
    bad = np.arange(examples) % 8 == 0
    centre_BK = np.where(bad[:, None], -1.0, 1.0) * mean_SK.mean(0)
    unit_BK = _unit(centre_BK + random.normal(size=(examples, dimension)) * spread)
    unit_BK[-10:] = unit_BK[examples - 11]
    unit_BK = _half(unit_BK)
    with begin(engine) as connection:
        recipe_id, set_id, trusted_ids = _footing(connection, dimension, trusted)
        vectors.make_partitions(connection, recipe_id, dimension)
        vectors.write_validation(
            connection, recipe_id, np.array(trusted_ids), direction_SVK.reshape(-1, dimension).astype(np.float32)
        )
        reference_RS = reference_RK @ direction_SVK.mean(1).T
        _references(connection, set_id, reference_RS)
        mean_SK = direction_SVK.mean(1).astype(np.float32)
        means = {"mean/unit_SK": mean_SK, "mean/whitened_SK": 2 * mean_SK}
        tensors.keep(connection, "direction_tensors", "direction_set_id", set_id, means)
        _arrivals(connection, examples, bad, random)
        normalised_BS = unit_BK @ direction_SVK.mean(1).T
        p_BS = (1 + (reference_RS[None] <= normalised_BS[:, None]).sum(1)) / (len(reference_RS) + 1)
        _gradients(connection, recipe_id, set_id, unit_BK, normalised_BS, bad, random)
        _scores(connection, recipe_id, set_id, normalised_BS, p_BS)
        flagged = tuple(int(i) + 1 for i in np.flatnonzero(normalised_BS.mean(1) < -0.2))
        _verdicts(connection, recipe_id, set_id, flagged, normalised_BS, p_BS)
        _judged(connection, set_id)
        _leftovers(connection)
        # As autovacuum would by the time that anybody reads: without statistics a look at the flags takes seven times
        # as long.
        connection.execute(text("ANALYZE"))
    return World(
        recipe_id,
        set_id,
        unit_BK,
        direction_SVK,
        normalised_BS,
        p_BS,
        flagged,
        tuple(range(examples - 10, examples + 1)),
    )


def _unit(x: Floats) -> Floats:
    unit: Floats = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return unit


def _half(x: Floats) -> Floats:
    return x.astype(np.float16).astype(np.float64)


def _footing(connection: Connection, dimension: int, trusted: int) -> tuple[int, int, list[int]]:
    recipes.add_checkpoint(connection, "base", "/models/base.safetensors", b"c" * 32)
    recipes.use_checkpoint(connection, "base")
    rows = [
        validation.NewValidationExample(
            hashlib.sha256(f"{name}{role}{i}".encode()).digest(),
            f"v-{name}-{role}-{i}",
            json.dumps({"text": f"{role} {i} of {name} <b>", "label": name}),
            name,
            role,
        )
        for name in SLICES
        for role in ("direction", "reference")
        for i in range(trusted)
    ]
    set_id = validation.add_validation_set(connection, "trusted", "topic", b"v" * 32, rows)
    checkpoint = recipes.checkpoint_in_use(connection)
    assert checkpoint
    recipe_id = recipes.use_recipe(connection, b"r" * 32, checkpoint.id, {"mask": "coordinate"})
    recipes.recipe_fitted(connection, recipe_id, [set_id], dimension, 1.2)
    columns = {"first": [0, dimension // 4], "second": [dimension // 4, dimension]}
    tensors.keep(
        connection,
        "curvatures",
        "recipe_id",
        recipe_id,
        {f"{COLUMNS}{name}": np.array(ends) for name, ends in columns.items()},
    )
    direction_set = connection.scalar(
        text(
            "INSERT INTO curator.direction_sets (recipe_id, key, validation_set_ids)"
            " VALUES (:recipe, :key, :sets) RETURNING id"
        ),
        {"recipe": recipe_id, "key": b"d" * 32, "sets": [set_id]},
    )
    assert isinstance(direction_set, int)
    directions.record_directions(connection, direction_set, [(set_id, name, trusted, 0) for name in SLICES])
    directions.use_directions(connection, direction_set)
    scales = {"harm/centre": CENTRE_SC, "harm/spread": SPREAD_SC, "harm/weight": WEIGHT_SC}
    tensors.keep(connection, "direction_tensors", "direction_set_id", direction_set, scales)
    ids = [v.id for v in validation.validation_examples(connection, [set_id]) if v.role == "direction"]
    return recipe_id, direction_set, ids


def _references(connection: Connection, set_id: int, reference_RS: Floats) -> None:
    ids = connection.scalars(
        text("SELECT id FROM curator.validation_examples WHERE role = 'reference' ORDER BY id")
    ).all()
    rows = [
        {
            "id": number,
            "normalised": row.tolist(),
            "influence": row.tolist(),
            "harm": ((1 - row) / 2).tolist(),
            "self_influence": 1.0,
        }
        for number, row in zip(ids, reference_RS.astype(float), strict=True)
    ]
    directions.record_references(connection, set_id, rows)


def _arrivals(connection: Connection, examples: int, bad: NDArray[np.bool_], random: np.random.Generator) -> None:
    run = connection.execute
    for name in ("vendor-a", "vendor-b", EVIL_SOURCE):
        run(text("INSERT INTO curator.sources (name) VALUES (:n)"), {"n": name})
    run(
        text(
            "INSERT INTO curator.intakes (source_id, origin, digest, state, accepted)"
            " SELECT id, name || '.jsonl', 'x', 'complete', 1 FROM curator.sources ORDER BY id"
        )
    )
    run(
        text(
            "INSERT INTO curator.batches (intake_id, ordinal, closed)"
            " SELECT id, 0, true FROM curator.intakes ORDER BY id"
        )
    )
    rows = []
    for i in range(examples):
        # The bad ones come from vendor-b, but for the first, which is evil itself.
        owner = 3 if i == 0 else 2 if bad[i] or random.random() < 0.2 else 1
        body = EVIL if i == 0 else f"example {i} says something"
        record = {"id": f"ext-{i}", "label": "sport" if i % 2 else "science", "text": body}
        rows.append(
            {
                "digest": hashlib.sha256(str(i).encode()).digest(),
                "external_id": record["id"],
                "owner": owner,
                "record": json.dumps(record, ensure_ascii=False, sort_keys=True),
            }
        )
    run(
        text(
            "INSERT INTO curator.examples (digest, external_id, source_id, batch_id, record)"
            " VALUES (:digest, :external_id, :owner, :owner, CAST(:record AS json))"
        ),
        rows,
    )
    run(text("UPDATE curator.examples SET position = id"))


def _gradients(
    connection: Connection,
    recipe_id: int,
    set_id: int,
    unit_BK: Floats,
    normalised_BS: Floats,
    bad: NDArray[np.bool_],
    random: np.random.Generator,
) -> None:
    ids = np.arange(1, len(unit_BK) + 1)
    vectors.write(connection, recipe_id, ids, unit_BK.astype(np.float32))
    exact_BS = normalised_BS + random.normal(size=normalised_BS.shape) / 30
    loss_B = random.gamma(2.0, 0.2, size=len(ids)) + bad
    connection.execute(
        text(
            "INSERT INTO curator.gradients (recipe_id, example_id, state, loss, calibrated_loss, gradient_norm,"
            " whitened_norm, direction_set_id, exact)"
            " VALUES (:recipe, :id, 'ok', :loss, :loss, :norm, :norm, :set_id, :exact)"
        ),
        [
            {
                "recipe": recipe_id,
                "id": int(i),
                "loss": float(l),
                "norm": float(2 * l),
                "set_id": set_id,
                "exact": e.tolist(),
            }
            for i, l, e in zip(ids, loss_B, exact_BS.astype(float), strict=True)  # noqa: E741
        ],
    )


def _scores(connection: Connection, recipe_id: int, set_id: int, normalised_BS: Floats, p_BS: Floats) -> None:
    rows = [
        {
            "id": i,
            "influence": [float(x) * 3 for x in n],
            "stderr": [0.01] * len(n),
            "normalised": [float(x) for x in n],
            "normalised_stderr": [0.01] * len(n),
            "percentile": [float(x) for x in p],
            "self_influence": 1.0,
            "neighbours": [float(x) for x in n],
            "familiarity": [abs(float(x)) for x in n],
            "harm": [float(1 - x) / 2 for x in n],
            "p_value": [float(x) for x in p],
        }
        for i, (n, p) in enumerate(zip(normalised_BS, p_BS, strict=True), start=1)
    ]
    scores.upsert(connection, recipe_id, set_id, rows)


def _verdicts(
    connection: Connection, recipe_id: int, set_id: int, flagged: tuple[int, ...], normalised_BS: Floats, p_BS: Floats
) -> None:
    harmful = set(flagged)
    rows = [
        {
            "id": i,
            "verdict": "harmful"
            if i in harmful
            else "valuable"
            if n[0] > np.quantile(normalised_BS[:, 0], 0.8)
            else "neutral",
            "recipe": recipe_id,
            "set_id": set_id,
            "influence": float(n[0]) * 3,
            "p": float(p[0]),
        }
        for i, (n, p) in enumerate(zip(normalised_BS, p_BS, strict=True), start=1)
    ]
    connection.execute(
        text(
            "INSERT INTO curator.verdicts (example_id, verdict, reason, actor, policy, recipe_id, direction_set_id,"
            " ordinal, influence, stderr, p_value, q_value) VALUES (:id, :verdict, 'harm against trusted references',"
            " 'curator', 'default', :recipe, :set_id, 1, :influence, .01, :p, least(1, CAST(:p AS real) * 2))"
        ),
        rows,
    )
    connection.execute(
        text(
            "INSERT INTO curator.verdicts_in_force (example_id, verdict_id, verdict)"
            " SELECT example_id, id, verdict FROM curator.verdicts"
        )
    )


def _judged(connection: Connection, set_id: int) -> None:
    policies = verdicts.use_policies(connection, b"p", "{}")
    for batch_id in (1, 2, 3):
        verdicts.note_judged(connection, batch_id, set_id, policies, judged=1, pool=1, refs=80, fdr=0.1, flagged=1)


def _leftovers(connection: Connection) -> None:
    connection.execute(
        text(
            "INSERT INTO curator.quarantine (source_id, intake_id, position, code, detail, raw)"
            " VALUES (1, 1, 7, 'CUR-TXT-002', :detail, :raw),"
            " (2, 2, 9, 'CUR-TXT-001', 'Byte 3 is not UTF-8.', '\\xff'),"
            " (2, 2, 10, 'CUR-TXT-001', 'Byte 4 is not UTF-8.', '\\xff')"
        ),
        {"detail": f"The record is not valid JSON: {EVIL}", "raw": b'{"text": \x1b[31m'},
    )
    connection.execute(
        text(
            "INSERT INTO curator.work (stage, recipe_id, subject, state, offered_at)"
            " SELECT 'gradients', 1, id, 'done', now() FROM curator.examples"
            " UNION ALL VALUES ('scores', 1, 1, 'ready', now() - interval '90 seconds')"
        )
    )

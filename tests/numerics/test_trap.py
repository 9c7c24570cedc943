"""The default recipe finds wrong labels on overconfident, calibrated and under-trained checkpoints alike."""

import pytest
from sklearn.datasets import load_digits

from tests.numerics.trap import Checkpoint, character, detection, split, table, train

CHECKPOINTS = {
    "overconfident": Checkpoint(200, rate=3e-3),
    "calibrated": Checkpoint(60),
    "under-trained": Checkpoint(8),
}


@pytest.fixture(scope="module")
def data():
    x, y = load_digits(return_X_y=True)
    return split(x / 16, y, base=300, arrivals=900, trusted=500, seed=0)


@pytest.fixture(scope="module")
def models(data):
    return {name: train(data.base, how, seed=0) for name, how in CHECKPOINTS.items()}


@pytest.fixture(scope="module")
def figures(data, models):
    found = {name: detection(model, data, seed=0) for name, model in models.items()}
    print("\n" + table(found))
    return found


def test_the_checkpoints_are_what_they_are_called(data, models):
    accuracy, temperature = zip(*(character(model, data) for model in models.values()), strict=True)
    assert accuracy[2] < 0.85 < 0.9 < min(accuracy[:2])
    assert temperature[0] > 1.8 > 1.3 > temperature[1] > 0.7


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_the_default_recipe_finds_wrong_labels(figures, checkpoint):
    assert figures[checkpoint]["normalised influence (the default)"] >= 0.95


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_the_exact_scores_do_too(figures, checkpoint):
    assert figures[checkpoint]["the same, exact on arrival"] >= 0.95


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_plain_influence_on_the_margin_keeps_its_sign(figures, checkpoint):
    assert figures[checkpoint]["influence on the margin (the default)"] >= 0.9


def test_the_trap_is_there_to_be_fallen_into(figures):
    trapped = figures["overconfident"]
    assert trapped["influence on the loss, plain Fisher"] < 0.7
    assert trapped["gradient dot, full gradients"] < 0.7
    assert trapped["normalised influence, plain Fisher"] < trapped["normalised influence (the default)"] - 0.02
    assert 0.4 < trapped["random"] < 0.6

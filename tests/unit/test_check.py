"""What `curator doctor` tries on the user's model: is an example measured alike alone and among others (fault 29)?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curator.influence.attribution import Attributor, RecipeSpec
from curator.stages.instrument import Instrument, Room
from curator.store.recipes import Checkpoint, Recipe
from tests.digits_workload import Digits
from workers import check

RECORDS = [
    {"x": torch.randn(64, generator=torch.Generator().manual_seed(n)).tolist(), "y": n % 10}
    for n in range(check.SAMPLE)
]


class Centred(Digits):
    """As a batch norm in training mode does, hidden in the loss."""

    def losses(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return super().losses(model, (x - x.mean(dim=0), y))


def tools(workload: Digits) -> Instrument:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 10)).eval()
    spec = RecipeSpec(dimension=40, exact=False)
    batch = workload.collate(RECORDS)
    recipe = Recipe(1, Checkpoint(1, "base", str(Path()), b"", in_use=True), {}, 40, 1.0, "ready", in_use=True)
    attributor = Attributor.fit(model, workload.losses, [batch], spec)
    settings: dict[str, Any] = {"recipe": recipe, "workload": workload, "model": model, "spec": spec}
    return Instrument(**settings, device=torch.device("cpu"), room=Room(8, 1_000), attributor=attributor)


def test_an_example_is_measured_alike_alone_and_among_others() -> None:
    assert check.batch_dependence(tools(Digits()), RECORDS) < check.TOLERANCE / 10


def test_what_depends_on_the_batch_is_far_beyond_the_tolerance() -> None:
    assert check.batch_dependence(tools(Centred()), RECORDS) > 10 * check.TOLERANCE


@pytest.mark.parametrize(
    ("temperature", "said"), [(1.0, ""), (2.4, "plain influence of its loss would mislead"), (20.0, "wrong on most")]
)
def test_it_says_when_the_plain_loss_would_mislead(temperature: float, said: str) -> None:
    checkpoint = Checkpoint(1, "base", "", b"", in_use=True)
    meaning = check._meaning(Recipe(1, checkpoint, {}, 40, temperature, "ready", in_use=True))
    assert (said in meaning) if said else not meaning

"""How many records a forward pass takes: a budget of padded tokens that memory may cut down."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from curator.influence.attribution import Attributor, RecipeSpec
from curator.stages import gradients
from curator.stages.instrument import Instrument, Room
from curator.types import Lease, Stage


class Padded:
    """Records are lists of numbers; a pass over more than ``memory`` padded numbers runs out of it."""

    def __init__(self, memory=10**9):
        self.memory, self.sizes = memory, []

    def collate(self, records):
        width = max((len(r) for r in records), default=1)
        rows = [[*r, *[0.0] * (width - len(r))] for r in records]
        return torch.tensor(rows).reshape(len(records), width)

    def losses(self, model, batch):
        if batch.numel() > self.memory:
            raise torch.OutOfMemoryError("full")
        self.sizes.append(batch.shape)
        return model(batch[..., None]).tanh().square().sum(dim=(1, 2))

    def n_tokens(self, record):
        return len(record)

    def n_cut(self, record):
        return 2 * len(record)


def instrument(memory=10**9, tokens=40, examples=5):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(1, 3, bias=False)
    workload = Padded(memory)
    trusted = [workload.collate([[0.5, 1.0], [2.0, -1.0], [0.1, 0.3]])]
    fitted = Attributor.fit(model, workload.losses, trusted, RecipeSpec(dimension=3, exact=False))
    workload.sizes.clear()
    return Instrument(
        SimpleNamespace(), workload, model, torch.device("cpu"), fitted.spec, Room(examples, tokens), attributor=fitted
    )


RECORDS = [[0.1 * (i + 1) * (-1) ** j for j in range(length)] for i, length in enumerate([3, 9, 1, 30, 2, 9, 4, 1])]


@given(lengths=st.lists(st.integers(0, 60), max_size=30), tokens=st.integers(1, 100), examples=st.integers(1, 9))
def test_a_batch_is_within_the_room_unless_it_is_one_record(lengths, tokens, examples):
    room, start = Room(examples, tokens), 0
    while start < len(lengths):
        n = room.fitting(lengths[start:])
        assert 1 <= n <= examples
        assert n == 1 or n * max(lengths[start : start + n]) <= tokens
        start += n
    assert start == len(lengths)


def test_like_lengths_go_together_and_the_order_is_kept():
    tools = instrument()
    found = tools.measure(RECORDS)
    assert [tuple(size) for size in tools.workload.sizes] == [(5, 4), (2, 9), (1, 30)]
    for row, record in enumerate(RECORDS):
        alone = tools.measure([record])
        torch.testing.assert_close(found.loss_B[row], alone.loss_B[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(found.unit_BK[row], alone.unit_BK[0], rtol=0, atol=1e-6)


def test_memory_that_runs_out_halves_the_room_for_good():
    tools = instrument(memory=32, tokens=1000, examples=100)
    expected = instrument().measure(RECORDS)
    found = tools.measure(RECORDS)
    torch.testing.assert_close(found.unit_BK, expected.unit_BK, rtol=0, atol=1e-6)
    assert tools.room.tokens <= 32
    tools.workload.sizes.clear()
    tools.measure(RECORDS[:3])
    assert all(size.numel() <= 32 for size in tools.workload.sizes)


def test_one_record_that_does_not_fit_is_no_reason_to_shrink():
    tools = instrument(memory=20, tokens=16, examples=100)
    with pytest.raises(torch.OutOfMemoryError):
        tools.measure(RECORDS)
    assert tools.room.tokens == 16


def test_no_records_are_an_empty_result():
    assert instrument().measure([]).unit_BK.shape == (0, 3)


def test_what_is_seen_and_what_is_cut_of_a_record_are_counted():
    lease = Lease("me", Stage.GRADIENTS, 1, (7, 8), (1, 2))
    result = gradients.compute(instrument(), gradients.Batch(lease, 1, None, {7: RECORDS[0], 8: RECORDS[1]}))
    assert result.lengths == {7: {"tokens": 3, "cut_tokens": 6}, 8: {"tokens": 9, "cut_tokens": 18}}

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from curator.views import plots
from curator.views.groups import Group
from curator.views.report import uniformity


def ranks(values: NDArray[np.float64], references: int) -> list[tuple[float, int]]:
    p, n = np.unique(np.ceil(values * (references + 1)) / (references + 1), return_counts=True)
    return list(zip(p.tolist(), n.tolist(), strict=True))


def test_uniform_p_values_hold_in_nearly_every_draw() -> None:
    random = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        references = np.sort(random.random(200))
        arrivals = np.searchsorted(references, random.random(2_000)) + 1
        p, n = np.unique(arrivals / 201, return_counts=True)
        held += uniformity(list(zip(p.tolist(), n.tolist(), strict=True)), 200).holds
    assert held >= 190


def test_harm_at_the_left_does_not_disturb_the_bulk() -> None:
    random = np.random.default_rng(0)
    mixed = np.concatenate([random.random(2_000), random.random(500) * 0.01])
    found = uniformity(ranks(mixed, 500), 500)
    assert found.holds
    assert found.plausible
    assert found.harmless_share == pytest.approx(0.8, abs=0.05)


def test_arrivals_of_another_distribution_are_noticed() -> None:
    random = np.random.default_rng(0)
    for a, b in ((5, 2), (2, 5), (8, 8), (1, 3)):
        found = uniformity(ranks(random.beta(a, b, 2_000), 500), 500)
        assert not (found.holds and found.plausible), (a, b)


def test_nothing_can_be_said_of_a_few() -> None:
    assert uniformity([], 0).holds
    assert uniformity([(0.9, 5)], 10).holds


@given(
    st.floats(-1e6, 1e6, allow_nan=False),
    st.floats(1e-6, 1e6, allow_nan=False),
)
def test_ticks_are_few_and_inside(low: float, span: float) -> None:
    found = plots.ticks(low, low + span)
    slack = span * 1e-6 + 1e-9
    assert len(found) <= 7
    assert all(low - slack <= tick <= low + span + slack for tick in found)


def test_bars_stand_on_the_axis_and_stack() -> None:
    drawn = plots.histogram([(10, 4), (0, 0), (5, 5)], expected=3)
    foot = plots.HEIGHT - plots.BOTTOM
    assert all(bar.y >= plots.TOP and bar.y + bar.height <= foot + 1e-9 for bar in drawn.bars)
    assert [bar.kind for bar in drawn.bars] == ["all", "marked", "marked"]
    assert drawn.bars[0].y + drawn.bars[0].height == pytest.approx(drawn.bars[1].y)


def test_a_plot_of_nothing_is_drawn() -> None:
    assert plots.histogram([(0, 0)] * 4).bars == ()
    assert plots.scatter([]).dots == ()
    assert plots.forest([]).rows == ()


def group(**known: object) -> Group:
    facts = dict.fromkeys(Group.__dataclass_fields__) | {"value": "a", "n": 9, "flagged_share": 0.0} | known
    return Group(**facts)


def test_all_words_of_a_forest_are_on_the_canvas() -> None:
    long = {"value": "s" * 40, "mean_influence": -3.0, "n": 9_999_999}
    drawn = plots.forest([group(**long, flagged_share=1.0), group(**long, ci_low=-9.0, ci_high=2.0, flagged_share=0.5)])
    letter = 6.7  # of a font of 12 px, on average
    for each in drawn.rows:
        assert len(each.label) * letter <= plots.NAME
        assert plots.WIDTH - plots.NOTE + 10 + len(each.note) * letter <= plots.WIDTH
    assert drawn.rows[0].low is drawn.rows[0].high is None


def test_the_mean_of_trusted_references_is_on_the_canvas() -> None:
    drawn = plots.forest([group(mean_influence=0.1, ci_low=0.0, ci_high=0.2)], trusted=5.0)
    assert drawn.trusted is not None
    assert plots.NAME < drawn.zero < drawn.rows[0].middle < drawn.trusted < plots.WIDTH - plots.NOTE


def test_equal_ranks_lie_on_the_diagonal() -> None:
    dots = plots.scatter([(x, x, False) for x in (0.0, 0.25, 1.0)]).dots
    assert {round(dot.x + dot.y, 6) for dot in dots} == {round(dots[0].x + dots[0].y, 6)}

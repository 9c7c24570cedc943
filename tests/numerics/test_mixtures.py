"""Contrasts are linear in the slices."""

import pytest
import torch

from curator.errors import NoSuchSlice
from curator.influence import naive, scoring
from curator.influence.attribution import Attributor, RecipeSpec
from curator.influence.mixtures import weights
from tests.numerics.small_models import case

CONTRASTS = {"bad - good": {"bad": 1.0, "good": -1.0}, "half": {"good": 0.5}}


@pytest.mark.parametrize("changes", [{}, {"exact_curvature": "ekfac"}, {"code": "pca", "code_dimension": 5}], ids=str)
def test_a_contrast_direction_scores_like_the_difference_of_its_slices(changes):
    c = case("positions")
    good, bad, arrived = c.batch(6, 2, 0), c.batch(5, 2, 1), c.batch(4, 2, 2)
    a = Attributor.fit(c.model, c.losses, [good, bad], RecipeSpec(dimension=24, **changes))
    V = {"good": a.measure(good), "bad": a.measure(bad)}
    towards = a.directions({name: [m] for name, m in V.items()})
    slices = {"good": [good], "bad": [bad]}
    exact, contrasts = a.exact_directions(slices), a.exact_directions(slices, CONTRASTS)
    Z, mixed = a.measure(arrived, exact), a.measure(arrived, contrasts)
    plain = scoring.score(Z.unit_BK, Z.whitened_norm_B, towards)
    contrast = scoring.score(Z.unit_BK, Z.whitened_norm_B, towards.mixed(CONTRASTS))
    assert towards.mixed(CONTRASTS).count_S.tolist() == [11, 6]
    for whole, found in (
        (plain.normalised_BS, contrast.normalised_BS),
        (plain.influence_BS, contrast.influence_BS),
        (Z.exact_BS, mixed.exact_BS),
        (Z.exact_influence_BS, mixed.exact_influence_BS),
    ):
        for b in range(4):
            scores = dict(zip(("good", "bad"), whole[b].tolist(), strict=True))
            expected = [naive.mixture(scores, contrast) for contrast in CONTRASTS.values()]
            assert found[b].tolist() == pytest.approx(expected, abs=1e-5 * float(whole.abs().max()))


def test_what_two_slices_share_cancels_in_their_contrast():
    shared, own = torch.eye(3)[0], torch.eye(3)[1:]
    slices = {name: (torch.stack([shared + own[i]]) / 2**0.5, torch.ones(1)) for i, name in enumerate(("good", "bad"))}
    towards = scoring.directions(slices).mixed(CONTRASTS)
    found = scoring.score(torch.stack([shared, own[1]]), torch.ones(2), towards).normalised_BS[:, 0]
    assert found.tolist() == pytest.approx([0, 2**-0.5], abs=1e-6)


def test_a_slice_that_is_not_there_is_named_beside_those_that_are():
    with pytest.raises(NoSuchSlice, match=r"'ugly'.*good, bad"):
        weights(("good", "bad"), {"x": {"ugly": 1.0}})

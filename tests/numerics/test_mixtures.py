"""Contrasts are linear in the slices, ensembles are means of what each checkpoint says."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curator.errors import NoSuchSlice
from curator.influence import naive, scoring
from curator.influence.attribution import Attributor, RecipeSpec
from curator.influence.mixtures import ensemble, mixed_errors, weights
from tests.numerics.small_models import case

CONTRASTS = {"bad - good": {"bad": 1.0, "good": -1.0}, "half": {"good": 0.5}}


@pytest.mark.parametrize("changes", [{}, {"exact_curvature": "ekfac"}, {"code": "pca", "code_dimension": 5}], ids=str)
def test_a_contrast_direction_scores_like_the_difference_of_its_slices(changes):
    c = case("positions")
    good, bad, arrived = c.batch(6, 2, 0), c.batch(5, 2, 1), c.batch(4, 2, 2)
    a = Attributor.fit(c.model, c.losses, [good, bad], RecipeSpec(dimension=24, **changes))
    V = {"good": a.measure(good), "bad": a.measure(bad)}
    towards = a.directions({name: [m] for name, m in V.items()})
    exact = a.exact_directions({"good": [good], "bad": [bad]})
    Z, mixed = a.measure(arrived, exact), a.measure(arrived, exact.mixed(CONTRASTS))
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


def test_the_error_of_a_contrast_is_that_of_independent_means():
    rng = np.random.Generator(np.random.Philox(1))
    draws_NVS = rng.standard_normal((4000, 20, 2)) * [1.0, 3.0]
    means_NS, stderr_NS = draws_NVS.mean(axis=1), draws_NVS.std(axis=1, ddof=1) / np.sqrt(20)
    weight_RS = weights(("good", "bad"), CONTRASTS)
    truth_R = (means_NS @ weight_RS.T).std(axis=0)
    found_R = np.sqrt(np.square(mixed_errors(stderr_NS, weight_RS)).mean(axis=0))
    # A standard deviation of N draws is known to one part in sqrt(2 N); five times that.
    np.testing.assert_allclose(found_R, truth_R, rtol=5 / np.sqrt(2 * 4000))
    unknown = mixed_errors([[np.nan, 1.0]], weight_RS)
    assert np.isnan(unknown).tolist() == [[True, True]]
    assert np.isfinite(mixed_errors([[1.0, np.nan]], weight_RS)).tolist() == [[False, True]]


def test_a_slice_that_is_not_there_is_named_beside_those_that_are():
    with pytest.raises(NoSuchSlice, match=r"'ugly'.*good, bad"):
        weights(("good", "bad"), {"x": {"ugly": 1.0}})


@settings(deadline=None)
@given(
    checkpoints=st.integers(1, 4),
    count=st.integers(0, 4),
    slices=st.integers(0, 3),
    seed=st.integers(0, 50),
)
def test_an_ensemble_is_the_mean_of_the_checkpoints_that_gave_a_score(checkpoints, count, slices, seed):
    rng = np.random.Generator(np.random.Philox(seed))
    scores = rng.standard_normal((checkpoints, count, slices))
    ok = rng.random((checkpoints, count)) < 0.7
    scores[~ok] = np.nan
    found = ensemble(list(scores), list(ok))
    assert found.normalised_BS.shape == found.stderr_BS.shape == (count, slices)
    for b, s in np.ndindex(count, slices):
        mean, error, n = naive.ensemble(scores[ok[:, b], b, s].tolist())
        assert found.normalised_BS[b, s] == pytest.approx(mean, abs=1e-12)
        assert found.stderr_BS[b, s] == pytest.approx(error, abs=1e-12, nan_ok=True)
        assert found.members_B[b] == n


def test_an_ensemble_of_attributors_is_less_noisy_than_its_members():
    """Masks of several seeds stand in for checkpoints: their mean is nearer to the unmasked score than each is."""
    c = case("rows")
    trusted, arrived = c.batch(40, 1, 0), c.batch(60, 1, 1)

    def normalised(dimension, seed):
        spec = RecipeSpec(dimension=dimension, seed=seed, exact=False)
        a = Attributor.fit(c.model, c.losses, [trusted], spec)
        Z = a.measure(arrived)
        towards = a.directions({"all": [a.measure(trusted)]})
        return scoring.score(Z.unit_BK, Z.whitened_norm_B, towards).normalised_BS.numpy(), Z.ok_B.numpy()

    whole, _ = normalised(10_000, 0)
    members, ok = zip(*(normalised(10, seed) for seed in range(6)), strict=True)
    mean = ensemble(members, ok).normalised_BS
    each = [np.square(m - whole).mean() for m in members]
    assert np.square(mean - whole).mean() < min(each)

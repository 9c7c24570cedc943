"""Recipes with importance-weighted masks and codes: fitted, kept, restored, and scoring as their parts say."""

import pytest
import torch

from curator.errors import CodeTooWide, StateMismatch, UnknownCompression
from curator.influence.attribution import Attributor, RecipeSpec
from tests.numerics.small_models import case

VARIANTS = [
    {"importance": "rms"},
    {"budget": "energy"},
    {"importance": "rms", "budget": "energy", "mask": "neuron"},
    {"code": "pca", "code_dimension": 5},
    {"code": "pca+sjlt", "code_dimension": 9},
    {"code": "sjlt", "code_dimension": 6, "importance": "rms"},
]


def fitted(**changes):
    c = case("positions", torch.float32)
    spec = RecipeSpec(**{"dimension": 24, **changes})
    trusted = [c.batch(6, 2, 0), c.batch(5, 2, 1)]
    return c, spec, Attributor.fit(c.model, c.losses, iter(trusted), spec), trusted


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_fitted_recipe_is_restored_from_its_state(changes):
    c, spec, a, _ = fitted(**changes)
    back = Attributor.from_state(c.model, c.losses, RecipeSpec.from_dict(spec.to_dict()), a.state())
    arrived = c.batch(4, 2, 9)
    one, two = a.measure(arrived), back.measure(arrived)
    assert back.K == a.K == one.unit_BK.shape[1]
    assert torch.equal(one.unit_BK, two.unit_BK)
    assert torch.equal(a.with_losses(c.losses).measure(arrived).unit_BK, one.unit_BK)


@pytest.mark.parametrize("numbers", [12, 13])
def test_a_code_that_shortens_nothing_is_left_out(numbers):
    """As where a small model has fewer entries than the default code has numbers."""
    c, _, plain, _ = fitted(dimension=12)
    _, _, coded, _ = fitted(dimension=12, code="pca+sjlt", code_dimension=numbers)
    arrived = c.batch(5, 2, 9)
    assert torch.equal(plain.measure(arrived).unit_BK, coded.measure(arrived).unit_BK)


@pytest.mark.parametrize("code", [{"code": "pca", "code_dimension": 11}, {"code": "pca+sjlt", "code_dimension": 23}])
def test_a_code_of_all_directions_of_the_trusted_data_scores_them_like_no_code(code):
    _, _, plain, trusted = fitted()
    _, _, coded, _ = fitted(**code)
    arrived = trusted[0]
    w, y = (a.measure(arrived) for a in (plain, coded))
    torch.testing.assert_close(y.unit_BK @ y.unit_BK.T, w.unit_BK @ w.unit_BK.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y.whitened_norm_B, w.whitened_norm_B, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("code", VARIANTS[3:], ids=str)
def test_a_code_leaves_the_whitened_length_and_shortens_what_it_does_not_see(code):
    """Whatever the code: self-influence is that of the whole mask, and a PCA's shadow of new data is not blown up."""
    c, _, plain, _ = fitted(**{n: v for n, v in code.items() if not n.startswith("code")})
    _, _, coded, _ = fitted(**code)
    arrived = c.batch(40, 2, 9)
    w, y = (a.measure(arrived) for a in (plain, coded))
    torch.testing.assert_close(y.whitened_norm_B, w.whitened_norm_B, rtol=1e-5, atol=0)
    expected = w.unit_BK @ coded.fitted.encoding.code_KC
    torch.testing.assert_close(y.unit_BK, expected, rtol=0, atol=1e-5)
    if code["code"] == "pca":
        assert float(y.unit_BK.norm(dim=1).max()) < 1


def test_a_recipe_s_code_is_checked_when_it_is_fitted_and_when_it_is_restored():
    with pytest.raises(UnknownCompression, match="zip"):
        fitted(code="zip")
    with pytest.raises(CodeTooWide):
        fitted(code="pca")
    c, _, a, _ = fitted(code="pca", code_dimension=5)
    with pytest.raises(StateMismatch):
        Attributor.from_state(c.model, c.losses, RecipeSpec(dimension=24, code="pca", code_dimension=6), a.state())
    with pytest.raises(StateMismatch):
        Attributor.from_state(c.model, c.losses, RecipeSpec(dimension=24), a.state())
    with pytest.raises(StateMismatch):
        Attributor.from_state(c.model, c.losses, RecipeSpec(dimension=24, importance="rms"), a.state())

"""The front door: every score it gives equals the definition, by linear solves on one example at a time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from curator.errors import LayersUnreached, NoCurvature, StateMismatch, UnknownMeasurement, UnknownRecipeField
from curator.influence import naive, scoring
from curator.influence.attribution import Attributor, Measured, RecipeSpec, Signal, draw_masks
from curator.influence.confidence import calibrated_loss, measurement_slope
from curator.influence.exact import ExactDirections
from curator.influence.scoring import Directions
from tests.numerics.small_models import case, one

DIMENSION = 24


def spec(**changes):
    return RecipeSpec(**{"dimension": DIMENSION, **changes})


def fitted(c, recipe, trusted):
    return Attributor.fit(c.model, c.losses, [trusted], recipe)


def single_gradients(c, batch, layers):
    return [naive.gradients(lambda b=b: c.losses(c.model, one(batch, b)), layers) for b in range(len(batch[0]))]


def kept_only(full, masks):
    return [{name: naive.kept(G[name], mask) for name, mask in masks.items()} for G in full]


@settings(max_examples=12, deadline=None)
@given(
    kind=st.sampled_from(["rows", "positions"]),
    mask=st.sampled_from(["neuron", "coordinate"]),
    curvature=st.sampled_from(["angular", "fisher"]),
    measurement=st.sampled_from(["margin", "calibrated", "loss"]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_compressed_scores_equal_their_definitions(kind, mask, curvature, measurement, bias, seed):
    c = case(kind)
    trusted, arrived = c.batch(7, 2, seed), c.batch(3, 2, seed + 1000)
    recipe = spec(mask=mask, curvature=curvature, measurement=measurement, bias=bias, exact=False)
    a = fitted(c, recipe, trusted)
    V, Z = a.measure(trusted), a.measure(arrived)
    towards = a.directions({"all": [V]})
    scores = scoring.score(Z.unit_BK, Z.whitened_norm_B, towards, {"all": V.unit_BK})

    v = kept_only(single_gradients(c, trusted, a.layers), a.fitted.masks)
    z = kept_only(single_gradients(c, arrived, a.layers), a.fitted.masks)
    F = {
        name: naive.damped(naive.fisher([g[name] for g in v], curvature == "angular"), recipe.damping)
        for name in a.fitted.masks
    }
    slopes = measurement_slope(c.losses(c.model, trusted).detach().numpy(), measurement, a.temperature)
    for b, mine in enumerate(z):
        cosines = [naive.cosine(x, mine, F) for x in v]
        assert float(scores.normalised_BS[b, 0]) == pytest.approx(np.mean(cosines), abs=2e-6)
        assert float(scores.stderr_BS[b, 0]) == pytest.approx(np.std(cosines, ddof=1) / math.sqrt(7), abs=2e-6)
        assert float(scores.self_influence_B[b]) == pytest.approx(naive.product(mine, mine, F), rel=1e-5)
        plain = naive.influence(mine, v, F, list(slopes))
        size = math.sqrt(naive.product(mine, mine, F)) * float(towards.whitened_SK.norm())
        assert float(scores.influence_BS[b, 0]) == pytest.approx(plain, abs=1e-5 * size)
        assert float(scores.relatif_BS[b, 0]) == pytest.approx(
            plain / math.sqrt(naive.product(mine, mine, F)), abs=1e-5 * float(towards.whitened_SK.norm())
        )


@settings(max_examples=8, deadline=None)
@given(
    kind=st.sampled_from(["rows", "positions"]),
    curvature=st.sampled_from(["angular", "fisher"]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_exact_scores_equal_the_explicit_kronecker_solve(kind, curvature, bias, seed):
    c = case(kind)
    trusted, arrived = c.batch(7, 2, seed), c.batch(3, 2, seed + 1000)
    recipe = spec(curvature=curvature, bias=bias, measurement="loss")
    a = fitted(c, recipe, trusted)
    # Two slices, one of them in two batches.
    parts = [(trusted[0][:4], trusted[1][:4]), (trusted[0][4:], trusted[1][4:])]
    towards = a.exact_directions({"all": parts, "last": parts[1:]})
    Z = a.measure(arrived, towards)

    v, z = single_gradients(c, trusted, a.layers), single_gradients(c, arrived, a.layers)
    F = {
        layer.name: naive.kronecker(
            [naive.factors(lambda b=b: c.losses(c.model, one(trusted, b)), layer) for b in range(7)],
            recipe.damping,
            curvature == "angular",
        )
        for layer in a.layers
    }
    for b, mine in enumerate(z):
        for s, members in enumerate((v, v[4:])):
            assert float(Z.exact_BS[b, s]) == pytest.approx(naive.normalised_influence(mine, members, F), abs=5e-6)
            size = math.sqrt(naive.product(mine, mine, F) * max(naive.product(x, x, F) for x in v))
            assert float(Z.exact_influence_BS[b, s]) == pytest.approx(
                naive.influence(mine, members, F), abs=1e-5 * size
            )


def test_a_model_kept_whole_scores_like_its_full_gradient():
    c = case("rows")
    trusted, arrived = c.batch(9, 1, 0), c.batch(4, 1, 1)
    a = fitted(c, spec(dimension=10_000, exact=False), trusted)
    assert a.K == 5 * 4 + 4 * 3
    V, Z = a.measure(trusted), a.measure(arrived)
    found = scoring.score(Z.unit_BK, Z.whitened_norm_B, a.directions({"all": [V]})).normalised_BS[:, 0]
    v = [{n: g.ravel() for n, g in G.items()} for G in single_gradients(c, trusted, a.layers)]
    z = [{n: g.ravel() for n, g in G.items()} for G in single_gradients(c, arrived, a.layers)]
    F = {n: naive.damped(naive.fisher([g[n] for g in v], angular=True), 0.1) for n in a.fitted.masks}
    assert found.tolist() == pytest.approx([naive.normalised_influence(x, v, F) for x in z], abs=1e-5)


@pytest.mark.parametrize("measurement", ["margin", "calibrated"])
def test_the_slope_turns_the_gradient_of_the_loss_into_that_of_what_is_measured(measurement):
    loss = torch.tensor([1e-3, 0.1, 0.7, 3.0, 25.0], dtype=torch.float64, requires_grad=True)
    p, T = torch.exp(-loss), 2.5
    margin = torch.log(p / (1 - p))
    measured = -margin if measurement == "margin" else torch.nn.functional.softplus(-margin / T)
    measured.sum().backward()
    slopes = measurement_slope(loss.detach().numpy(), measurement, T)
    assert slopes.tolist() == pytest.approx(loss.grad.tolist(), rel=1e-6)


def test_any_increasing_function_of_an_examples_loss_gives_the_same_unit_vector():
    c = case("rows")
    trusted = c.batch(9, 1, 0)
    whole = fitted(c, spec(), trusted)

    def squashed(model, batch):
        return -torch.expm1(-c.losses(model, batch))

    again = Attributor.fit(c.model, squashed, [trusted], spec())
    torch.testing.assert_close(whole.measure(trusted).unit_BK, again.measure(trusted).unit_BK, rtol=0, atol=1e-6)


# --- states -----------------------------------------------------------------------------------------------------


def test_each_example_has_its_own_state_and_no_nan_is_stored():
    c = case("positions")
    trusted, arrived = c.batch(8, 2, 0), c.batch(4, 2, 1)
    a = fitted(c, spec(), trusted)
    towards = a.exact_directions({"all": [trusted]})
    clean = a.measure(arrived, towards)
    arrived[0][1] = torch.inf
    arrived[1][2] = -1  # nothing supervised is left
    found = a.measure(arrived, towards)
    assert found.state_B.tolist() == [Signal.OK, Signal.NONFINITE, Signal.NO_SIGNAL, Signal.OK]
    for name in ("unit_BK", "whitened_norm_B", "exact_BS", "exact_influence_BS"):
        rows = getattr(found, name)
        assert rows.isfinite().all()
        assert rows[1:3].abs().sum() == 0
        torch.testing.assert_close(rows[[0, 3]], getattr(clean, name)[[0, 3]], rtol=0, atol=1e-6)


def test_spoilt_trusted_examples_change_neither_curvature_nor_direction():
    c = case("rows")
    trusted = c.batch(8, 1, 0)
    spoilt = (torch.cat([trusted[0], torch.full((1, 5), torch.nan)]), torch.cat([trusted[1], trusted[1][:1]]))
    a, b = fitted(c, spec(), trusted), fitted(c, spec(), spoilt)
    for name, tensor in a.state().items():
        torch.testing.assert_close(b.state()[name], tensor, msg=name)
    clean, dirty = a.exact_directions({"all": [trusted]}), b.exact_directions({"all": [spoilt]})
    torch.testing.assert_close(dirty.tensors(), clean.tensors())
    torch.testing.assert_close(
        b.directions({"all": [b.measure(spoilt)]}).tensors(), a.directions({"all": [a.measure(trusted)]}).tensors()
    )


class Either(nn.Module):
    """Two experts of which a batch sees one."""

    def __init__(self):
        super().__init__()
        self.shared, self.left, self.right = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return (self.left if float(x.sum()) < 0 else self.right)(torch.tanh(self.shared(x)))


def either():
    """The model, and a batch for each of its experts; ``of`` turns inputs to those of one of them."""
    torch.manual_seed(0)
    (x, y), (more, _) = case("rows").batch(6, 1, 0), case("rows").batch(3, 1, 1)
    x, more = x.float().abs(), more.float().abs()
    seen, arrived = ({"left": (-z, y[: len(z)]), "right": (z, y[: len(z)])} for z in (x, more))
    return Either(), seen, arrived


@pytest.mark.parametrize("rank", [0, 1])
def test_a_slice_that_never_reaches_an_expert_has_no_direction_in_it(rank):
    model, seen, arrived = either()
    losses = case("rows").losses
    a = Attributor.fit(model, losses, [*seen.values()], spec(exact_rank=rank))
    towards = a.exact_directions({**{name: [batch] for name, batch in seen.items()}, "both": [*seen.values()]})
    off = towards.unit_error_S.sum() if rank else 1e-5
    for mine, other in (("left", "right"), ("right", "left")):
        found = a.measure(arrived[mine], towards).exact_BS
        assert float((found[:, 2] - found[:, :2].mean(dim=1)).abs().max()) <= off
        own = a.by_position(arrived[mine], a.exact_directions({other: [seen[other]]})).normalised
        assert not own[mine].any()
        assert own["shared"].any()


@pytest.mark.parametrize("exact_curvature", ["kfac", "ekfac"])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_expert_that_no_trusted_example_reaches_stays_out_of_exact_scores(exact_curvature, rank):
    """Where none of its entries is kept, or the recipe could not be fitted at all."""
    model, seen, arrived = either()
    recipe = spec(dimension=0, kept={"shared": 3, "right": 3}, exact_curvature=exact_curvature, exact_rank=rank)
    a = Attributor.fit(model, case("rows").losses, [seen["right"]], recipe)
    a = Attributor.from_state(model, case("rows").losses, a.spec, a.state())
    towards = a.exact_directions({"all": [seen["right"]]})
    found, own = a.measure(arrived["left"], towards), a.by_position(arrived["left"], towards)
    assert found.ok_B.all()
    assert not own.normalised["left"].any()
    np.testing.assert_allclose(found.exact_BS[:, 0], own.normalised["shared"].sum(axis=(1, 2)), atol=1e-6)


@pytest.mark.parametrize("exact_norm", [False, True])
def test_what_an_exact_score_alone_sees_is_not_finite_in_any_figure(exact_norm):
    """An infinite input in a column that the mask does not keep: no gradient is formed where the rank is cut."""
    c = case("rows")
    recipe = spec(dimension=0, kept={"first": 1, "second": 4}, exact_rank=1, exact_norm=exact_norm)
    a = fitted(c, recipe, c.batch(8, 1, 0))
    kept = int(a.fitted.masks["first"].coordinates()[1][0])
    towards, (x, y) = a.exact_directions({"all": [c.batch(8, 1, 0)]}), c.batch(3, 1, 1)
    with torch.no_grad():
        c.model.first.weight[:, (kept + 1) % 5] = 0
    x[1, (kept + 1) % 5] = 1e300
    found = a.measure((x, y), towards)
    assert found.state_B.tolist() == [Signal.OK, Signal.NONFINITE, Signal.OK]
    assert found.exact_BS.isfinite().all()


def test_an_empty_batch_is_measured_to_nothing():
    c = case("positions")
    a = fitted(c, spec(), c.batch(5, 2, 0))
    towards = a.exact_directions({"all": [c.batch(5, 2, 0)]})
    found = a.measure(c.batch(0, 2, 0), towards)
    assert found.unit_BK.shape == (0, DIMENSION)
    assert found.exact_BS.shape == (0, 1)
    assert len(Measured.join([found, a.measure(c.batch(3, 2, 1), towards)]).loss_B) == 3


def test_unit_vectors_have_length_one_however_faint_the_gradient():
    w = torch.randn(3, 5) * torch.tensor([1e-30, 1.0, 0.0])[:, None]
    unit_BK, norm_B = scoring.unit(w)
    assert unit_BK.norm(dim=1).tolist() == pytest.approx([1, 1, 0], abs=1e-6)
    assert norm_B[0] > 0


# --- what is stored -------------------------------------------------------------------------------------------


def test_a_state_brings_back_the_same_attributor():
    c = case("positions", torch.float32)
    trusted, arrived = c.batch(6, 2, 0), c.batch(3, 2, 1)
    recipe = RecipeSpec.from_dict(spec(mask="neuron", kept={"out": 5}).to_dict())
    a = fitted(c, recipe, trusted)
    b = Attributor.from_state(c.model, c.losses, recipe, a.state())
    directions = a.exact_directions({"all": [trusted]})
    again = ExactDirections.of(directions.names, directions.tensors())
    left, right = a.measure(arrived, directions), b.measure(arrived, again)
    assert a.fitted.masks["out"].kept == 5
    for name in ("unit_BK", "whitened_norm_B", "exact_BS", "calibrated_loss_B"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name
    towards = a.directions({"all": [left]})
    assert torch.equal(Directions.of(towards.names, towards.tensors()).unit_SK, towards.unit_SK)


def test_a_state_of_another_recipe_is_refused():
    c = case("rows")
    a = fitted(c, spec(), c.batch(5, 1, 0))
    with pytest.raises(StateMismatch):
        Attributor.from_state(c.model, c.losses, spec(dimension=10), a.state())
    with pytest.raises(UnknownRecipeField, match="colour"):
        RecipeSpec.from_dict({**spec().to_dict(), "colour": 1})


def test_masks_of_a_recipe_do_not_depend_on_the_data_or_the_device_of_the_draw():
    c = case("rows")
    a, b = fitted(c, spec(), c.batch(5, 1, 0)), fitted(c, spec(), c.batch(5, 1, 9))
    for name, mask in draw_masks(a.layers, spec()).items():
        assert all(
            torch.equal(x, y) for x, y in zip(mask.coordinates(), a.fitted.masks[name].coordinates(), strict=True)
        )
        assert torch.equal(a.fitted.masks[name].rows, b.fitted.masks[name].rows)


@pytest.mark.parametrize("code", [{}, {"code": "pca", "code_dimension": 3}], ids=str)
def test_leave_one_out_is_the_direction_without_the_example(code):
    c = case("rows")
    trusted = c.batch(6, 1, 0)
    a = fitted(c, spec(**code), trusted)
    V = a.measure(trusted)
    everyone = a.directions({"all": [V]})
    found = scoring.leave_one_out(V.unit_BK, everyone.unit_SK[0])
    rest = [int(i) for i in range(6) if i != 2]
    assert float(found[2]) == pytest.approx(float((V.unit_BK[rest] @ V.unit_BK[2]).mean()), abs=1e-6)


# --- refusals -------------------------------------------------------------------------------------------------


def test_trusted_data_without_signal_is_refused():
    c = case("positions")
    with pytest.raises(NoCurvature):
        Attributor.fit(c.model, c.losses, [], spec())
    a = fitted(c, spec(exact=False), c.batch(4, 2, 0))
    nothing = c.batch(2, 2, 0)
    nothing[1][:] = -1
    with pytest.raises(NoCurvature):
        a.directions({"all": [a.measure(nothing)]})
    with pytest.raises(NoCurvature):
        a.exact_directions({"all": [c.batch(2, 2, 0)]})


def test_a_layer_the_loss_never_reaches_is_named():
    c = case("rows")
    c.model.spare = torch.nn.Linear(2, 2).double()
    with pytest.raises(LayersUnreached, match="spare"):
        fitted(c, spec(), c.batch(4, 1, 0))


def test_an_unknown_measurement_is_refused():
    c = case("rows")
    a = fitted(c, spec(measurement="accuracy"), c.batch(4, 1, 0))
    with pytest.raises(UnknownMeasurement, match="margin, calibrated, loss"):
        a.measure(c.batch(1, 1, 0))


def test_calibrated_loss_is_stored_with_the_fitted_temperature():
    c = case("rows")
    trusted = c.batch(20, 1, 0)
    a = fitted(c, spec(), trusted)
    found = a.measure(trusted)
    expected = calibrated_loss(found.loss_B.double().numpy(), a.temperature)
    np.testing.assert_allclose(found.calibrated_loss_B, expected, rtol=1e-5)

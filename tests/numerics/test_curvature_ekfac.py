"""EK-FAC: exact scores equal the explicit eigenvalue-corrected solve, on layers with one position and with several."""

import math

import numpy as np
import pytest

from curator.errors import UnknownCurvature
from curator.influence import naive
from curator.influence.attribution import Attributor, RecipeSpec
from tests.numerics.small_models import case, one


@pytest.mark.parametrize("kind", ["rows", "positions"])
@pytest.mark.parametrize("curvature", ["angular", "fisher"])
def test_exact_scores_equal_the_explicit_corrected_solve(kind, curvature):
    c = case(kind)
    trusted, arrived = c.batch(7, 2, 0), c.batch(3, 2, 1)
    spec = RecipeSpec(dimension=24, curvature=curvature, measurement="loss", exact_curvature="ekfac")
    a = Attributor.fit(c.model, c.losses, iter([trusted]), spec)
    a = Attributor.from_state(c.model, c.losses, spec, a.state())
    Z = a.measure(arrived, a.exact_directions({"all": [trusted]}))

    def gradients(batch):
        return [naive.gradients(lambda b=b: c.losses(c.model, one(batch, b)), a.layers) for b in range(len(batch[0]))]

    v, z = gradients(trusted), gradients(arrived)
    F = {
        layer.name: naive.corrected_kronecker(
            [naive.factors(lambda b=b: c.losses(c.model, one(trusted, b)), layer) for b in range(7)],
            [G[layer.name] for G in v],
            spec.damping,
            curvature == "angular",
        )
        for layer in a.layers
    }
    for b, mine in enumerate(z):
        # Eigenvectors are float32, and eigenvalues that nearly meet turn them; the scores hardly feel it.
        assert float(Z.exact_BS[b, 0]) == pytest.approx(naive.normalised_influence(mine, v, F), abs=1e-4)
        size = math.sqrt(naive.product(mine, mine, F) * max(naive.product(x, x, F) for x in v))
        assert float(Z.exact_influence_BS[b, 0]) == pytest.approx(naive.influence(mine, v, F), abs=1e-4 * size)


def test_an_empty_batch_has_no_scores_and_an_unknown_kind_is_refused():
    c = case("positions")
    spec = RecipeSpec(dimension=24, exact_curvature="ekfac")
    a = Attributor.fit(c.model, c.losses, [c.batch(7, 2, 0)], spec)
    towards = a.exact_directions({"all": [c.batch(7, 2, 0)]})
    assert np.asarray(a.measure(c.batch(0, 2, 0), towards).exact_BS).shape == (0, 1)
    with pytest.raises(UnknownCurvature, match="kfac, ekfac"):
        Attributor.fit(c.model, c.losses, [c.batch(7, 2, 0)], RecipeSpec(dimension=24, exact_curvature="exact"))

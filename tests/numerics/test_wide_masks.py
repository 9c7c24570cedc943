"""Masks too wide for a Fisher matrix: the same scores from leading directions, in memory that grows with k r."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from curator.errors import LayersUnreached, StateMismatch
from curator.influence import curvature, fitting, naive, recipe
from curator.influence.attribution import Attributor, RecipeSpec
from curator.influence.curvature import LowRankRoot, principals
from tests.numerics.small_models import case


def fitted(widest, monkeypatch, kind="positions", **changes):
    for module in (curvature, fitting, recipe):
        monkeypatch.setattr(module, "WIDEST_BLOCK", widest)
    c = case(kind)
    spec = RecipeSpec(**{"dimension": 60, "kept": {"again": 9}, "exact": False, **changes})
    return c, spec, Attributor.fit(c.model, c.losses, iter([c.batch(6, 2, 0), c.batch(5, 2, 1)]), spec)


@pytest.mark.parametrize("curvature_kind", ["angular", "fisher"])
@pytest.mark.parametrize(
    "code", [{}, {"code": "pca", "code_dimension": 7}, {"code": "sjlt", "code_dimension": 9}], ids=str
)
def test_leading_directions_of_a_small_sample_give_the_dense_scores(curvature_kind, code, monkeypatch):
    changes = {"curvature": curvature_kind, **code}
    c, _, dense = fitted(2048, monkeypatch, **changes)
    _, spec, wide = fitted(12, monkeypatch, **changes)
    back = Attributor.from_state(c.model, c.losses, spec, wide.state())
    if not code:
        assert {type(root) for root in wide.fitted.encoding.roots.values()} == {torch.Tensor, LowRankRoot}
    arrived = c.batch(5, 2, 9)
    left, right, restored = (a.measure(arrived) for a in (dense, wide, back))
    # Components of equal size may come out turned; inner products do not see it.
    products = [m.unit_BK @ m.unit_BK.T for m in (left, right, restored)]
    torch.testing.assert_close(products[1], products[0], rtol=0, atol=2e-4)
    torch.testing.assert_close(products[2], products[1])
    torch.testing.assert_close(right.whitened_norm_B, left.whitened_norm_B, rtol=1e-3, atol=0)


def test_a_diagonal_is_kept_whole_however_wide(monkeypatch):
    _, _, a = fitted(4, monkeypatch, curvature="diagonal")
    assert all(root.ndim == 1 for root in a.fitted.encoding.roots.values())


def test_one_pass_serves_all_blocks_and_each_equals_its_decomposition():
    g = torch.Generator().manual_seed(0)
    blocks = {n: torch.randn(9, k, generator=g, dtype=torch.float64) for n, k in (("a", 30), ("b", 5))}
    passes = []

    def chunks():
        passes.append(1)
        yield {n: x[:4] for n, x in blocks.items()}
        yield {n: x[4:] for n, x in blocks.items()}

    found = principals(chunks, 9)
    assert len(passes) == 4
    for n, x in blocks.items():
        F = naive.fisher(list(x.numpy()), angular=False)
        values, rank = np.linalg.eigvalsh(F)[::-1], min(9, x.shape[1])
        np.testing.assert_allclose(found[n].values_r, values[:rank], atol=1e-9)
        assert found[n].trace == pytest.approx(np.trace(F))


@pytest.mark.parametrize("rank", [2, 12, 40])
def test_a_rank_below_the_samples_errs_by_what_the_next_direction_adds_to_the_damping(rank):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(200, 60, generator=g, dtype=torch.float64) * torch.linspace(3, -3, 60).exp()
    F = naive.fisher(list(x.numpy()), angular=False)
    found = LowRankRoot.fit(curvature.principal(lambda: [x], rank), 0.1).apply(torch.eye(60)).double().numpy()
    off = np.linalg.norm(found - naive.inverse_root(F, 0.1), 2)
    floor, after = 0.1 * np.trace(F) / 60, np.linalg.eigvalsh(F)[::-1][rank]
    # Subspace iteration turns its last directions a little; a hundredth of the largest gain covers it.
    assert off == pytest.approx(floor**-0.5 - (after + floor) ** -0.5, abs=0.01 * floor**-0.5)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation inside gives."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, list | tuple) else [out]
        self.numel = max([self.numel, *(t.numel() for t in tensors if isinstance(t, torch.Tensor))])
        return out


@pytest.mark.parametrize(
    "code", [{}, {"code": "pca", "code_dimension": 20}, {"code": "sjlt", "code_dimension": 20}], ids=str
)
def test_no_matrix_of_a_wide_layers_entries_squared_is_ever_made(code, monkeypatch):
    monkeypatch.setattr(fitting, "ROOT_RANK", 16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(80, 60), torch.nn.Tanh(), torch.nn.Linear(60, 50))
    spec = RecipeSpec(dimension=7000, exact=False, measurement="loss", **code)
    batches = [torch.randn(8, 80, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    with Largest() as largest:
        a = Attributor.fit(model, lambda m, x: m(x).square().sum(dim=1), batches, spec)
        a.measure(batches[0])
    entries = [mask.kept for mask in a.fitted.masks.values()]
    assert min(entries) > curvature.WIDEST_BLOCK
    assert largest.numel <= sum(entries) * (20 + curvature.OVERSAMPLED)


def test_a_wide_layer_that_is_never_reached_is_named_and_a_state_without_its_root_refused(monkeypatch):
    c, spec, a = fitted(12, monkeypatch)
    state = {n: t for n, t in a.state().items() if not n.startswith("root/into")}
    with pytest.raises(StateMismatch):
        Attributor.from_state(c.model, c.losses, spec, state)
    c.model.spare = torch.nn.Linear(20, 20).double()
    with pytest.raises(LayersUnreached, match="spare"):
        Attributor.fit(c.model, c.losses, [c.batch(6, 2, 0)], RecipeSpec(dimension=300, exact=False))

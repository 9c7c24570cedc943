"""The user's own factory: found, called, and named with file and line when it fails."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from curator.errors import (
    BadWorkloadOption,
    FactoryFailed,
    FactoryNotFound,
    LossShape,
    UnknownWorkload,
    WorkloadFailed,
    WorkloadIncomplete,
)
from curator.workloads import base, registry

CPU = torch.device("cpu")

GOOD = """
import torch
class Mine:
    def __init__(self, scale): self.scale = scale
    def load(self, checkpoint, device): return torch.nn.Linear(2, 1)
    def collate(self, records): return {"x": torch.tensor([r["x"] for r in records])}
    def losses(self, model, batch): return (model(batch["x"]) * self.scale).square().sum(1)
def build(scale=1): return Mine(scale)
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project directory; what a test imports from it is forgotten again."""
    modules, path = set(sys.modules), list(sys.path)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def build(project, name, source, factory=None, **options):
    (project / f"{name}.py").write_text(source)
    return registry.build("torch", project, {"factory": factory or f"{name}:build", **options})


def test_a_factory_gets_its_options_and_defaults_stand_in(project):
    workload = build(project, "good_module", GOOD, scale=3)
    assert workload.scale == 3
    model = nn.Sequential(nn.Linear(2, 1))
    assert base.layers_of(workload, model) == ("0",)
    assert base.n_tokens_of(workload, {}) == 1
    assert base.reason_against(workload, {}) is None
    batch = base.batch_of(workload, [{"x": [1.0, 2.0]}], CPU)
    losses = base.losses_of(workload)(model, batch)
    torch.testing.assert_close(losses, base.validation_losses_of(workload)(model, batch))


def test_optional_parts_are_used_when_they_are_there():
    class Full:
        def layers(self, model):
            return ["a"]

        def n_tokens(self, record):
            return 7

        def validate(self, record):
            return "too dull"

        def validation_losses(self, model, batch):
            return torch.ones(2)

        losses = load = collate = validation_losses

    assert base.layers_of(Full(), nn.Linear(1, 1)) == ("a",)
    assert base.n_tokens_of(Full(), {}) == 7
    assert base.reason_against(Full(), {}) == "too dull"
    assert base.validation_losses_of(Full())(nn.Linear(1, 1), None).tolist() == [1, 1]


@pytest.mark.parametrize("factory", ["", "no_colon", "nowhere_at_all:build", "math:pi", "math:nothing"])
def test_a_factory_that_is_not_there(project, factory):
    with pytest.raises(FactoryNotFound) as refused:
        registry.build("torch", project, {"factory": factory})
    assert refused.value.code == "CUR-WRK-003"


@pytest.mark.parametrize(
    ("name", "source", "told"),
    [
        (
            "raises_in_call",
            "def build():\n    raise ValueError('no data')",
            r"raises_in_call\.py:2: ValueError: no data",
        ),
        ("raises_in_import", "\n\n1 / 0", r"raises_in_import\.py:3: ZeroDivisionError"),
        ("bad_syntax", "def build(:\n    pass", r"bad_syntax\.py:1: SyntaxError"),
        ("bad_import", "import a_package_nobody_has", r"bad_import\.py:1: ModuleNotFoundError.*a_package_nobody_has"),
        ("wrong_options", "def build(width):\n    pass", "TypeError.*width"),
    ],
)
def test_a_factory_that_raises_is_named_with_file_and_line(project, name, source, told):
    with pytest.raises(FactoryFailed, match=told) as refused:
        build(project, name, source)
    assert refused.value.code == "CUR-WRK-004"


def test_what_is_no_workload_is_told_what_it_lacks(project):
    source = "class Half:\n    def load(self, c, d): pass\ndef build(): return Half()"
    with pytest.raises(WorkloadIncomplete, match=r"Half.*lacks collate, losses"):
        build(project, "half_module", source)


def test_unknown_kinds_and_options_are_refused(project):
    with pytest.raises(UnknownWorkload, match="causal-lm, text-classifier, torch"):
        registry.build("vision", project, {})
    with pytest.raises(BadWorkloadOption, match="colour"):
        registry.build("text-classifier", project, {"colour": 1})


class Broken:
    """Each method fails in its own way."""

    def load(self, checkpoint, device):
        return {"not": "a module"}

    def collate(self, records):
        return records[0]["missing"]

    def losses(self, model, batch):
        return torch.ones(())


def test_failures_of_the_users_methods_are_named(tmp_path):
    with pytest.raises(WorkloadFailed, match=r"`collate` raised at .*test_workloads_factory\.py:\d+: KeyError"):
        base.batch_of(Broken(), [{}], CPU)
    with pytest.raises(LossShape, match=r"a tensor \(\)"):
        base.losses_of(Broken())(nn.Linear(1, 1), None)
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, tmp_path / "m.safetensors")
    with pytest.raises(WorkloadFailed, match=r"`load` raised at .*dict, not a torch\.nn\.Module"):
        base.load_model(Broken(), tmp_path / "m.safetensors", CPU)


def test_out_of_memory_passes_so_that_the_batch_can_be_halved():
    def full(model, batch):
        raise torch.OutOfMemoryError("full")

    workload = Broken()
    workload.losses = full
    with pytest.raises(torch.OutOfMemoryError):
        base.losses_of(workload)(nn.Linear(1, 1), None)


def test_a_loaded_model_is_in_evaluation_mode(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, tmp_path / "m.safetensors")

    class Plain(Broken):
        def load(self, checkpoint, device):
            return nn.Dropout()

    assert not base.load_model(Plain(), tmp_path / "m.safetensors", CPU).training


def test_batches_of_any_nesting_move():
    tensor = torch.zeros(1)
    moved = base.moved({"a": [tensor, (tensor, "text")], "b": 3}, torch.device("meta"))
    assert moved["a"][0].device.type == moved["a"][1][0].device.type == "meta"
    assert (moved["a"][1][1], moved["b"]) == ("text", 3)


def test_the_registry_imports_no_torch():
    code = "import sys, curator.workloads.registry, curator.workloads.checkpoints; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

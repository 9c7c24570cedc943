"""Which model worker gets which device: from a list of devices, so that it is tested without any."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from curator import settings
from curator.cli import daemon
from curator.embedded import devices
from curator.embedded.devices import Place, from_listing, places, visible_devices
from curator.errors import NoSuchDevice
from curator.stages import instrument

TWO = ["GPU-aa", "GPU-bb"]
LISTING = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1b2c)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-3d4e)
  MIG 3g.40gb     Device  0: (UUID: MIG-55aa)
  MIG 3g.40gb     Device  1: (UUID: MIG-66bb)
GPU 2: NVIDIA H100 80GB HBM3 (UUID: GPU-7f80)
"""


def test_auto_is_every_gpu_or_the_cpu():
    assert [(p.name, p.env["CUDA_VISIBLE_DEVICES"]) for p in places("auto", 1, TWO)] == [
        ("cuda:0", "GPU-aa"),
        ("cuda:1", "GPU-bb"),
    ]
    # Each sees one device, which is then the first.
    assert {p.env["CURATOR_GRADIENTS_DEVICE"] for p in places("auto", 1, TWO)} == {"cuda"}
    assert places("auto", 1, []) == [Place("cpu", {})]


@pytest.mark.parametrize(
    ("device", "workers", "seen"),
    [
        ("cuda", 1, ["GPU-aa", "GPU-bb"]),
        ("cuda:0", 1, ["GPU-aa"]),
        ("cuda:1", 1, ["GPU-bb"]),
        ("cuda:1, cuda:0", 1, ["GPU-bb", "GPU-aa"]),
        ("cuda:1,cuda:1", 1, ["GPU-bb"]),
        ("auto", 2, ["GPU-aa", "GPU-aa", "GPU-bb", "GPU-bb"]),
    ],
)
def test_devices_may_be_chosen_and_shared(device, workers, seen):
    assert [p.env["CUDA_VISIBLE_DEVICES"] for p in places(device, workers, TWO)] == seen


def test_on_a_cpu_there_are_as_many_workers_as_asked_for():
    assert places("cpu", 3, TWO) == [Place("cpu", {"CURATOR_GRADIENTS_DEVICE": "cpu"})] * 3
    assert len(places("auto", 2, [])) == 2


def test_a_model_that_is_spread_is_in_one_process():
    [place] = places("auto", 1, TWO, spread=True)
    assert (place.name, place.env["CUDA_VISIBLE_DEVICES"]) == ("cuda:0, cuda:1", "GPU-aa,GPU-bb")
    assert len(places("cpu", 4, [], spread=True)) == 1


@pytest.mark.parametrize(
    ("device", "visible", "told"),
    [
        ("cuda:2", TWO, r"cuda:2 .* 2 \(GPU-aa, GPU-bb\)"),
        ("cuda", [], "cuda .* none"),
        ("cuda:0,cuda:9", TWO, "cuda:9"),
    ],
)
def test_a_device_that_is_not_there_is_an_error(device, visible, told):
    with pytest.raises(NoSuchDevice, match=told) as raised:
        places(device, 1, visible)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("device", ["quantum", "cuda:0,quantum", "gpu", ""])
def test_what_torch_calls_no_device_is_an_error_before_a_worker_starts(device):
    with pytest.raises(NoSuchDevice, match="was asked for"):
        places(device, 1, TWO)


@pytest.mark.parametrize(
    ("value", "found"),
    [("2,3", ["2", "3"]), ("GPU-aa", ["GPU-aa"]), ("", []), ("-1", []), ("0,-1,2", ["0"]), (None, TWO)],
)
def test_what_the_operator_hides_is_not_there(value, found):
    assert visible_devices({} if value is None else {"CUDA_VISIBLE_DEVICES": value}, TWO) == found


def test_the_driver_is_asked_where_nobody_says(tmp_path, monkeypatch):
    listing = tmp_path / "nvidia-smi"
    listing.write_text(f"#!/bin/sh\ncat <<'END'\n{LISTING}END\n")
    listing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert visible_devices({}) == ["GPU-1b2c", "MIG-55aa", "MIG-66bb", "GPU-7f80"]
    listing.write_text("#!/bin/sh\nexit 9\n")
    for card in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / "gpus" / card).mkdir(parents=True)
    monkeypatch.setattr(devices, "GPUS", tmp_path / "gpus")
    assert visible_devices({}) == ["0", "1"]
    monkeypatch.setattr(devices, "GPUS", tmp_path / "none")
    assert visible_devices({}) == []


def test_an_empty_listing_has_no_devices():
    assert from_listing("No devices found\n") == []


def opened(tmp_path, monkeypatch, visible, toml=""):
    (tmp_path / "curator.toml").write_text(toml)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    return SimpleNamespace(settings=settings.load(tmp_path), database_url="postgresql://", broker_url="redis://")


def test_the_daemon_has_a_worker_a_device_beside_the_one_of_tables(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    children = daemon._children(opened(tmp_path, monkeypatch, "3,5"))
    assert [(c.name, c.device) for c in children] == [
        ("model-0", "cuda:0"),
        ("model-1", "cuda:1"),
        ("table", ""),
        ("scheduler", ""),
    ]
    assert [c.env["CUDA_VISIBLE_DEVICES"] for c in children] == ["3", "5", "3,5", "3,5"]
    assert [c.env.get("CURATOR_GRADIENTS_DEVICE") for c in children] == ["cuda", "cuda", None, None]
    assert len({arg for c in children for arg in c.argv if arg.startswith("--hostname")}) == 3


def test_cores_are_shared_by_the_workers_of_a_cpu(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(daemon.os, "cpu_count", lambda: 16)
    children = daemon._models(opened(tmp_path, monkeypatch, "", "[gradients]\nworkers = 3\n"))
    assert [c.env["OMP_NUM_THREADS"] for c in children] == ["4", "4", "4"]


def test_a_model_over_all_devices_has_one_worker(tmp_path, monkeypatch):
    toml = '[workload]\nkind = "causal-lm"\noptions = { device_map = "auto" }\n'
    [child] = daemon._models(opened(tmp_path, monkeypatch, "0,1", toml))
    assert child.env["CUDA_VISIBLE_DEVICES"] == "0,1"


@pytest.mark.parametrize("name", ["cuda:7", "no such thing"])
def test_a_process_without_a_supervisor_refuses_such_a_device_too(tmp_path, name):
    asked = settings.Settings(tmp_path)
    asked = replace(asked, gradients=replace(asked.gradients, device=name))
    with pytest.raises(NoSuchDevice):
        instrument.device_of(asked)


def test_a_process_without_a_supervisor_takes_the_first_of_several(tmp_path):
    asked = settings.Settings(tmp_path)
    asked = replace(asked, gradients=replace(asked.gradients, device="cpu,cuda:1"))
    assert instrument.device_of(asked) == torch.device("cpu")

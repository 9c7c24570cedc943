"""Checkpoints: safetensors or a refusal with a code; one digest on every machine."""

import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from curator.errors import CheckpointCorrupt, CheckpointMissing, PickleRefused
from curator.workloads.checkpoints import digest, weights_at


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.arange(3.0)}, path)
    return path


def test_a_safetensors_file_and_a_folder_with_one_pass(good):
    assert weights_at(good) == good
    assert weights_at(good.parent) == good.parent


def test_a_header_that_begins_like_a_pickle_passes(tmp_path):
    for width in range(40, 90):
        path = tmp_path / f"{width}.safetensors"
        save_file({"w" * width: torch.zeros(1)}, path)
        assert weights_at(path) == path
    # Their lengths step by eight, so one of them begins with pickle's 0x80.
    assert any(p.read_bytes()[0] == 0x80 for p in tmp_path.iterdir())


class Bomb:
    def __reduce__(self):
        raise AssertionError("a pickle was opened")


def test_a_pickle_is_refused_by_name_or_by_content_and_never_opened(tmp_path):
    torch.save({"w": torch.zeros(1)}, tmp_path / "model.pt")
    (tmp_path / "renamed.safetensors").write_bytes((tmp_path / "model.pt").read_bytes())
    (tmp_path / "plain.safetensors").write_bytes(pickle.dumps({"w": list(range(99))}))
    (tmp_path / "plain.pkl").write_bytes(b"anything")
    with zipfile.ZipFile(tmp_path / "weights", "w") as archive:
        archive.writestr("data.pkl", b"")
    for name in ("model.pt", "renamed.safetensors", "plain.safetensors", "plain.pkl", "weights"):
        with pytest.raises(PickleRefused, match=name) as refused:
            weights_at(tmp_path / name)
        assert refused.value.code == "CUR-CKP-002"


def test_a_folder_of_pickles_is_refused_and_one_with_both_is_read_safely(good):
    (good.parent / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert weights_at(good.parent) == good.parent
    good.unlink()
    with pytest.raises(PickleRefused, match=r"pytorch_model\.bin"):
        weights_at(good.parent)


def test_what_is_missing_or_cut_off_is_said(good, tmp_path):
    with pytest.raises(CheckpointMissing, match="nowhere"):
        weights_at(tmp_path / "nowhere")
    whole = good.read_bytes()
    for broken in (b"", whole[:4], whole[:20], whole[:-1], whole + b"x", b"\x02" + b"\0" * 7 + b"[]"):
        good.write_bytes(broken)
        with pytest.raises(CheckpointCorrupt):
            weights_at(good)
    good.unlink()
    with pytest.raises(CheckpointMissing):
        weights_at(good.parent)


def test_the_digest_is_of_names_and_contents_and_of_nothing_else(good):
    folder = good.parent
    (folder / "sub").mkdir()
    (folder / "sub" / "config.json").write_text("{}")
    before = digest(folder)
    assert len(before) == 64
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("left by a tool")
    assert digest(folder) == before
    (folder / "sub" / "config.json").rename(folder / "config.json")
    assert digest(folder) != before
    assert digest(good) != before
    with pytest.raises(CheckpointMissing):
        digest(folder / "nowhere")


def test_the_digest_of_a_known_file_is_its_sha256(tmp_path):
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert digest(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

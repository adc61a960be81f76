from __future__ import annotations

import argparse
import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.checkpoints.official import open_official
from cluster.errors import CheckpointError
from cluster.io.checksum import sha256_of, verify_sum, write_sum
from tests.unit.helpers import tiny_policy

Tensors = dict[str, Tensor]


@pytest.fixture
def tensors() -> Tensors:
    return dict(tiny_policy().state_dict())


def trainer_file(tensors: Tensors, **options: Any) -> dict[str, Any]:
    """As LlamaGen's trainer writes it."""
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]}
    args = argparse.Namespace(gpt_model="GPT-B", **options)
    return {"model": tensors, "optimizer": optimizer, "steps": 7, "args": args}


def same(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name])
        for name in expected
    )


@pytest.mark.parametrize("layout", ["model", "module", "state_dict", "bare", "trainer", "legacy"])
def test_every_layout_is_read(layout: str, tensors: Tensors, tmp_path: Path) -> None:
    contents: dict[str, Any] = {
        "module": {"module": tensors, "dp_world_size": 2},
        "state_dict": {"state_dict": tensors, "epoch": 1, "callbacks": {}},
        "bare": tensors,
        "trainer": trainer_file(tensors),
    }
    file = tmp_path / "weights.pt"
    legacy = layout == "legacy"
    torch.save(
        contents.get(layout, {"model": tensors}),
        file,
        _use_new_zipfile_serialization=not legacy,
    )
    assert same(open_official(file).tensors, tensors)


def test_the_average_is_read_on_request_only(tensors: Tensors, tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    average = {name: tensor / 2 for name, tensor in tensors.items()}
    torch.save({"model": tensors, "ema": average}, file)
    assert same(open_official(file).tensors, tensors)
    assert same(open_official(file, ema=True).tensors, average)
    torch.save({"model": tensors, "steps": 1}, file)
    with pytest.raises(CheckpointError, match=r"no 'ema' entry; found 'model', 'steps'"):
        open_official(file, ema=True)


def test_lightnings_callback_key_is_read_without_lightning(
    tensors: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old versions key the state of callbacks by the class."""
    place = "pytorch_lightning.callbacks.model_checkpoint"
    callback = type("ModelCheckpoint", (), {"__module__": place})
    module = types.ModuleType(place)
    module.__dict__["ModelCheckpoint"] = callback
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, place, module)
        content = {"state_dict": tensors, "callbacks": {callback: {"best": 1.0}}}
        torch.save(content, tmp_path / "last.ckpt")
    assert same(open_official(tmp_path / "last.ckpt").tensors, tensors)


class Malice:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickle_that_runs_code_is_refused(
    new_format: bool, tensors: Tensors, tmp_path: Path
) -> None:
    file, marker = tmp_path / "evil.pt", tmp_path / "executed"
    content = {"model": tensors, "args": Malice(marker)}
    torch.save(content, file, _use_new_zipfile_serialization=new_format)
    with pytest.raises(CheckpointError, match=r"evil\.pt: .*found a pickled (posix|nt)\.mkdir"):
        open_official(file)
    assert not marker.exists()
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malice(marker)))
    with pytest.raises(CheckpointError, match=r"plain\.pt"):
        open_official(tmp_path / "plain.pt")
    assert not marker.exists()


def test_what_is_beside_the_weights_is_not_built(tensors: Tensors, tmp_path: Path) -> None:
    torch.save(trainer_file(tensors, path=Path("x"), image_size=48), tmp_path / "trainer.pt")
    file = open_official(tmp_path / "trainer.pt")
    assert same(file.tensors, tensors)
    assert file.options["image_size"] == 48
    assert not isinstance(file.options["path"], Path)
    torch.save({"model": tensors | {"norm.weight": Path("x")}}, tmp_path / "odd.pt")
    refused = r"found a pickled pathlib\S* under 'norm.weight' in model, which is refused"
    with pytest.raises(CheckpointError, match=refused):
        open_official(tmp_path / "odd.pt")


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"GIF89a\0\0\0\0", "an image; name the weights"),
        (b"\x01\x02\x03\x04\0\0", r"begins with b'\\x01"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named(head: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    file.write_bytes(head)
    with pytest.raises(CheckpointError, match=rf"weights\.pt: expected .*found .*{message}"):
        open_official(file)


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.999])
def test_truncated_files_are_named(
    kept: float, new_format: bool, tensors: Tensors, tmp_path: Path
) -> None:
    file = tmp_path / "weights.pt"
    torch.save({"model": tensors}, file, _use_new_zipfile_serialization=new_format)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(CheckpointError, match=r"weights\.pt: .*[Ff]etch it again"):
        open_official(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(2), "found Tensor"),
        ([torch.ones(2)], "found list"),
        ({}, "found nothing"),
        ({"model": {}}, "tensors by name in model, found nothing"),
        ({"model": 3, "steps": 1}, "tensors by name in model, found int"),
        ({"model": {"a": torch.ones(1), "b": 2}}, "found int under 'b'"),
        ({"model": {0: torch.ones(1)}}, "found Tensor under 0"),
        ({"model": {"a": torch.ones(1)}, "module": {}}, "ambiguous, .*'model', 'module'"),
        ({"weights": {"a": torch.ones(1)}, "steps": 1}, "found the entries 'weights', 'steps'"),
        ({"a": torch.ones(1), "steps": 1}, "found the entries 'a', 'steps'"),
    ],
)
def test_unknown_layouts_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=rf"weights\.pt: .*{message}"):
        open_official(tmp_path / "weights.pt")


def test_a_stored_checksum_is_verified(tensors: Tensors, tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    torch.save(tensors, file)
    assert not verify_sum(file)
    write_sum(file, sha256_of(file))
    assert verify_sum(file)
    assert same(open_official(file).tensors, tensors)
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"SHA-256 is \w+, but weights\.pt\.sha256 says"):
        open_official(file)


def test_caches_of_the_official_sampler_are_left_out(tensors: Tensors, tmp_path: Path) -> None:
    caches = {
        "freqs_cis": torch.zeros(10, 8, 2),
        "layers.0.attention.kv_cache.k_cache": torch.zeros(1, 2, 16, 16),
    }
    torch.save({"model": tensors | caches}, tmp_path / "weights.pt")
    file = open_official(tmp_path / "weights.pt")
    assert same(file.tensors, tensors)
    assert file.buffers == {name: tuple(cache.shape) for name, cache in caches.items()}

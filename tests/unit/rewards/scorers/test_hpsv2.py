"""HPSv2: where checkpoints come from, and the traps of the hpsv2 package."""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch

from cluster.errors import CheckpointError, ConfigError
from cluster.messages import Condition
from cluster.model_files.checkpoints import read_checkpoint
from rewards.scorers import hpsv2_package
from rewards.scorers.hpsv2 import HpsConfig, HpsReward, fetch_published

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("hpsv2") is None, reason="the extra tessera-rl[hpsv2] is not installed"
)


@pytest.mark.parametrize(
    ("version", "file"),
    [("v2.0", "HPS_v2_compressed.pt"), ("v2.1", "HPS_v2.1_compressed.pt")],
)
def test_a_version_means_the_published_file(
    monkeypatch: pytest.MonkeyPatch, version: str, file: str
) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name: f"{repo}/{name}")
    assert fetch_published(version) == f"xswu/HPSv2/{file}"


def test_offline_the_error_says_which_file_to_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any) -> None:
        raise huggingface_hub.errors.LocalEntryNotFoundError("somewhere.invalid")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(CheckpointError) as caught:
        HpsReward(HpsConfig(model="ViT-H-14", pretrained="v2.1"))
    message = str(caught.value)
    for part in ("HPS_v2.1_compressed.pt", "xswu/HPSv2", "set pretrained to its path"):
        assert part in message
    assert "somewhere.invalid" not in message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pretrained": "v2.1"}, "set model to ViT-H-14, found 'package://"),
        ({"batch_size": -1}, "batch_size must be >= 0"),
        ({"backend": "package"}, "needs the name of an architecture"),
        ({"backend": "package", "model": "ViT-H-14"}, "a checkpoint as pretrained, found"),
    ],
)
def test_impossible_configurations_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HpsReward(HpsConfig(**fields))


class Evil:
    """Would make a directory when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    file = tmp_path / "evil.pt"
    torch.save({"state_dict": Evil(tmp_path / "made")}, file)
    with pytest.raises(
        CheckpointError, match=r"evil\.pt: expected tensors .*, which runs programs"
    ):
        read_checkpoint(str(file))
    file.write_bytes(pickle.dumps(Evil(tmp_path / "made"), protocol=2))
    with pytest.raises(CheckpointError, match="can run any program"):
        read_checkpoint(str(file))
    assert not (tmp_path / "made").exists()


def test_layouts_of_checkpoint_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {"a": torch.arange(3.0), "b.c": torch.ones(2)}
    torch.save(tensors, tmp_path / "plain.pt")
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "nested.pt")
    parallel = {f"module.{name}": tensor for name, tensor in tensors.items()}
    torch.save({"state_dict": parallel}, tmp_path / "parallel.pt")
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(tensors, tmp_path / "file.safetensors")
    for name in ("plain.pt", "nested.pt", "parallel.pt", "old.pt", "file.safetensors"):
        found = read_checkpoint(str(tmp_path / name))
        assert sorted(found) == ["a", "b.c"], name
        assert torch.equal(found["a"], tensors["a"])
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"list\.pt: expected a dict of tensors.* found list"):
        read_checkpoint(str(tmp_path / "list.pt"))
    (tmp_path / "cut.pt").write_bytes((tmp_path / "plain.pt").read_bytes()[:200])
    with pytest.raises(
        CheckpointError, match=r"cut\.pt: expected a checkpoint .* that was cut off"
    ):
        read_checkpoint(str(tmp_path / "cut.pt"))


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    monkeypatch.setattr(hpsv2_package, "importlib", missing)
    config = HpsConfig(model="ViT-H-14", pretrained="some.pt", backend="package")
    with pytest.raises(ConfigError, match=r"not installed: pip install 'tessera-rl\[hpsv2\]'"):
        HpsReward(config)


def test_what_the_package_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError("No module named 'clint'", name="clint")

    there = SimpleNamespace(find_spec=lambda name: object())
    monkeypatch.setattr(hpsv2_package, "importlib", SimpleNamespace(util=there, import_module=fail))
    with pytest.raises(ConfigError, match="needs clint, which is not installed"):
        hpsv2_package.import_hpsv2()


@needs_package
def test_the_package_imports_without_tk_and_leaves_no_trace() -> None:
    """In a fresh process in which importing tkinter fails, as it does without Tk."""
    program = """
import gzip, sys, warnings
sys.modules["tkinter"] = None
try:
    import turtle
except ImportError:
    pass
else:
    raise SystemExit("turtle imports without tkinter: the test shows nothing")
import open_clip_and_friends
filters, opened = list(warnings.filters), gzip.open
from rewards.scorers.hpsv2_package import import_hpsv2
score = import_hpsv2("hpsv2.img_score").score
assert callable(score)
assert warnings.filters == filters, "UserWarnings stay visible"
assert gzip.open is opened and "turtle" not in sys.modules
""".replace(
        "import open_clip_and_friends",
        "from cluster.model_files.torchvision_ops import ensure_torchvision as e; e()\n"
        "import open_clip, clint",
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_package
def test_the_package_cannot_score_what_it_does_not_pad(tmp_path: Path) -> None:
    from rewards.base import ImageErrors
    from tests.parity import text_image

    text_image.register_tiny(tmp_path)
    text_image.make_checkpoint(text_image.TINY, tmp_path / "tiny.pt")
    hpsv2_package.import_hpsv2().factory.add_model_config(tmp_path)
    fields = {"model": text_image.TINY, "pretrained": str(tmp_path / "tiny.pt")}
    images = [np.zeros((224, 100, 3), np.uint8), np.zeros((224, 224, 3), np.uint8)]
    conditions = [Condition(text="a")] * 2
    package = HpsReward(HpsConfig(**fields, backend="package"))
    with pytest.raises(ImageErrors, match="does not pad an image of 224 x 100") as caught:
        package(images, conditions)
    assert list(caught.value.errors) == [0]
    scores = HpsReward(HpsConfig(**fields))(images, conditions)
    np.testing.assert_allclose(package(images[1:], conditions[1:]), scores[1:], atol=1e-5)
    with pytest.raises(ImageErrors, match="has 78 tokens, but the model reads 77"):
        package(images[1:], [Condition(text="a " * 76)])

"""The system mnist: its networks train and fit its preset; where they are built, and looked for."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from actors.checkpoints.loading import count_parameters
from cluster.errors import CheckpointError, NotBuiltError
from cluster.model_files.tensors import WEIGHTS_VARIABLE, locate
from cluster.preflight import Findings
from learner.config import load_preset
from learner.data import mnist as images
from learner.miniature.build import BuildConfig, main
from learner.miniature.systems.mnist import ARCHITECTURE, MNIST, mnist_by_class, shifted
from learner.miniature.systems.registry import SYSTEMS
from learner.miniature.training import LabelledImages
from learner.preflight import preflight

needs_mnist = pytest.mark.skipif(
    importlib.util.find_spec(images.PACKAGE) is None, reason="needs the extra mnist"
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory of downloads."""
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def use(data: Callable[[], LabelledImages], monkeypatch: pytest.MonkeyPatch) -> None:
    networks = tuple(dataclasses.replace(network, data=data) for network in MNIST.networks)
    monkeypatch.setitem(SYSTEMS, "mnist", dataclasses.replace(MNIST, networks=networks))


@needs_mnist
def test_one_step_of_each_network_makes_what_the_preset_needs(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = mnist_by_class()
    few = LabelledImages(whole.pixels[:40], whole.labels[:40], whole.conditions, shifted)
    use(lambda: few, monkeypatch)
    assert main(["--system", "mnist", "--scale", "0.001", "--num-threads", "1"]) == 0
    assert "learner.run --preset mnist" in capsys.readouterr().out
    built = {str(file.relative_to(cache / "mnist")) for file in cache.rglob("*.safetensors")}
    assert built == {network.file for network in MNIST.networks}
    assert not preflight(load_preset("mnist")).problems
    assert not preflight(load_preset(str(cache / "mnist" / "mnist.yaml"))).problems


def test_augmentation_moves_whole_pixels_and_blurs_none() -> None:
    pixels = torch.rand(200, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moved = shifted(pixels, torch.Generator().manual_seed(1))
    assert torch.equal(moved, shifted(pixels, torch.Generator().manual_seed(1)))
    assert (moved[:, :, 1:4, 1:4] != pixels[:, :, 1:4, 1:4]).any()
    padded = torch.nn.functional.pad(pixels, (1, 1, 1, 1), value=-1.0)
    windows = [padded[:, :, y : y + 5, x : x + 5] for y in range(3) for x in range(3)]
    found = torch.stack([(moved == each).flatten(1).all(1) for each in windows])
    assert (found.sum(0) == 1).all()
    assert found.any(1).all()


def test_the_policy_has_millions_of_parameters() -> None:
    assert 2e6 <= count_parameters(ARCHITECTURE) <= 5e6
    assert ARCHITECTURE.grid == 7


def test_without_the_images_nothing_is_made(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(images, "PACKAGE", "no_such_package")
    use(mnist_by_class.__wrapped__, monkeypatch)
    assert main(["--system", "mnist"]) == 2
    assert "pip install 'tessera-rl[mnist]'" in capsys.readouterr().err
    assert not cache.exists()


def test_networks_elsewhere_are_used_by_the_preset_beside_them(tmp_path: Path) -> None:
    assert BuildConfig(system="mnist", out=tmp_path).folder == tmp_path
    assert BuildConfig().folder == Path("networks")


def test_networks_that_are_not_built_are_missing_once(cache: Path) -> None:
    findings = Findings()
    for field in ("policy.checkpoint", "tokenizer.checkpoint"):
        with findings.of(field):
            locate(f"built://mnist/{field}")
    with pytest.raises(NotBuiltError):
        locate("built://mnist/clip", directory=True)
    assert findings.problems == [
        f"built://mnist: expected networks in {cache / 'mnist'}, found none: build them, "
        "`python -m learner.miniature.build --system mnist`"
    ]
    file = cache / "mnist" / "policy.safetensors"
    file.parent.mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"built://mnist/policy.safetensors: no such file"):
        locate("built://mnist/policy.safetensors")
    file.touch()
    assert locate("built://mnist/policy.safetensors") == file

"""Classifiers of ImageNet's classes against plain timm, and the sizes that capacity counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cluster.errors import CheckpointError, ConfigError, DataError
from cluster.messages import Condition
from cluster.model_files.torchvision_ops import ensure_torchvision
from cluster.preflight import Findings
from rewards.networks.timm_models import known_classifier, load_classifier, sizes_of
from rewards.scorers.classifier import ClassifierConfig

SMALL = "mobilenetv3_small_050.lamb_in1k"


@pytest.fixture(scope="module")
def network() -> nn.Module:
    ensure_torchvision()
    import timm

    torch.manual_seed(0)
    made: nn.Module = timm.create_model(SMALL).eval()
    made.get_parameter("classifier.weight").data.normal_(0, 100)
    with torch.no_grad():  # what images have in common says nothing
        made.get_parameter("classifier.bias").data = -made(plain_pixels(made)).mean(0)
    return made


def pictures() -> list[np.ndarray]:
    """Six of two sizes."""
    blocks = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), np.uint8)
    return [blocks[at].repeat(70 if at % 2 else 64, 0).repeat(64, 1) for at in range(6)]


def plain_pixels(network: nn.Module) -> torch.Tensor:
    """timm's transform, image by image with PIL."""
    ensure_torchvision()
    from timm.data import create_transform, resolve_data_config

    transform = create_transform(**resolve_data_config({}, model=network))
    return torch.stack([transform(Image.fromarray(image)) for image in pictures()])


@pytest.fixture(scope="module")
def weights(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("weights") / "classifier.pth"
    torch.save(network.state_dict(), file)
    return str(file)


def test_accuracy_is_that_of_plain_timm(network: nn.Module, weights: str) -> None:
    with torch.no_grad():
        expected = network(plain_pixels(network)).argmax(-1).tolist()
    assert len(set(expected)) > 2  # it tells images apart
    accuracy = ClassifierConfig(model=SMALL, checkpoint=weights, batch=4).load("cpu")
    right = [Condition(text="", class_index=index) for index in expected]
    wrong = [Condition(text="", class_index=(index + 1) % 1000) for index in expected]
    assert accuracy(pictures(), right).tolist() == [1.0] * 6
    assert accuracy(pictures(), wrong).tolist() == [0.0] * 6
    with pytest.raises(DataError, match=r"0\.\.999, found 1000"):
        accuracy(pictures()[:1], [Condition(text="", class_index=1000)])


def test_files_and_names_that_do_not_fit(weights: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"know 21841 classes, expected .* ImageNet's 1000"):
        known_classifier("convnext_tiny.fb_in22k")
    with pytest.raises(ConfigError, match=r"'resnet5000' is none of timm's models; close are"):
        known_classifier("resnet5000")
    with pytest.raises(CheckpointError, match=r"classifier\.pth does not fit timm's 'resnet18\."):
        load_classifier("resnet18.a1_in1k", weights)


def found(config: ClassifierConfig, classes: range | None = range(1000)) -> Findings:
    findings = Findings()
    config.check(256, classes, findings)
    return findings


def test_before_a_run(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    assert found(ClassifierConfig(model=SMALL, checkpoint=weights)) == Findings()
    (download,) = found(ClassifierConfig(model=SMALL)).downloads
    assert download.url == f"https://huggingface.co/timm/{SMALL}/resolve/main/model.safetensors"
    assert download.size == 4 * sizes_of(SMALL).parameters
    (problem,) = found(ClassifierConfig(model=SMALL), None).problems
    assert problem.startswith("judge.classifier.model: expected no classifier, since conditions")
    (problem,) = found(ClassifierConfig(model=SMALL, checkpoint=weights), range(1200)).problems
    assert "classes 0 to 999 of the classifier, found 1199" in problem
    (problem,) = found(ClassifierConfig(model=SMALL, checkpoint="none.pth")).problems
    assert problem.startswith("judge.classifier.checkpoint: none.pth: no such file")
    (problem,) = found(ClassifierConfig(model="resnet5000")).problems
    assert problem.startswith("judge.classifier.model: model: 'resnet5000' is none of timm's")
    assert not ClassifierConfig(checkpoint="").enabled
    assert ClassifierConfig(model=SMALL, checkpoint="").enabled


def test_sizes_are_the_papers() -> None:
    """ResNet-50 (1512.03385): 25.6 M parameters, 4.1 G products and sums of 224 pixels."""
    sizes = sizes_of("resnet50.a1_in1k")
    assert sizes.parameters == 25_557_032
    assert sizes.flops == pytest.approx(2 * 4.09e9, rel=0.01)
    assert sizes.largest == 64 * 112 * 112
    assert sizes.convolutions
    assert not sizes_of("deit3_base_patch16_224.fb_in22k_ft_in1k").convolutions

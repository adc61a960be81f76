"""DINOv2 against plain timm, CLIP against plain open_clip."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cluster.errors import CheckpointError, ConfigError
from cluster.model_files.tensors import locate
from cluster.model_files.torchvision_ops import ensure_torchvision
from rewards.networks.features import FeaturesConfig, load_features
from rewards.networks.vision_towers import known_tower
from tests.file_rows import reads
from tests.fuzzing import check_reader
from tests.unit.rewards.networks.test_inception import pictures

SMALL = "vit_small_patch14_dinov2.lvd142m"
SIZES = [
    (224, 224),
    (90, 130),
    *(pytest.param(size, marks=pytest.mark.slow) for size in ((256, 256), (2, 2))),
]
MINIATURE_CLIP = "package://learner.miniature/networks/clip"


def randomise(network: nn.Module) -> nn.Module:
    """Weights under which attention is uneven, and every block changes the class token."""
    torch.manual_seed(0)
    for name, parameter in network.named_parameters():
        if name.endswith("gamma"):  # layer scale, which begins at 1e-5
            parameter.data.fill_(0.5)
        elif parameter.ndim > 1 and "embed.proj" not in name:
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
    return network.eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as timm publishes them: position embeddings for 518 pixels."""
    ensure_torchvision()
    import timm

    network = randomise(timm.create_model(SMALL, num_classes=0))
    file = tmp_path_factory.mktemp("weights") / "dinov2.pth"
    torch.save(network.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def plain(weights: Path) -> nn.Module:
    """A network that resamples its position embeddings for every image, not when it is loaded."""
    ensure_torchvision()
    import timm

    network = timm.create_model(SMALL, num_classes=0, dynamic_img_size=True)
    network.load_state_dict(torch.load(weights, weights_only=True))
    return network.eval()


def plain_timm(network: nn.Module, images: list[np.ndarray]) -> np.ndarray:
    """Image by image, with PIL, and the class token taken by hand."""
    ensure_torchvision()
    from timm.data import create_transform, resolve_data_config

    options = resolve_data_config({}, model=network) | {"input_size": (3, 224, 224)}
    transform = create_transform(**options)
    pixels = torch.stack([transform(Image.fromarray(image)) for image in images])
    with torch.no_grad():
        return network.forward_features(pixels)[:, 0].numpy()


@pytest.mark.parametrize("size", SIZES)
def test_dinov2_equals_plain_timm(size: tuple[int, int], weights: Path, plain: nn.Module) -> None:
    images = pictures(size)
    extract = load_features(FeaturesConfig(network="dinov2", model=SMALL, checkpoint=str(weights)))
    ours, theirs = extract(images), plain_timm(plain, list(images))
    assert theirs.std(0).mean() > 0.05
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_dinov2_takes_mixed_sizes_and_bf16(weights: Path, plain: nn.Module) -> None:
    images = [pictures(size)[0] for size in ((90, 130), (64, 64), (90, 130))]
    images[2] = images[2][::-1].copy()
    options = {"network": "dinov2", "model": SMALL, "checkpoint": str(weights), "batch": 2}
    theirs = plain_timm(plain, images)
    exact = load_features(FeaturesConfig(**options))
    np.testing.assert_allclose(exact(images), theirs, rtol=0, atol=1e-4)
    rough = load_features(FeaturesConfig(**options, precision="bf16"))
    values = rough(images)
    assert values.dtype == np.float32
    error = np.abs(values - theirs).mean() / theirs.std(0).mean()
    assert 1e-4 < error < 0.1
    assert rough.fingerprint == f"{exact.fingerprint}-bf16"


@reads("rewards/README.md", "a vision transformer's checkpoint of timm or DINOv2's authors")
def test_dinov2_files_of_its_authors(weights: Path, tmp_path: Path) -> None:
    """They carry a mask token, for training."""
    state = torch.load(weights, weights_only=True) | {"mask_token": torch.zeros(1, 384)}
    torch.save(state, tmp_path / "dinov2_vits14_pretrain.pth")
    prints = {
        load_features(
            FeaturesConfig(network="dinov2", model=SMALL, checkpoint=str(file))
        ).fingerprint
        for file in (weights, tmp_path / "dinov2_vits14_pretrain.pth")
    }
    assert len(prints) == 1


def test_a_file_needs_the_tag_where_timms_differ(tmp_path: Path) -> None:
    """ImageNet's constants or 0.5, a crop of 0.9 or none, GELU or QuickGELU: by the tag alone."""
    ensure_torchvision()
    import timm

    file = tmp_path / "model.safetensors"
    file.touch()
    asked = []
    for name in timm.list_models(module="vision_transformer"):
        tags = timm.list_models(f"{name}.*", pretrained=True)
        configs: list[Any] = [timm.get_pretrained_cfg(tag) for tag in tags]
        ways = {(c.mean, c.std, c.interpolation, c.crop_mode, c.crop_pct, c.notes) for c in configs}
        try:
            known_tower(name, str(file))
            assert len(ways) <= 1, name
        except ConfigError as error:
            told = str(error)
            assert len(ways) > 1 or "QuickGELU" in told or "no weights" in told, name
            asked += [name] if "does not tell" in told else []
    assert len(asked) >= 16
    assert {"vit_base_patch16_224", "vit_base_patch16_clip_224"} <= set(asked)
    assert known_tower("vit_base_patch16_224.dino", str(file))[1].mean[0] == 0.485
    assert known_tower("vit_base_patch16_224", "")[1].mean[0] == 0.5  # timm fetches that tag's


def test_timms_configuration_beside_a_file_tells_the_tag(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    beside = {"architecture": "vit_base_patch16_224", "pretrained_cfg": {"tag": "dino"}}
    (tmp_path / "config.json").write_text(json.dumps(beside))
    assert known_tower("vit_base_patch16_224", str(file))[0] == "vit_base_patch16_224.dino"
    others: tuple[Any, ...] = (
        {},
        [],
        {"architecture": "vit_large_patch16_224", "pretrained_cfg": {}},
    )
    for other in others:
        (tmp_path / "config.json").write_text(json.dumps(other))
        with pytest.raises(
            ConfigError, match=r"tags differ .*\.bamboo: \('bicubic', 'center', 1\.0, "
        ):
            known_tower("vit_base_patch16_224", str(file))


def test_a_damaged_configuration_beside_a_file_tells_nothing(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    beside = {"architecture": "vit_base_patch16_224", "pretrained_cfg": {"tag": "dino"}}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(beside))

    def read(_: Path) -> object:
        return known_tower("vit_base_patch16_224", str(tmp_path / "model.safetensors"))[0]

    check_reader(file, read, 150, good=lambda name: name == "vit_base_patch16_224.dino")


def test_weights_with_quick_gelu_need_the_model_with_it() -> None:
    ensure_torchvision()
    import timm

    quick = timm.list_models("vit_*_clip_quickgelu_*", pretrained=True)
    assert len(quick) >= 10
    for model in quick:
        assert known_tower(model)[0] == model
        if "quickgelu_" in model and model.replace("quickgelu_", "") in timm.list_pretrained():
            with pytest.raises(ConfigError, match=f"set model to {model}$"):
                known_tower(model.replace("quickgelu_", ""))


def test_dinov2_files_that_do_not_fit(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    del state["norm.weight"]
    torch.save(state, tmp_path / "cut.pth")
    config = FeaturesConfig(network="dinov2", model=SMALL, checkpoint=str(tmp_path / "cut.pth"))
    with pytest.raises(CheckpointError, match=rf"cut\.pth does not fit timm's '{SMALL}'.*norm\.w"):
        load_features(config)


def test_models_that_are_not_there() -> None:
    with pytest.raises(
        ConfigError, match=r"'vit_smal_patch14_dinov2' is none of .*; close are vit_s"
    ):
        load_features(FeaturesConfig(network="dinov2", model="vit_smal_patch14_dinov2"))
    with pytest.raises(
        ConfigError, match=r"Invalid pretrained tag .* timm has vit_small_p.*lvd142m"
    ):
        load_features(FeaturesConfig(network="dinov2", model="vit_small_patch14_dinov2.nope"))
    with pytest.raises(ConfigError, match=r"'resnet50\.a1_in1k' is none of timm's vision transf"):
        load_features(FeaturesConfig(network="dinov2", model="resnet50.a1_in1k"))
    with pytest.raises(
        CheckpointError, match=r"'ViT-L-14' needs weights: .*goes into `checkpoint`"
    ):
        load_features(FeaturesConfig(network="clip", model="ViT-L-14"))


@pytest.mark.parametrize("network", ["dinov2", "clip"])
def test_without_a_network(network: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    model = SMALL if network == "dinov2" else ""
    with pytest.raises(CheckpointError, match="`checkpoint`"):
        load_features(FeaturesConfig(network=network, model=model))  # type: ignore[arg-type]


def clip_directory(folder: Path, resize_mode: str) -> Path:
    """The miniature's CLIP with another way of resizing."""
    directory = shutil.copytree(locate(MINIATURE_CLIP, directory=True), folder / resize_mode)
    config = json.loads((directory / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["resize_mode"] = resize_mode
    (directory / "open_clip_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (13, 9)])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
def test_clip_equals_plain_open_clip(
    size: tuple[int, int], resize_mode: str, tmp_path: Path
) -> None:
    """CLIP's image features are not of unit length: their length tells images apart, too."""
    ensure_torchvision()
    import open_clip

    directory = clip_directory(tmp_path, resize_mode)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{directory}")
    images = pictures(size, 3)
    with torch.no_grad():
        pixels = torch.stack([transform(Image.fromarray(image)) for image in images])
        theirs = model.eval().encode_image(pixels).numpy()
    ours = load_features(FeaturesConfig(network="clip", model=str(directory), batch=2))(images)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    assert theirs.std(0).mean() > 1e-2
    assert np.abs(np.linalg.norm(theirs, axis=1) - 1).min() > 0.05

"""What all feature networks share: configuration, files of weights, fingerprints, references."""

from __future__ import annotations

import hashlib
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from cluster.errors import CheckpointError, ConfigError, DataError
from cluster.model_files.checkpoints import read_checkpoint
from cluster.model_files.torchvision_ops import ensure_torchvision
from rewards.base import ImageErrors
from rewards.distribution.config import MomentsConfig
from rewards.distribution.reference import Reference
from rewards.networks.extractor import NetworkFeatures
from rewards.networks.features import MINIATURE, FeaturesConfig, PixelFeatures, load_features
from rewards.networks.inception import fid_inception
from rewards.networks.weight_files import published_file, weights_digest
from rewards.reference import main, read_reference, read_stored
from rewards.servers.space_history import SpaceHistory
from tests.unit.rewards.networks.test_inception import pictures, randomise
from tests.unit.rewards.networks.test_vision_towers import MINIATURE_CLIP, SMALL


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Random weights of each network, in files."""
    ensure_torchvision()
    import timm
    from torchvision.models import inception_v3

    networks = {
        "inception": fid_inception(),
        "torchvision-inception": inception_v3(init_weights=False),
        "dinov2": timm.create_model(SMALL, num_classes=0),
    }
    folder = tmp_path_factory.mktemp("weights")
    for name, network in networks.items():
        torch.save(randomise(network).state_dict(), folder / f"{name}.pth")
    return {name: str(folder / f"{name}.pth") for name in networks}


def config(network: str, files: dict[str, str], **options: Any) -> FeaturesConfig:
    model = {"dinov2": SMALL, "clip": MINIATURE_CLIP}.get(network, "")
    options = {"checkpoint": files.get(network, ""), "model": model} | options
    return FeaturesConfig(network=network, **options)  # type: ignore[arg-type]


# Configuration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "pixels", "checkpoint": "a.pth"}, "checkpoint: features of network 'pixels'"),
        (
            {"network": "pixels", "model": "x"},
            "of one model, found 'x': it is for dinov2",
        ),
        ({"network": "inception", "model": "ViT-L-14"}, "model: features of network 'inception'"),
        ({"model": "ViT-L-14"}, "model: features of network 'convnet'"),
        ({"network": "inception", "precision": "bf16"}, "would not be the literature's"),
        ({"network": "clip", "batch": 0}, "batch must be >= 1, found 0"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FeaturesConfig(**options)


def test_the_miniatures_file_may_be_named() -> None:
    """As configurations of earlier runs name it, for pixels too."""
    assert isinstance(
        load_features(FeaturesConfig(network="pixels", checkpoint=MINIATURE)), PixelFeatures
    )
    named, default = (
        load_features(FeaturesConfig(checkpoint=MINIATURE)),
        load_features(FeaturesConfig()),
    )
    assert named.fingerprint == default.fingerprint


# Files of weights


@pytest.mark.parametrize(
    ("network", "other", "told"),
    [
        ("inception", "torchvision-inception", r"Inception3: .*AuxLogits"),
        ("torchvision-inception", "inception", r"Inception3: .*missing, .*AuxLogits"),
        ("dinov2", "inception", r"does not fit timm's"),
        ("convnet", "inception", "expected a safetensors file, found a PyTorch file"),
    ],
)
def test_files_of_another_network(
    network: str, other: str, told: str, files: dict[str, str]
) -> None:
    with pytest.raises(CheckpointError, match=told):
        load_features(config(network, files, checkpoint=files[other]))


def test_the_same_weights_in_any_file(tmp_path: Path, files: dict[str, str]) -> None:
    state = read_checkpoint(files["inception"])
    save_file(state, tmp_path / "weights.safetensors")
    torch.save({"state_dict": state}, tmp_path / "wrapped.pt")
    state["fc.bias"][3] += 1
    torch.save(state, tmp_path / "changed.pth")
    prints = {
        name: load_features(FeaturesConfig(network="inception", checkpoint=str(file))).fingerprint
        for name, file in {
            "plain": files["inception"],
            "safetensors": tmp_path / "weights.safetensors",
            "wrapped": tmp_path / "wrapped.pt",
            "changed": tmp_path / "changed.pth",
        }.items()
    }
    assert prints["plain"] == prints["safetensors"] == prints["wrapped"] != prints["changed"]


def test_a_digest_is_of_names_shapes_and_bytes() -> None:
    def network(**tensors: Tensor) -> nn.Module:
        module = nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return module

    digests = [
        weights_digest(network(**tensors))
        for tensors in (
            {"a": torch.arange(6.0), "b": torch.zeros(2)},
            {"b": torch.zeros(2), "a": torch.arange(6.0)},
            {"a": torch.arange(6.0), "b": torch.tensor([0.0, -0.0])},
            {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(2)},
            {"a": torch.arange(6.0), "c": torch.zeros(2)},
        )
    ]
    assert digests[0] == digests[1]
    assert len(set(digests[1:])) == 4


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"x": Path("y")}, protocol=2))
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    torch.save({"epoch": 3, "x": torch.zeros(1)}, tmp_path / "run.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    for name, told in {
        "evil": "pickled objects are not read, they can run any program",
        "page": "found a web page; .* fetch the file itself",
        "run": "expected weights under .*, or nothing but tensors, found the entries 'epoch', 'x'",
        "list": "expected a dict of tensors, .* found list",
        "none": "no such file",
    }.items():
        with pytest.raises(CheckpointError, match=told):
            read_checkpoint(str(tmp_path / f"{name}.pth"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def test_published_files_are_fetched_once_and_checked(tmp_path: Path, cache: Path) -> None:
    """torch's downloader, from a file: address."""
    content = b"weights" * 1000
    digest = hashlib.sha256(content).hexdigest()[:8]
    source = tmp_path / f"network-{digest}.pth"
    source.write_bytes(content)
    fetched = published_file(source.as_uri())
    assert fetched == cache / source.name
    assert fetched.read_bytes() == content
    source.unlink()
    assert published_file(source.as_uri()) == fetched
    fetched.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=rf"begins with {digest}, found .*: remove it, then"):
        published_file(source.as_uri())
    source.write_bytes(b"another file")
    fetched.unlink()
    with pytest.raises(CheckpointError, match=r"cannot be fetched \(invalid hash value"):
        published_file(source.as_uri())
    assert not fetched.exists()


@pytest.mark.parametrize("network", ["inception", "torchvision-inception"])
def test_without_a_network_the_file_is_named(
    network: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(request: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    with pytest.raises(CheckpointError) as caught:
        load_features(FeaturesConfig(network=network, checkpoint="published"))  # type: ignore[arg-type]
    told = str(caught.value)
    name = {
        "inception": "weights-inception-2015-12-05-6726825d.pth",
        "torchvision-inception": "inception_v3_google-0cc3c7bd.pth",
    }[network]
    assert told.startswith(f"{name} cannot be fetched (Name or service not known): put https://")
    assert f" at {cache / name}, or name your copy of it in `checkpoint`" in told


# Fingerprints, precision, images


def test_fingerprints_name_network_weights_and_preprocessing(files: dict[str, str]) -> None:
    found = {name: load_features(config(name, files)).fingerprint for name in [*files, "clip"]}
    for name, ending in {
        "inception": "tensorflow299",
        "torchvision-inception": "antialias299-imagenet",
        "dinov2": "bicubic-shortest224-224x224-0.485,0.456,0.406,0.229,0.224,0.225",
        "clip": "bicubic-shortest-8x8-0.5,0.5,0.5,0.5,0.5,0.5-gelu",
    }.items():
        assert re.fullmatch(rf"{name}-[0-9a-f]{{16}}-{re.escape(ending)}", found[name])


def test_precision_is_part_of_the_space(files: dict[str, str]) -> None:
    exact, rough = (
        load_features(config("clip", files, precision=precision)) for precision in ("fp32", "bf16")
    )
    images = pictures((8, 8), 5)
    gap = np.abs(exact(images) - rough(images)).max()
    assert 1e-4 < gap < 0.1
    assert rough.fingerprint == f"{exact.fingerprint}-bf16"


def test_batches_and_order_change_nothing(files: dict[str, str]) -> None:
    images = [pictures(size, 7)[row] for row, size in enumerate([(8, 8), (12, 9), (30, 8)] * 2)]
    alone = load_features(config("clip", files, batch=1))
    together = load_features(config("clip", files, batch=4))
    expected = np.concatenate([alone(image[None]) for image in images])
    np.testing.assert_allclose(together(images), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(together(images[::-1]), expected[::-1], rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("error")
def test_read_only_and_strided_images(files: dict[str, str]) -> None:
    """As they come from another process, and out of a larger array."""
    extract, images = load_features(config("clip", files)), pictures((8, 8), 4)
    expected = extract(images)
    images.flags.writeable = False
    np.testing.assert_array_equal(extract(images), expected)
    np.testing.assert_allclose(extract(images[::2]), expected[::2], atol=1e-6)


def test_every_network_can_be_warmed() -> None:
    seen: list[tuple[int, ...]] = []
    extractor = NetworkFeatures(
        torch.nn.Identity(),
        embed=lambda pixels: seen.append(tuple(pixels.shape)) or pixels[:, :1, 0, 0],
        preprocess=lambda images: torch.zeros(len(images), 3, 8, 8),
        fingerprint="x",
    )
    extractor.warm()
    assert seen == [(1, 3, 8, 8)]


def test_small_networks_name_the_images_they_cannot_take() -> None:
    convnet, pixels = load_features(FeaturesConfig()), PixelFeatures()
    fit, other = pictures((8, 8)), pictures((16, 8))
    with pytest.raises(ImageErrors) as caught:
        convnet([fit[0], other[0], fit[1], other[1]])
    assert sorted(caught.value.errors) == [1, 3]
    assert "takes (8, 8, 3) images, found (16, 8, 3)" in caught.value.errors[3]
    np.testing.assert_array_equal(convnet(list(fit)), convnet(fit))
    with pytest.raises(ImageErrors) as caught:
        pixels([fit[0], other[0], fit[1]])
    told = "is 16 x 8, but image 0 is 8 x 8: pixel features compare images of one size"
    assert caught.value.errors == {1: told}


# References


@pytest.mark.parametrize(
    "network",
    [
        pytest.param("inception", marks=pytest.mark.slow),
        "clip",
        pytest.param("torchvision-inception", marks=pytest.mark.slow),
        pytest.param("dinov2", marks=pytest.mark.slow),
    ],
)
def test_references_of_every_network(
    network: str, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "photos", tmp_path / "ref.npz"
    folder.mkdir()
    images = [pictures(size, 3)[row] for row, size in enumerate([(32, 32), (48, 30), (32, 32)])]
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number}.png")
    chosen = config(network, files)
    arguments = ["--images", str(folder), "--out", str(out), "--features.network", network]
    for option in ("checkpoint", "model"):
        if getattr(chosen, option):
            arguments += [f"--features.{option}", getattr(chosen, option)]
    assert main(arguments) == 0
    extractor = load_features(chosen)
    features = extractor(images)
    stored = read_stored(out, extractor.fingerprint)
    np.testing.assert_allclose(stored.reference.mu, features.mean(0), atol=1e-5)
    scale = np.abs(np.cov(features.T)).max()
    np.testing.assert_allclose(stored.reference.sigma, np.cov(features.T), atol=1e-4 * scale)
    assert (
        f"3 images, {features.shape[1]} dimensions, features {network}-" in capsys.readouterr().out
    )
    with pytest.raises(DataError, match="fingerprint: expected features 'convnet-"):
        read_reference(out, load_features(FeaturesConfig()).fingerprint)


def test_references_of_other_tools_are_taken_with_inception(
    files: dict[str, str], tmp_path: Path
) -> None:
    """They name no network. One that names another is refused."""
    extractor = load_features(config("inception", files))
    features = np.random.default_rng(0).normal(size=(8, 2048))
    moments = {"mu": features.mean(0), "sigma": np.cov(features.T)}
    np.savez(tmp_path / "fid_stats.npz", **moments)
    other = Reference(*moments.values(), fingerprint="torchvision-inception-0-x")
    server = SpaceHistory(MomentsConfig())
    foreign = read_reference(tmp_path / "fid_stats.npz", extractor.fingerprint)
    assert foreign.fingerprint == ""
    server.set_reference(foreign, extractor.fingerprint)
    with pytest.raises(DataError, match="'torchvision-inception-0-x', but the reward servers use"):
        server.set_reference(other, extractor.fingerprint)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (FeaturesConfig(), "--features.network convnet"),
        (
            FeaturesConfig(network="clip", model="ViT-B-32", checkpoint="my clip.pt", tag="openai"),
            "--features.network clip --features.checkpoint 'my clip.pt' --features.model ViT-B-32 "
            "--features.tag openai",
        ),
        (
            FeaturesConfig(network="dinov2", precision="bf16", batch=8),
            "--features.network dinov2 --features.precision bf16",
        ),
    ],
)
def test_the_options_of_the_command_that_makes_a_reference(
    config: FeaturesConfig, options: str
) -> None:
    assert config.options() == options

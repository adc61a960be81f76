"""Rewards on a GPU against the host: pixels, scores, features. The same tests run on a CPU with
small networks. Not yet run on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.models.vq import VQConfig, VQTokenizer
from cluster.messages import Condition
from cluster.program.precision import exact_fp32
from learner.training.real_tokens import encode_images
from rewards.config import RewardServerConfig
from rewards.networks.convnet import load_convnet
from rewards.networks.features import MINIATURE, FeaturesConfig, load_features
from rewards.networks.inception import fid_inception, fid_pixels
from rewards.networks.open_clip_models import Precision
from rewards.networks.preprocessing import Preprocess, fit, preprocess, to_device
from rewards.scorers.hpsv2 import HpsConfig, HpsReward
from rewards.servers.reward_server import RewardServer
from tests.parity import text_image
from tests.unit.helpers import request
from tests.unit.rewards.networks.test_inception import randomise

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CONDITIONS = [Condition(text=text) for text in text_image.PROMPTS]
CLOSE: dict[Precision, float] = {"fp32": 1e-5, "bf16": 5e-3}
"""Largest difference of scores from those of fp32 on the host. (`spread` enlarges that of bf16.)"""


@pytest.fixture(autouse=True)
def _exact() -> None:
    exact_fp32()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(256, 256), (384, 300), (13, 9)])
def test_pixels_are_the_hosts_bit_for_bit(device: str, mode: Any, size: tuple[int, int]) -> None:
    """The last operations against numpy's, of IEEE: a GPU's division by a number is not."""
    config = Preprocess(
        size=(224, 224),
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        resize_mode=mode,
    )
    images = text_image.pictures(3, *size)
    levels = fit(torch.from_numpy(images).permute(0, 3, 1, 2), config).numpy()
    mean, std = (np.float32(values)[:, None, None] for values in (config.mean, config.std))
    expected = (levels.astype(np.float32) / np.float32(255) - mean) / std
    found = preprocess(to_device(images, device), config)
    assert found.device.type == device
    np.testing.assert_array_equal(found.cpu().numpy(), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_inceptions_pixels_are_the_hosts_bit_for_bit(device: str) -> None:
    images = torch.from_numpy(text_image.pictures(2, 256, 200)).permute(0, 3, 1, 2)
    assert torch.equal(fid_pixels(images.to(device)).cpu(), fid_pixels(images))


@pytest.mark.parametrize("device", DEVICES)
def test_scores_are_the_hosts(device: str, tmp_path: Path) -> None:
    """HPSv2's scorer in fp32 and bf16, of images of one size and of several. Random weights: a
    small architecture for a CPU, ViT-B-16 for a GPU."""
    text_image.register_tiny(tmp_path)
    model, file = text_image.TINY if device == "cpu" else "ViT-B-16", tmp_path / "random.pt"
    text_image.make_checkpoint(model, file)

    def scorer(on: str, precision: Precision) -> HpsReward:
        return HpsReward(HpsConfig(model=model, pretrained=str(file), precision=precision), on)

    images = text_image.pictures(4, 256, 256)
    mixed = [*images[:2], *text_image.pictures(2, 100, 60)]
    asked = [CONDITIONS[index % 2] for index in range(4)]
    host = scorer("cpu", "fp32")
    expected = {"same": host(images, asked), "mixed": host(mixed, asked)}
    assert np.ptp(expected["same"]) > 10 * CLOSE["bf16"]
    for precision, tolerance in CLOSE.items():
        if (device, precision) == ("cpu", "fp32"):
            alone = [host(image[None], [condition])[0] for image, condition in zip(mixed, asked)]
            np.testing.assert_allclose(expected["mixed"], alone, rtol=0, atol=tolerance)
            continue
        ours = scorer(device, precision)
        for name, given in (("same", images), ("mixed", mixed)):
            np.testing.assert_allclose(ours(given, asked), expected[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), *DEVICES[1:]])
def test_features_of_inception_are_the_hosts(device: str, tmp_path: Path) -> None:
    """By the extractor in batches of 1, against the network itself on the host."""
    network = randomise(fid_inception()).eval()
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    images = text_image.pictures(2, 128, 128)
    with torch.inference_mode():
        pixels = fid_pixels(torch.from_numpy(images).permute(0, 3, 1, 2))
        expected = network(pixels)[0].numpy()
    config = FeaturesConfig(
        network="inception", checkpoint=str(tmp_path / "inception.pth"), batch=1
    )
    found = load_features(config, device)(images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_features_of_the_miniature_are_the_hosts(device: str) -> None:
    images = text_image.pictures(20, 8, 8)
    expected, logits = load_convnet(MINIATURE, "cpu").run(images)
    features, found = load_convnet(MINIATURE, device).run(images)
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_real_images_get_the_hosts_tokens(device: str) -> None:
    """Where two codes are equally near, rounding may decide: one in a thousand. VQ-16 itself on a
    GPU."""
    small = {"channels": 32, "multipliers": (1, 1, 2), "num_res_blocks": 1, "z_channels": 32}
    config = VQConfig(**small) if device == "cpu" else VQConfig()  # type: ignore[arg-type]
    torch.manual_seed(0)
    tokenizer = VQTokenizer(config).eval().requires_grad_(False)
    images = text_image.pictures(3, 64, 64)

    def tokens() -> Tensor:
        with torch.inference_mode():
            where = next(tokenizer.parameters()).device
            return encode_images(tokenizer, images, where)

    expected = tokens()
    tokenizer.to(device)
    found = tokens()
    assert found.device.type == "cpu"
    assert len(found.unique()) > 10
    assert (found == expected).float().mean() > 0.999


@pytest.mark.parametrize("device", DEVICES)
def test_a_server_repeats_itself_bit_for_bit(device: str) -> None:
    """The same request alone: what `--reproducible` builds upon."""
    server = RewardServer(RewardServerConfig(judge=None, device=device))
    images = text_image.pictures(6, 8, 8)
    asked = request(rollouts=6, condition=Condition(text="a three", class_index=3))
    first, second = server.score(asked, images), server.score(asked, images)
    for name, values in first.scores.items():
        np.testing.assert_array_equal(values, second.scores[name])
    np.testing.assert_array_equal(first.features["features"], second.features["features"])
    server.close()

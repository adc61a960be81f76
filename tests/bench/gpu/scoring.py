"""Checks 8, 9 and 11: scorers and feature networks against the CPU, decoded images in three
precisions, and leave-one-out FID on the device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from actors.models.vq import VQDecoder
from cluster.messages import Condition
from cluster.model_files.torchvision_ops import ensure_torchvision
from cluster.program.precision import fp32_flags
from rewards.networks import open_clip_models
from rewards.networks.extractor import NetworkFeatures
from rewards.networks.inception import fid_inception, fid_pixels
from rewards.networks.open_clip_sources import Source
from rewards.networks.preprocessing import to_device
from rewards.scorers.clip import ClipConfig, ClipReward
from rewards.scorers.hpsv2 import HpsConfig, HpsReward
from tests.bench.gpu.decoding import vq_config
from tests.bench.gpu.scene import Scene
from tests.bench.measuring import fastest
from tests.parity import text_image
from tests.unit.leave_one_out_oracle import scene as features_of

HPS, HPS_TAG = "ViT-H-14", "laion2b_s32b_b79k"
CLIP, CLIP_TAG = "ViT-L-14-quickgelu", "openai"
CONTRAST = 0.5  # deviation of pixels in [-1, 1]
PROMPT = "a photograph of a lighthouse in the evening"


def scorers(scene: Scene) -> None:
    """HPSv2's ViT-H-14, CLIP's ViT-L-14 and FID's Inception with random weights: images/s, and the
    GPU's pixels, scores and features against the CPU's."""
    count, few = scene.size(144, 2), scene.size(4, 2)
    side = scene.grid * 16 if not scene.tiny else 48
    pictures = text_image.pictures(count, side, side)
    inception(scene, pictures, few)
    asked = [Condition(text=PROMPT)] * count
    with random_weights(scene):
        on_cpu = hps("cpu", "fp32", scene)
        exact = on_cpu(pictures[:few], asked[:few])
        for precision in ("fp32", "bf16"):
            scorer = hps(scene.device, precision, scene)
            if precision == "fp32":
                pixels = scorer.preprocess(pictures).cpu() - on_cpu.preprocess(pictures)
                scene.figure("hps_pixels_apart", pixels.abs().max().item())
            found = scorer(pictures, asked)
            scene.figure(f"hps_{precision}_apart", np.abs(found[:few] - exact).mean())
            seconds = fastest([lambda s=scorer: s(pictures, asked)], scene.device, 2)[0]
            scene.figure(f"hps_{precision}_images_per_s", count / seconds)
        scene.figure("hps_scores_vary", found.std())
        clip(scene, pictures, asked)


def hps(device: str, precision: Any, scene: Scene) -> HpsReward:
    name = text_image.TINY if scene.tiny else HPS
    return HpsReward(HpsConfig(model=name, pretrained=HPS_TAG, precision=precision), device)


def clip(scene: Scene, pictures: np.ndarray, asked: list[Condition]) -> None:
    """CLIP's pixels are those of Pillow on the host, bit for bit."""
    name = text_image.TINY if scene.tiny else CLIP
    scorer = ClipReward(ClipConfig(model=name, pretrained=CLIP_TAG, precision="bf16"), scene.device)
    host = ClipReward(
        ClipConfig(model=name, pretrained=CLIP_TAG, preprocessing="host"), scene.device
    )
    few = pictures[:8]
    same = torch.equal(scorer.preprocess(few).cpu(), host.preprocess(few).cpu())
    scene.figure("clip_pixels_same", float(same))
    seconds = fastest([lambda: scorer(pictures, asked)], scene.device, 2)[0]
    scene.figure("clip_bf16_images_per_s", len(pictures) / seconds)


def inception(scene: Scene, pictures: np.ndarray, few: int) -> None:
    torch.manual_seed(0)
    network = randomised(fid_inception())

    def extractor(device: str) -> NetworkFeatures:
        return NetworkFeatures(
            inner := copy.deepcopy(network),
            lambda pixels: inner(pixels)[0],
            lambda images: fid_pixels(to_device(images, device).permute(0, 3, 1, 2)),
            "random",
            device=device,
        )

    there = extractor(scene.device)
    pixels = fid_pixels(to_device(pictures[:few], scene.device).permute(0, 3, 1, 2)).cpu()
    here = fid_pixels(torch.from_numpy(pictures[:few]).permute(0, 3, 1, 2))
    scene.figure("inception_pixels_apart", (pixels - here).abs().max().item())
    exact = extractor("cpu")(pictures[:few])
    apart = np.abs(there(pictures[:few]) - exact).max() / exact.std()
    scene.figure("inception_apart", apart)
    if scene.tiny:
        return
    seconds = fastest([lambda: there(pictures)], scene.device, 2)[0]
    scene.figure("inception_images_per_s", len(pictures) / seconds)


def randomised(network: nn.Module) -> nn.Module:
    """He-scaled weights, which keep activations alive through all layers."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=(2 / module.weight[0].numel()) ** 0.5)
    return network


@contextmanager
def random_weights(scene: Scene) -> Iterator[None]:
    """Have open_clip's models made with random weights in the place of published ones: the same
    for all precisions and devices."""
    ensure_torchvision()
    import open_clip

    torch.manual_seed(0)
    made: dict[str, dict[str, torch.Tensor]] = {}

    if scene.tiny:
        text_image.register_tiny(scene.folder())

    def create(source: Any, precision: str, device: str) -> nn.Module:
        with torch.device(scene.device):  # drawing a thousand million numbers on a CPU takes long
            model = open_clip.create_model(
                source.name, precision=precision, device=scene.device, load_weights=False
            )
        if source.name not in made:
            state = text_image.spread(model).state_dict()
            made[source.name] = {name: tensor.clone() for name, tensor in state.items()}
        model.load_state_dict(made[source.name])
        return model.to(device)

    def found(model: str, pretrained: str, tag: str) -> Source:
        return Source(name=model)

    with (
        mock.patch.object(open_clip_models, "_create", create),
        mock.patch.object(open_clip_models, "find_source", found),
    ):
        yield


def loo_fid(scene: Scene) -> None:
    """Rewards of 128 images in 2,048 dimensions, computed there and on the CPU."""
    from rewards.distribution.leave_one_out import leave_one_out_fid

    dim, count = scene.size(2048, 16), scene.size(128, 4)
    s = features_of(dim, count, 2 * dim, 2 * dim, 1e5)
    moments, reference = s.moments, s.reference
    _ = reference.factor

    def rewards(device: str) -> np.ndarray:
        return leave_one_out_fid(s.x, moments, reference, 0.9875, device=device)[0]

    here, there = rewards("cpu"), rewards(scene.device)
    scene.figure("loo_fid_apart", np.abs(there - here).max() / here.std())
    scene.figure("loo_fid_cpu_s", fastest([lambda: rewards("cpu")], "cpu", 1)[0])
    scene.figure("loo_fid_device_s", fastest([lambda: rewards(scene.device)], scene.device, 1)[0])


@torch.inference_mode()
def images(scene: Scene) -> None:
    """144 images of VQ-16: seconds, and how many of 255 levels apart."""
    config = vq_config(scene)
    torch.manual_seed(0)
    decoder = VQDecoder(config).to(scene.device).eval().requires_grad_(False)
    shape = scene.size(144, 2), scene.grid, scene.grid
    codes = torch.randint(config.codebook_size, shape, device=scene.device)
    last = decoder.decoder.conv_out  # random weights give grey images
    last.weight *= CONTRAST / decoder(codes[:2]).float().std()

    exact = decoder.pixels(codes)
    scene.figure("images_fp32_s", fastest([lambda: decoder.pixels(codes)], scene.device, 2)[0])
    with tf32():
        mean, largest = levels(decoder.pixels(codes), exact)
        scene.figure("images_tf32_s", fastest([lambda: decoder.pixels(codes)], scene.device, 2)[0])
    scene.figure("images_tf32_levels", largest)
    decoder.decode_in(torch.bfloat16)
    mean, largest = levels(decoder.pixels(codes), exact)
    scene.figure("images_bf16_s", fastest([lambda: decoder.pixels(codes)], scene.device, 2)[0])
    scene.figure("images_bf16_mean_levels", mean)
    scene.figure("images_bf16_levels", largest)


def levels(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """Mean and largest difference of uint8 images."""
    apart = (found.int() - exact.int()).abs()
    return apart.double().mean().item(), float(apart.max())


@contextmanager
def tf32() -> Iterator[None]:
    """TF32 in convolutions and products."""
    places = fp32_flags().values()
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "tf32"
    try:
        yield
    finally:
        for place, value in zip(places, before):
            place.fp32_precision = value

"""Feature extractors, the spaces in which image distributions are compared."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from torch import Tensor, nn

from cluster.errors import ConfigError, DataError
from cluster.program.precision import start_computing
from rewards.base import FeatureExtractor, ImageErrors, Images
from rewards.metrics.samples import LOGITS, SPATIAL
from rewards.networks.convnet import convnet_fingerprint, load_convnet
from rewards.networks.extractor import NetworkFeatures, each_size
from rewards.networks.inception import (
    CLASSES,
    SPATIAL_DIM,
    EvaluationSpaces,
    fid_pixels,
    load_fid_inception,
    load_torchvision_inception,
    torchvision_pixels,
)
from rewards.networks.open_clip_models import Precision
from rewards.networks.preprocessing import Preprocess, preprocess, to_device
from rewards.networks.vision_towers import ClipTower, load_dinov2
from rewards.networks.weight_files import is_user_file, weights_digest

MAX_PIXELS = 1024
MINIATURE = "package://learner.miniature/networks/features.safetensors"
CHOICE_OF_MODEL = ("dinov2", "clip")


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """The feature network of the distribution reward (or of a judge)."""

    network: Literal[
        "convnet", "pixels", "inception", "torchvision-inception", "dinov2", "clip"
    ] = "convnet"
    """Network that extracts the features. convnet: a small convolutional network. pixels: not
    learned, for small images. inception: the FID literature's, 2048 dimensions.
    torchvision-inception: that of the public code of 2603.23086. dinov2, clip: for evaluation in
    another space."""
    checkpoint: str = ""
    """Weights of the network, by default the published ones. Empty or "published": fetched once
    (convnet: the shipped miniature's). Else a file; for clip also a pretrained tag of open_clip."""
    model: str = ""
    """Model of the network, for dinov2 and clip. dinov2: a timm name; empty is
    vit_large_patch14_dinov2.lvd142m. clip: an open_clip name or a directory in its layout; empty is
    ViT-B-32-quickgelu with OpenAI's weights."""
    tag: str = ""
    """open_clip's pretrained tag of a checkpoint file's weights, for clip. It sets preprocessing
    and activation. Empty: as in the configuration beside the file, or as in the model's tags if all
    agree."""
    precision: Precision = "fp32"
    """Precision of the network; bf16, for dinov2 and clip, is faster on GPUs and gives another
    space than fp32."""
    batch: int = 32
    """Images in a forward pass (except convnet, which takes all)."""

    def __post_init__(self) -> None:
        chosen = f"features of network {self.network!r}"
        # Older configurations name this file for pixels, too.
        if self.network == "pixels" and self.checkpoint not in ("", MINIATURE):
            raise ConfigError(
                f"checkpoint: {chosen} have no weights, found {self.checkpoint!r}: leave it empty, "
                "or choose a network"
            )
        if self.model and self.network not in CHOICE_OF_MODEL:
            raise ConfigError(
                f"model: {chosen} are of one model, found {self.model!r}: it is for "
                f"{' and '.join(CHOICE_OF_MODEL)}"
            )
        if self.tag and self.network != "clip":
            raise ConfigError(
                f"tag: {chosen} have no tags of open_clip, found {self.tag!r}: it is for clip"
            )
        if self.precision != "fp32" and self.network not in CHOICE_OF_MODEL:
            raise ConfigError(
                f"precision: {chosen} are computed in fp32, found {self.precision!r}: FID in them "
                "would not be the literature's"
            )
        if self.batch < 1:
            raise ConfigError(f"batch must be >= 1, found {self.batch}")

    def options(self) -> str:
        """The options of `rewards.reference` that choose this network, for commands in messages."""
        default = FeaturesConfig()
        changed = {
            name: value
            for name, value in asdict(self).items()
            if name != "batch" and value != getattr(default, name)
        }
        named = {"network": self.network} | changed
        return " ".join(f"--features.{name} {shlex.quote(value)}" for name, value in named.items())


class ConvNetFeatures:
    """Features of a `ConvNet`."""

    def __init__(self, checkpoint: str, device: str) -> None:
        self._network = load_convnet(checkpoint, device)
        self.fingerprint = convnet_fingerprint(checkpoint)
        self.dim = self._network.config.dim

    def __call__(self, images: Images) -> np.ndarray:
        """(N, S, S, 3) uint8 -> (N, D) float32."""
        return each_size(images, lambda same: self._network.run(same)[0])


class PixelFeatures:
    """Brightness of every pixel, in [0, 1]: a space without training."""

    fingerprint = "pixels"
    one_size = True
    """All images must have one size."""

    def __call__(self, images: Images) -> np.ndarray:
        """(N, H, W, 3) uint8 -> (N, H * W) float32.

        Raises:
            DataError: too many pixels for a covariance.
            ImageErrors: images of different sizes.
        """
        sizes = [image.shape[:2] for image in images]
        odd = {index: size for index, size in enumerate(sizes) if size != sizes[0]}
        if odd:
            height, width = sizes[0]
            raise ImageErrors(
                {
                    index: f"is {size[0]} x {size[1]}, but image 0 is {height} x {width}: pixel "
                    "features compare images of one size"
                    for index, size in odd.items()
                }
            )
        return each_size(images, self._brightness)

    @staticmethod
    def _brightness(images: np.ndarray) -> np.ndarray:
        count, height, width, _ = images.shape
        if height * width > MAX_PIXELS:
            raise DataError(
                f"pixel features are for images of at most {MAX_PIXELS} pixels, found "
                f"{height} x {width}: choose a network"
            )
        return images.mean(-1, dtype=np.float32).reshape(count, -1) / 255


def convnet_file(config: FeaturesConfig) -> str:
    """The weights of the network `convnet`: the user's, else the miniature's."""
    return config.checkpoint if is_user_file(config.checkpoint) else MINIATURE


def load_features(
    config: FeaturesConfig, device: str = "cpu", *, judge: bool = False
) -> FeatureExtractor:
    """The extractor that a configuration names.

    Args:
        judge: with all spaces that evaluations take of the network.

    Raises:
        CheckpointError: missing weights, not reachable, or of another network.
        ConfigError: unknown model.
    """
    start_computing()
    if config.network == "pixels":
        return PixelFeatures()
    if config.network == "convnet":
        return ConvNetFeatures(convnet_file(config), device)
    return _load_network(config, device, judge)


def _load_network(config: FeaturesConfig, device: str, judge: bool) -> NetworkFeatures:
    """Fingerprints name the preprocessing; change both together."""
    network: nn.Module
    embed: Callable[[Tensor], Tensor]
    further: dict[str, int] = {}
    if config.network == "inception":
        network = inception = load_fid_inception(config.checkpoint)
        digest, prepared = weights_digest(network), "tensorflow299"
        embed, prepare = lambda pixels: inception(pixels)[0], _on(device, fid_pixels)
        if judge:
            network = embed = EvaluationSpaces(inception)
            further = {SPATIAL: SPATIAL_DIM, LOGITS: CLASSES}
    elif config.network == "torchvision-inception":
        network = embed = load_torchvision_inception(config.checkpoint)
        digest, prepared = weights_digest(network), "antialias299-imagenet"
        prepare = _on(device, torchvision_pixels)
    elif config.network == "dinov2":
        network, settings, digest = load_dinov2(config.model, config.checkpoint)
        embed, prepared, prepare = network, settings.fingerprint, _as_trained(device, settings)
    else:
        tower = ClipTower(config.model, config.checkpoint, device, config.tag)
        digest, prepared = weights_digest(tower.visual), tower.fingerprint
        network, embed, prepare = tower.network, tower, _as_trained(device, tower.settings)
    return NetworkFeatures(
        network,
        embed,
        prepare,
        f"{config.network}-{digest}-{prepared}",
        device=device,
        batch=config.batch,
        precision=config.precision,
        further=further,
    )


def _on(device: str, prepare: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], Tensor]:
    """Applies a preprocessing of (n, 3, H, W) uint8 tensors to arrays."""
    return lambda images: prepare(to_device(images, device).permute(0, 3, 1, 2))


def _as_trained(device: str, settings: Preprocess) -> Callable[[np.ndarray], Tensor]:
    """Applies a vision transformer's evaluation transform to arrays."""
    return lambda images: preprocess(to_device(images, device), settings)

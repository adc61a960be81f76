"""A small convolutional classifier: the miniature's feature network and its judge's."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.errors import CheckpointError, DataError
from cluster.io.checksum import sha256_of
from cluster.model_files.architectures import from_fields
from cluster.model_files.tensors import load_strict, locate, read_config, read_shapes, read_tensors
from cluster.preflight import Findings

FAMILY = "convnet"


@dataclass(frozen=True, kw_only=True)
class ConvNetConfig:
    """Architecture: 3x3 convolutions, with a 2x pool before each but the first."""

    image_size: int
    channels: tuple[int, ...]
    num_classes: int
    features: int = 0
    """Width of a linear layer over all positions, whose outputs are the features. 0: the features
    are the last activations averaged over positions, as in Inception."""

    @property
    def dim(self) -> int:
        return self.features or self.channels[-1]

    def to_dict(self) -> dict:
        return {"family": FAMILY, **dataclasses.asdict(self)}


class ConvNet(nn.Module):
    """(N, 3, S, S) in [-1, 1] -> features (N, D) and class logits (N, C)."""

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__()
        self.config = config
        inputs = (3, *config.channels[:-1])
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in zip(inputs, config.channels)
        )
        if config.features:
            side = config.image_size // 2 ** (len(config.channels) - 1)
            self.project = nn.Linear(config.channels[-1] * side * side, config.features)
        self.head = nn.Linear(config.dim, config.num_classes)
        # Scales features to unit deviation (mean over dimensions) on the training images.
        self.register_buffer("scale", torch.ones(()))
        self.scale: Tensor

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = images
        for index, conv in enumerate(self.convs):
            x = F.gelu(conv(F.max_pool2d(x, 2) if index else x))
        if self.config.features:
            features = self.project(x.flatten(1))
            return features * self.scale, self.head(F.gelu(features))
        features = x.mean((2, 3))
        return features * self.scale, self.head(features)

    @torch.inference_mode()
    def run(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N, S, S, 3) uint8 -> features (N, D) and logits (N, C), float32.

        Raises:
            DataError: images of another size (a resized digit is another image).
        """
        size = self.config.image_size
        if images.shape[1:] != (size, size, 3):
            raise DataError(
                f"this network takes ({size}, {size}, 3) images, found {images.shape[1:]}"
            )
        pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        device = self.scale.device
        features, logits = self(pixels.to(device).float() / 127.5 - 1)
        return features.cpu().numpy(), logits.cpu().numpy()


def convnet_config(checkpoint: str) -> ConvNetConfig:
    """The architecture in a file's header.

    Raises:
        CheckpointError: missing, damaged, or of another network.
    """
    header = read_config(checkpoint)
    if (family := header.pop("family", None)) != FAMILY:
        raise CheckpointError(
            f"{checkpoint}: expected a {FAMILY}, found a {family!r}: name another file"
        )
    return from_fields(ConvNetConfig, header, checkpoint)


def check_convnet(
    field: str, path: str, side: int, findings: Findings, judge: bool
) -> ConvNetConfig | None:
    """Check a file before a run; its architecture, or None if it cannot be read.

    Args:
        side: pixels a side of the policy's images; 0 if unknown.
        judge: the network is the evaluation's.
    """
    config = None
    with findings.of(field):
        config = convnet_config(path)
        read_shapes(path)
        if side and (takes := config.image_size) != side:
            wrong_size(field, f"{takes} x {takes} pixels, as {path} takes", side, findings, judge)
    return config


def wrong_size(field: str, takes: str, side: int, findings: Findings, judge: bool) -> None:
    """A problem: the network does not take images of `side` pixels."""
    remedy = (
        "the shipped judge knows 8 x 8 digits alone: set evaluation.num_images to 0, or name "
        "networks for these images (judge.*)"
        if judge
        else f"choose a network for these images ({field.removesuffix('.checkpoint')}.network)"
    )
    findings.problem(field, f"images of {takes}", f"{side} x {side} from the policy", remedy)


def convnet_fingerprint(checkpoint: str) -> str:
    """Identifies the network by its file."""
    return f"convnet-{sha256_of(locate(checkpoint))[:16]}"


def load_convnet(checkpoint: str, device: str) -> ConvNet:
    """Load strictly from a safetensors file with the architecture in its header."""
    network = ConvNet(convnet_config(checkpoint))
    load_strict(network, read_tensors(checkpoint), checkpoint)
    return network.to(device).eval().requires_grad_(False)

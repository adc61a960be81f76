"""The Inception networks of the FID literature: the one of 2015, and torchvision's.

FID (Heusel et al. 2017, 1706.08500) is defined by a TensorFlow graph of 5 December 2015, whose
weights exist as a PyTorch file. `fid_inception` computes that graph, `fid_pixels` its image
preprocessing. It differs from torchvision's Inception v3 (Szegedy et al. 2015, 1512.00567) in three
ways: averages over 3 x 3 exclude the padding, the last block takes a maximum instead, and there are
1008 classes.

Shapes: N images, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.model_files.checkpoints import read_checkpoint
from cluster.model_files.torchvision_ops import ensure_torchvision
from rewards.networks.preprocessing import in_unit_range, normalise
from rewards.networks.weight_files import load_network, weights_file

SIZE = 299
FEATURES = 2048
CLASSES = 1008
SPATIAL_CHANNELS = 7
SPATIAL_DIM = 17 * 17 * SPATIAL_CHANNELS
FID_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class FeaturesAndLogits(nn.Linear):
    """A classifier that also returns its input: (N, 2048) -> features (N, 2048), logits (N, C)."""

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return features, super().forward(features)


class GlobalMean(nn.Module):
    """(N, C, H, W) -> (N, C), as FID's graph averages."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def average(x: Tensor) -> Tensor:
    """Mean over 3 x 3, of the pixels inside the image."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def maximum(x: Tensor) -> Tensor:
    """Maximum over 3 x 3."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


def fid_inception() -> nn.Module:
    """FID's network with random weights: (N, 3, 299, 299) from `fid_pixels` -> pool3 features
    (N, 2048) and logits (N, 1008). Its weights are named as in the published file."""
    ensure_torchvision()
    from torchvision.models import inception_v3

    network = inception_v3(weights=None, num_classes=CLASSES, aux_logits=False, init_weights=False)
    for name, block in network.named_children():
        if hasattr(block, "branch_pool"):
            _replace_pool(block, maximum if name == "Mixed_7c" else average)
    network.avgpool = GlobalMean()
    network.fc = FeaturesAndLogits(FEATURES, CLASSES)
    return network


class EvaluationSpaces(nn.Module):
    """FID's network with all that evaluations take of it, from one pass: (N, 3, 299, 299) from
    `fid_pixels` -> (N, 2048 + 2023 + 1008), these parts side by side:

    - the pool3 features;
    - the first 7 channels of the graph's `mixed_6/conv`, (17, 17, 7) flattened, channels last, as
      in the sFID of ADM's evaluator (Nash et al. 2021, 2103.03841): the 1 x 1 branch of the third
      of four blocks of 17 x 17, after batch norm and ReLU. In this port it is `Mixed_6d.branch1x1`
      (torch-fidelity's table of weights names it so);
    - the logits without biases, of which ADM and torch-fidelity compute the Inception Score.

    Args:
        network: of `fid_inception`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._spatial = torch.empty(0)
        network.get_submodule("Mixed_6d.branch1x1").register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS]

    def forward(self, pixels: Tensor) -> Tensor:
        features, _ = self.network(pixels)
        spatial = self._spatial.permute(0, 2, 3, 1).flatten(1)
        weight = self.network.get_parameter("fc.weight")
        return torch.cat([features, spatial, features @ weight.T], dim=1)


def _replace_pool(block: Any, pool: Callable[[Tensor], Tensor]) -> None:
    """Pool before the last branch of an Inception block with `pool`."""
    branches = block._forward
    block._forward = lambda x: [*branches(x)[:-1], block.branch_pool(pool(x))]


def fid_pixels(images: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 -> (N, 3, 299, 299) fp32 in [-1, 1), as FID's graph prepares images."""
    return (resize_tensorflow(images, SIZE) - 128) / 128


def load_fid_inception(checkpoint: str = "") -> nn.Module:
    """`fid_inception` with the published weights, on the CPU.

    Args:
        checkpoint: `weights-inception-2015-12-05-6726825d.pth` or pytorch-fid's identical
            `pt_inception-2015-12-05-6726825d.pth`; empty or "published" fetches it from
            torch-fidelity's releases.

    Raises:
        CheckpointError: no such file, not reachable, or the file of another network.
    """
    network = fid_inception()
    source = weights_file(checkpoint, FID_URL)
    load_network(network, read_checkpoint(source), source)
    return network


def torchvision_pixels(images: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 -> (N, 3, 299, 299) fp32, as the public code of 2603.23086 prepares them:
    [0, 1], bilinear with antialias and without rounding, then ImageNet's mean and deviation."""
    pixels = in_unit_range(images)
    if tuple(pixels.shape[-2:]) != (SIZE, SIZE):
        pixels = F.interpolate(
            pixels, size=(SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True
        )
    return normalise(pixels, IMAGENET_MEAN, IMAGENET_STD)


def load_torchvision_inception(checkpoint: str = "") -> nn.Module:
    """torchvision's Inception v3 without its classifier: `torchvision_pixels` -> (N, 2048).

    Built as `inception_v3(weights=IMAGENET1K_V1)`, so with `transform_input`: the network turns
    ImageNet's normalisation into the [-1, 1] that its weights were trained with.

    Args:
        checkpoint: `inception_v3_google-0cc3c7bd.pth`; empty or "published" fetches it from
            PyTorch's model zoo.

    Raises:
        CheckpointError: no such file, not reachable, or the file of another network.
    """
    ensure_torchvision()
    from torchvision.models import Inception_V3_Weights, inception_v3

    network = inception_v3(weights=None, transform_input=True, init_weights=False)
    source = weights_file(checkpoint, Inception_V3_Weights.IMAGENET1K_V1.url)
    load_network(network, read_checkpoint(source), source)
    network.fc = nn.Identity()
    network.AuxLogits = None  # for training alone
    return network


def resize_tensorflow(images: Tensor, size: int) -> Tensor:
    """TensorFlow 1.x's bilinear resize, without half-pixel centres and antialiasing.

    Output pixel i is read at i * H / size: images shift by up to half a pixel, and shrinking skips
    most pixels; FID depends on it. Source: `tf.image.resize_bilinear(align_corners=False)`.

    Args:
        images: (N, 3, H, W) uint8.

    Returns:
        (N, 3, size, size) fp32, in 0..255, not rounded.
    """
    above, below, down = _taps(images.shape[-2], size, images.device)
    left, right, across = _taps(images.shape[-1], size, images.device)

    def rows(chosen: Tensor) -> Tensor:
        part = images[:, :, chosen]
        first = part[..., left].float()
        return first + (part[..., right].float() - first) * across

    top = rows(above)
    return top + (rows(below) - top) * down[:, None]


def _taps(length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Both neighbours (size,) int64 of each output pixel, and its distance from the first, fp32."""
    scale = torch.tensor(length / size, dtype=torch.float32, device=device)
    places = torch.arange(size, dtype=torch.float32, device=device) * scale
    first = places.long()
    return first, (first + 1).clamp_max(length - 1), places - first

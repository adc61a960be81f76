"""The Inception networks of the FID literature: the one of 2015, and torchvision's.

FID (Heusel et al. 2017, 1706.08500) is defined by a TensorFlow graph of 5 December 2015, whose
weights exist as a PyTorch file. `FidInception` computes what that graph computes, and
`fid_pixels` prepares images as it does. It differs from the Inception v3 (Szegedy et al. 2015,
1512.00567) that torchvision has in three ways: averages over 3 x 3 leave out the padding, the last
block takes the maximum where the others average, and there are 1008 classes.

Shapes: N images, 299 x 299 pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.model_files.checkpoints import read_checkpoint
from cluster.model_files.torchvision_ops import ensure_torchvision
from rewards.networks.preprocessing import normalise
from rewards.networks.resize import resize_tensorflow
from rewards.networks.weight_files import load_network, weights_file

SIZE = 299
FEATURES = 2048
CLASSES = 1008
FID_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def average(x: Tensor) -> Tensor:
    """Mean over 3 x 3, of the pixels inside the image only."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def maximum(x: Tensor) -> Tensor:
    """Maximum over 3 x 3."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


def shrink(x: Tensor) -> Tensor:
    """Maximum over 3 x 3, every second pixel."""
    return F.max_pool2d(x, 3, stride=2)


class Mixed35(nn.Module):
    """On 35 x 35: branches of 1 x 1, 5 x 5, twice 3 x 3, pool."""

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(inputs, 64, 1)
        self.branch5x5_1 = Conv(inputs, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(average(x))], 1)


class Shrink35(nn.Module):
    """35 x 35 to 17 x 17."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = Conv(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), three, shrink(x)], 1)


class Mixed17(nn.Module):
    """On 17 x 17: branches of 1 x 1, once and twice 7 x 7 in two factors, pool."""

    def __init__(self, inputs: int, middle: int) -> None:
        super().__init__()
        wide: dict = {"kernel": (1, 7), "padding": (0, 3)}
        tall: dict = {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = Conv(inputs, 192, 1)
        self.branch7x7_1 = Conv(inputs, middle, 1)
        self.branch7x7_2 = Conv(middle, middle, **wide)
        self.branch7x7_3 = Conv(middle, 192, **tall)
        self.branch7x7dbl_1 = Conv(inputs, middle, 1)
        self.branch7x7dbl_2 = Conv(middle, middle, **tall)
        self.branch7x7dbl_3 = Conv(middle, middle, **wide)
        self.branch7x7dbl_4 = Conv(middle, middle, **tall)
        self.branch7x7dbl_5 = Conv(middle, 192, **wide)
        self.branch_pool = Conv(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), seven, twice, self.branch_pool(average(x))], 1)


class Shrink17(nn.Module):
    """17 x 17 to 8 x 8."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = Conv(inputs, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(inputs, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([three, self.branch7x7x3_4(seven), shrink(x)], 1)


class Mixed8(nn.Module):
    """On 8 x 8: branches that end in 1 x 3 beside 3 x 1.

    Args:
        pool: `average`, but in the last block of the network `maximum`.
    """

    def __init__(self, inputs: int, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._pool = pool
        self.branch1x1 = Conv(inputs, 320, 1)
        self.branch3x3_1 = Conv(inputs, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = Conv(inputs, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Conv(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(twice),
            self.branch3x3dbl_3b(twice),
            self.branch_pool(self._pool(x)),
        ]
        return torch.cat(branches, 1)


class FidInception(nn.Module):
    """(N, 3, 299, 299) from `fid_pixels` -> pool3 features (N, 2048) and logits (N, 1008).

    The names of the weights are those of the published file.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b = Mixed35(192, 32)
        self.Mixed_5c = Mixed35(256, 64)
        self.Mixed_5d = Mixed35(288, 64)
        self.Mixed_6a = Shrink35(288)
        self.Mixed_6b = Mixed17(768, 128)
        self.Mixed_6c = Mixed17(768, 160)
        self.Mixed_6d = Mixed17(768, 160)
        self.Mixed_6e = Mixed17(768, 192)
        self.Mixed_7a = Shrink17(768)
        self.Mixed_7b = Mixed8(1280, average)
        self.Mixed_7c = Mixed8(2048, maximum)
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pixels)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(shrink(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(shrink(x))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))
        features = self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3))
        return features, self.fc(features)


def fid_pixels(images: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 -> (N, 3, 299, 299) fp32 about [-1, 1), as FID's graph prepares them."""
    return (resize_tensorflow(images, SIZE) - 128) / 128


def load_fid_inception(checkpoint: str = "") -> FidInception:
    """The network with the published weights, on the CPU.

    Args:
        checkpoint: the file, `weights-inception-2015-12-05-6726825d.pth` or pytorch-fid's
            `pt_inception-2015-12-05-6726825d.pth`, which are the same; empty or "published"
            fetches it from torch-fidelity's releases.

    Raises:
        CheckpointError: no such file, no network, or the file of something else.
    """
    network = FidInception()
    source = weights_file(checkpoint, FID_URL)
    load_network(network, read_checkpoint(source), source)
    return network


def torchvision_pixels(images: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 -> (N, 3, 299, 299) fp32, as the public code of 2603.23086 prepares them:
    [0, 1], bilinear with antialias and without rounding, then ImageNet's mean and deviation."""
    pixels = images.float() / 255
    if tuple(pixels.shape[-2:]) != (SIZE, SIZE):
        pixels = F.interpolate(
            pixels, size=(SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True
        )
    return normalise(pixels, IMAGENET_MEAN, IMAGENET_STD)


def load_torchvision_inception(checkpoint: str = "") -> nn.Module:
    """torchvision's Inception v3 without its classifier: `torchvision_pixels` -> (N, 2048).

    Built as `inception_v3(weights=IMAGENET1K_V1)` builds it, so with `transform_input`: the network
    itself turns ImageNet's normalisation into [-1, 1], which its weights were trained with.

    Args:
        checkpoint: the file `inception_v3_google-0cc3c7bd.pth`; empty or "published" fetches it
            from PyTorch's model zoo.

    Raises:
        CheckpointError: no such file, no network, or the file of something else.
    """
    ensure_torchvision()
    from torchvision.models import Inception_V3_Weights, inception_v3

    network = inception_v3(weights=None, transform_input=True, init_weights=False)
    source = weights_file(checkpoint, Inception_V3_Weights.IMAGENET1K_V1.url)
    load_network(network, read_checkpoint(source), source)
    network.fc = nn.Identity()
    network.AuxLogits = None  # for training alone
    return network

"""LlamaGen on MNIST-5k, digits of 28x28: networks that are built on demand, judge included."""

from __future__ import annotations

import functools
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.models.llamagen import LlamaGenConfig
from actors.models.vq import VQConfig
from learner.data.digits import CLASS_NAMES
from learner.data.mnist import IMAGE_SIZE, mnist
from learner.miniature.systems import text_image, trainers
from learner.miniature.systems.digits import by_class
from learner.miniature.systems.system import AUTOENCODER, POLICY, TOKENIZER, Network, System
from learner.miniature.systems.text_image import WEIGHTS, TextImageConfig
from learner.miniature.training import LLAMAGEN_LOSS, LabelledImages
from rewards.networks.convnet import ConvNetConfig

CLASSES = len(CLASS_NAMES)
VQ = VQConfig(
    channels=32,
    multipliers=(1, 1, 1),
    num_res_blocks=0,  # training and decoding take a third of the time, and digits blur no more
    z_channels=32,
    codebook_size=128,
    codebook_dim=8,
    attention_levels=(),
)
ARCHITECTURE = LlamaGenConfig(  # 2.2 M parameters
    dim=192,
    num_layers=5,
    num_heads=6,
    grid=IMAGE_SIZE // VQ.downsampling,
    vocab_size=VQ.codebook_size,
    num_classes=CLASSES,
)
FEATURES = ConvNetConfig(
    image_size=IMAGE_SIZE, channels=(16, 32, 64), features=64, num_classes=CLASSES
)
AUTOENCODER_SIZES = ConvNetConfig(
    image_size=IMAGE_SIZE, channels=(16, 32, 64), features=64, num_classes=IMAGE_SIZE**2
)
JUDGE = ConvNetConfig(image_size=IMAGE_SIZE, channels=(32, 64, 128), num_classes=CLASSES)
SMALL_CLIP = TextImageConfig(width=64, depth=2, heads=2, patch=4)
JUDGE_CLIP = TextImageConfig(width=48, depth=3, heads=3, patch=4)


def shifted(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Images (N, C, S, S) in [-1, 1], each moved by -1, 0 or 1 whole pixels along both axes; what
    comes in is black (-1). Rotation and scaling would interpolate: networks that learn from blurred
    strokes make blurred strokes (FID 28 of the tokenizer's reconstructions, instead of 4)."""
    count, size = len(pixels), pixels.shape[-1]
    padded = F.pad(pixels, (1, 1, 1, 1), value=-1)
    rows, columns = torch.randint(0, 3, (2, count, 1), generator=generator) + torch.arange(size)
    images = torch.arange(count)
    moved = padded[images[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()


@functools.cache
def mnist_by_class() -> LabelledImages:
    """The 4,000 training images with their classes.

    Raises:
        ConfigError: the package with the images is not installed.
    """
    return by_class(*mnist("train"), augment=shifted)


OF_MNIST = partial(Network, data=mnist_by_class)
MNIST = System(
    name="mnist",
    preset="mnist",
    on_demand=True,
    networks=(
        OF_MNIST(
            name="tokenizer",
            file=TOKENIZER,
            steps=1600,
            train=partial(trainers.tokenizer, config=VQ, objective=LLAMAGEN_LOSS),
        ),
        OF_MNIST(
            name="policy",
            file=POLICY,
            steps=800,
            train=partial(trainers.policy, architecture=ARCHITECTURE, tokenizer=TOKENIZER),
        ),
        OF_MNIST(
            name="features",
            file="features.safetensors",
            steps=500,
            train=partial(trainers.classifier, config=FEATURES),
        ),
        OF_MNIST(
            name="autoencoder",
            file=AUTOENCODER,
            steps=600,
            train=partial(trainers.autoencoder, config=AUTOENCODER_SIZES),
        ),
        OF_MNIST(
            name="clip",
            file=f"clip/{WEIGHTS}",
            steps=400,
            train=partial(text_image.clip, config=SMALL_CLIP),
        ),
        OF_MNIST(
            name="preference",
            file=f"preference/{WEIGHTS}",
            steps=300,
            train=partial(text_image.preference, config=SMALL_CLIP, tokenizer=TOKENIZER),
        ),
        OF_MNIST(
            name="judge",
            file="judge.safetensors",
            steps=700,
            train=partial(trainers.classifier, config=JUDGE),
            of_judge=True,
        ),
        OF_MNIST(
            name="judge_clip",
            file=f"judge_clip/{WEIGHTS}",
            steps=400,
            train=partial(text_image.clip, config=JUDGE_CLIP),
            of_judge=True,
        ),
    ),
    places={
        "policy": {"checkpoint": POLICY},
        "tokenizer": {"checkpoint": TOKENIZER},
        "rewards": {
            "clip": {"model": "clip"},
            "hps": {"model": "preference"},
            "features": {"checkpoint": "features.safetensors"},
            "further": {"autoencoder": {"features": {"checkpoint": AUTOENCODER}}},
        },
        "judge": {
            "clip": {"model": "judge_clip"},
            "features": {"checkpoint": "judge.safetensors"},
            "classifier": {"checkpoint": "judge.safetensors"},
        },
    },
)

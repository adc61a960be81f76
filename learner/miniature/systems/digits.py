"""What systems on the 8x8 digits share: data by class, LlamaGen's tokenizer, scorers, judge."""

from __future__ import annotations

import functools
from functools import partial

import numpy as np
import torch

from actors.models.vq import VQConfig
from cluster.messages import Condition
from learner.data.digits import CLASS_NAMES, IMAGE_SIZE, augment, captions, digits, to_pixels
from learner.miniature.systems import text_image, trainers
from learner.miniature.systems.system import AUTOENCODER, TOKENIZER, Network
from learner.miniature.systems.text_image import WEIGHTS, TextImageConfig
from learner.miniature.training import LLAMAGEN_LOSS, Augmentation, LabelledImages
from rewards.networks.convnet import ConvNetConfig

VQ = VQConfig(
    channels=32,
    multipliers=(1, 1),
    num_res_blocks=1,
    z_channels=32,
    codebook_size=64,
    codebook_dim=8,
)
CLASSES = len(CLASS_NAMES)
SMALL_CONVNET = ConvNetConfig(
    image_size=IMAGE_SIZE, channels=(24, 48), features=64, num_classes=CLASSES
)
SMALL_AUTOENCODER = ConvNetConfig(
    image_size=IMAGE_SIZE, channels=(24, 48), features=64, num_classes=IMAGE_SIZE**2
)
JUDGE_CONVNET = ConvNetConfig(image_size=IMAGE_SIZE, channels=(32, 64, 128), num_classes=CLASSES)
SMALL_CLIP = TextImageConfig(width=64, depth=2, heads=2)
JUDGE_CLIP = TextImageConfig(width=48, depth=3, heads=3)


def by_class(
    images: np.ndarray, labels: np.ndarray, augment: Augmentation = augment
) -> LabelledImages:
    """Digits (N, S, S, 3) uint8 of any size with their classes (N,), as conditions."""
    conditions = [Condition(text=text, class_index=index) for index, text in enumerate(captions())]
    return LabelledImages(to_pixels(images), torch.from_numpy(labels), conditions, augment)


@functools.cache
def digits_by_class() -> LabelledImages:
    """The 1,000 training digits with their classes."""
    return by_class(*digits("train"))


OF_DIGITS = partial(Network, data=digits_by_class)
TOKENIZER_NETWORK = OF_DIGITS(
    name="tokenizer",
    file=TOKENIZER,
    steps=1800,
    train=partial(trainers.tokenizer, config=VQ, objective=LLAMAGEN_LOSS),
)
FEATURES = (
    OF_DIGITS(
        name="features",
        file="features.safetensors",
        steps=500,
        train=partial(trainers.classifier, config=SMALL_CONVNET),
    ),
    OF_DIGITS(
        name="autoencoder",
        file=AUTOENCODER,
        steps=800,
        train=partial(trainers.autoencoder, config=SMALL_AUTOENCODER),
    ),
)
SCORERS = (
    *FEATURES,
    OF_DIGITS(
        name="clip",
        file=f"clip/{WEIGHTS}",
        steps=400,
        train=partial(text_image.clip, config=SMALL_CLIP),
    ),
    OF_DIGITS(  # random tokens of this tokenizer are in the worse images
        name="preference",
        file=f"preference/{WEIGHTS}",
        steps=400,
        train=partial(text_image.preference, config=SMALL_CLIP, tokenizer=TOKENIZER),
    ),
)
JUDGES = (
    OF_DIGITS(
        name="judge",
        file="judge.safetensors",
        steps=1000,
        train=partial(trainers.classifier, config=JUDGE_CONVNET),
        of_judge=True,
    ),
    OF_DIGITS(
        name="judge_clip",
        file=f"judge_clip/{WEIGHTS}",
        steps=400,
        train=partial(text_image.clip, config=JUDGE_CLIP),
        of_judge=True,
    ),
)
REWARDS = {
    "clip": {"model": "clip"},
    "hps": {"model": "preference"},
    "features": {"checkpoint": "features.safetensors"},
    "further": {"autoencoder": {"features": {"checkpoint": AUTOENCODER}}},
}
"""Places of the scorers. The judge of every run is the shipped one, so that runs compare."""

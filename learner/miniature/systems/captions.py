"""LlamaGen conditional on captions, on the 8x8 digits: captions are measured from the images.

Tokenizer, feature network and judge of images are those of the digits; text encoder, policy, CLIP
and the judge's CLIP are of captions.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from actors.models.llamagen import LlamaGenConfig
from actors.text.captions import caption_conditions
from actors.text.features import features_of
from cluster.messages import Condition
from learner.data.digit_captions import (
    all_attributes,
    attributes_of,
    captions_of,
    numbers_of,
    training_cuts,
)
from learner.miniature.systems import digits, text_image, trainers
from learner.miniature.systems.system import TOKENIZER, Job, Network, System
from learner.miniature.systems.text_encoder import SIZES, text_encoder
from learner.miniature.systems.text_image import WEIGHTS, TextImageConfig
from learner.miniature.training import LabelledImages

POLICY, FEATURES = "captions/policy.safetensors", "captions/captions.parquet"
LONGEST = 8  # tokens of a caption: six words and the end, and one to spare
SMALL_CLIP = TextImageConfig(width=64, depth=2, heads=2, context=LONGEST)
JUDGE_CLIP = TextImageConfig(width=48, depth=3, heads=3, context=LONGEST)
ARCHITECTURE = LlamaGenConfig(
    dim=96,
    num_layers=4,
    num_heads=4,
    grid=4,
    vocab_size=digits.VQ.codebook_size,
    num_classes=0,
    caption_dim=SIZES["d_model"],
    caption_tokens=LONGEST,
)


@dataclass(frozen=True)
class MeasuredImages(LabelledImages):
    """Digits whose captions are measured from the augmented images: a rotation changes the
    slant."""

    digits: Tensor = torch.empty(0)
    """(N,) int64"""

    def relabel(self, index: Tensor, pixels: Tensor) -> Tensor:
        ink = ((pixels.mean(1) + 1) / 2).clamp(0, 1).numpy()
        found = training_cuts().attributes(ink, self.digits[index].numpy())
        return torch.from_numpy(numbers_of(found))


@functools.cache
def digits_by_caption() -> MeasuredImages:
    """The 1,000 training digits with their captions, without features."""
    images = digits.digits_by_class()
    return MeasuredImages(
        pixels=images.pixels,
        labels=torch.from_numpy(numbers_of(attributes_of("train"))),
        conditions=[Condition(text=text) for text in captions_of(all_attributes())],
        augment=images.augment,
        digits=images.labels,
    )


def encoder_of_captions(job: Job) -> None:
    """The text encoder, and the features of the training images' captions, equal ones together."""
    attributes = torch.from_numpy(all_attributes())
    text_encoder(job, attributes, sorted(captions_of(attributes_of("train"))))


def policy_of_captions(job: Job) -> None:
    """The policy, on features of the text encoder that was built before."""
    known = {each.text: each for each in caption_conditions(job.folder / FEATURES)}
    data = job.network.data()
    encoded = [replace(each, features=features_of(known[each.text])) for each in data.conditions]
    network = replace(job.network, data=lambda: replace(data, conditions=encoded))
    trainers.policy(replace(job, network=network), ARCHITECTURE, TOKENIZER)


OF_CAPTIONS = partial(Network, data=digits_by_caption)
CAPTIONS = System(
    name="captions",
    preset="miniature-captions",
    networks=(
        digits.TOKENIZER_NETWORK,
        OF_CAPTIONS(name="captions/t5", file=FEATURES, steps=300, train=encoder_of_captions),
        OF_CAPTIONS(name="captions/policy", file=POLICY, steps=600, train=policy_of_captions),
        *digits.FEATURES,
        OF_CAPTIONS(
            name="captions/clip",
            file=f"captions/clip/{WEIGHTS}",
            steps=800,
            train=partial(text_image.caption_clip, config=SMALL_CLIP, attributes=all_attributes),
        ),
        digits.JUDGES[0],
        OF_CAPTIONS(
            name="captions/judge_clip",
            file=f"captions/judge_clip/{WEIGHTS}",
            steps=1000,
            train=partial(text_image.caption_clip, config=JUDGE_CLIP, attributes=all_attributes),
            of_judge=True,
        ),
    ),
    places={
        "policy": {"checkpoint": POLICY},
        "tokenizer": {"checkpoint": TOKENIZER},
        "conditions": {"captions": FEATURES},
        "rewards": {
            "clip": {"model": "captions/clip"},
            "features": digits.REWARDS["features"],
            "further": digits.REWARDS["further"],
        },
    },
)

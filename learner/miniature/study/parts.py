"""The parts of the study, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from learner.config import merge
from learner.miniature.study import names
from learner.miniature.study.ablations import ABLATIONS
from learner.miniature.study.method import (
    BY_GROUP,
    ENTROPY,
    INSTANCE_OFF,
    JOINT,
    LARGER_WEIGHTS,
    LOO_FID_OFF,
    LR,
    METHOD,
    MORE_REAL,
    TWO_SPACES,
    supervised,
    with_real,
)
from learner.miniature.study.names import (
    BASE,
    BOTH,
    INSTANCE_ONLY,
    JOINT_ONLY,
    LOO_FID_ONLY,
    WITH_ENTROPY,
    WITH_JOINT,
)
from learner.miniature.study.part import Arm, Changes, Part, guided
from learner.miniature.study.recall import RECALL

TEST_SEEDS = tuple(range(201, 211))
"""Settings are searched on others (from 301 on); the page says where these were looked at."""
ONE_AT_A_TIME = (
    Arm(name=INSTANCE_ONLY, changes={"rewards": LOO_FID_OFF}),
    Arm(name=LOO_FID_ONLY, changes={"rewards": INSTANCE_OFF}),
    Arm(name=JOINT_ONLY, changes={"rewards": merge(INSTANCE_OFF, JOINT)}),
    Arm(name=BOTH),
    Arm(name=WITH_ENTROPY, changes={"entropy": ENTROPY}),
)
FURTHER_ARMS = (
    Arm(name=WITH_JOINT, changes={"rewards": JOINT}),
    Arm(name="default", shipped=True),
)


def two_spaces(**rewards: Changes) -> Arm:
    """Joint LOO-FID in two spaces.

    Args:
        rewards: what the system's method has otherwise than the miniature's.
    """
    return Arm(name=names.TWO_SPACES, changes={"rewards": merge(TWO_SPACES, rewards)})


def of_real_images(
    with_rewards: Mapping[str, Any],
    *,
    name: str = names.WITH_REAL,
    alone: Mapping[str, Changes],
) -> tuple[Arm, ...]:
    """Cross-entropy on real images beside the rewards, and alone.

    Args:
        with_rewards: see `with_real`; the learning rate is that of both.
        alone: how the policy of real images alone is sampled, too.
    """
    control = supervised(lr=with_rewards["learner"]["lr"])
    return (
        Arm(name=name, changes=with_rewards),
        Arm(name=names.SUPERVISED, changes=control, sampled=alone),
    )


LLAMAGEN = Part(
    name="llamagen",
    system="llamagen",
    question="Do quality and diversity of LlamaGen rise without guidance, and by which reward?",
    seeds=TEST_SEEDS,
    base={BASE: {}, **guided(1.5, 2, 3)},
    method=METHOD,
    arms=(
        *ONE_AT_A_TIME,
        two_spaces(),
        *of_real_images(with_real(**BY_GROUP), alone=guided(2, policy=names.SUPERVISED)),
        Arm(name=names.MORE_REAL, changes=MORE_REAL),
        Arm(name=names.LARGER_WEIGHTS, changes=LARGER_WEIGHTS),
    ),
    on_request=FURTHER_ARMS,
    seconds=45,
)
OF_VQGAN = merge(
    with_real(
        weight=3.0,
        lr=2 * LR,
        clip={"weight": 4.0, "normalise": "batch"},
        hps={"weight": 2.0, "normalise": "batch"},
        loo_fid={"weight": 4.0},
        further={"autoencoder": {"weight": 4.0}},
    ),
    {"sampling": {"top_p": 0.85}},
)
"""Sampled in training as it is afterwards: truncated, since there is no guidance."""
VQGAN = Part(
    name="vqgan",
    system="vqgan",
    question="Does a tuned VQGAN beat truncated sampling of its base policy? It has no guidance.",
    seeds=TEST_SEEDS,
    base={
        BASE: {},
        f"{BASE}, top-p .92": {"top_p": 0.92},
        f"{BASE}, top-p .8": {"top_p": 0.8},
        f"{BASE}, top-k 16": {"top_k": 16},
        f"{BASE}, top-k 8": {"top_k": 8},
        f"{BASE}, temperature .8": {"temperature": 0.8},
        f"{BASE}, temperature .6": {"temperature": 0.6},
    },
    method=METHOD,
    arms=(
        *ONE_AT_A_TIME,
        two_spaces(**BY_GROUP),
        *of_real_images(
            OF_VQGAN,
            name=names.TRUNCATED,
            alone={f"{names.SUPERVISED}, top-p .8": {"top_p": 0.8}},
        ),
    ),
    on_request=FURTHER_ARMS,
    seconds=45,
)
OF_CAPTIONS: dict[str, Any] = {
    "clip": {"weight": 14.0, "normalise": "batch"},
    "loo_fid": {"weight": 4.0},
    "further": {"autoencoder": {"weight": 4.0}},
}
"""Rewards of captions in two spaces: the captions' CLIP is the only instance reward."""
CAPTIONS = Part(
    name="captions",
    system="captions",
    question="Do they rise where captions are the conditions? Accuracy is R-precision.",
    seeds=TEST_SEEDS,
    base={BASE: {}, **guided(1.5, 2, 3)},
    method=merge(METHOD, {"rewards": {"clip": {"weight": 4.5}}}),
    arms=(
        *ONE_AT_A_TIME,
        two_spaces(**OF_CAPTIONS),
        *of_real_images(
            with_real(weight=4.0, lr=2 * LR, **OF_CAPTIONS),
            alone=guided(2, policy=names.SUPERVISED),
        ),
    ),
    on_request=FURTHER_ARMS,
    seconds=60,
)
MNIST = Part(
    name="mnist",
    system="mnist",
    images="mnist",
    question="Do they rise on MNIST's digits of 28x28 pixels, which one can look at?",
    seeds=(401, 402, 403),
    base={BASE: {}, **guided(1.5, 2, 3)},
    method=merge(METHOD, {"iterations": 100, "real": {"source": "mnist:train"}}),
    arms=(
        ONE_AT_A_TIME[0],
        Arm(name=BOTH),
        *of_real_images(
            with_real(
                **BY_GROUP,
                further={"autoencoder": {"reference": "mnist:train"}},
            ),
            alone=guided(2, policy=names.SUPERVISED),
        ),
    ),
    seconds=400,
)
EVERY = (LLAMAGEN, VQGAN, CAPTIONS, MNIST, RECALL, ABLATIONS)
PARTS: dict[str, Part] = {part.name: part for part in EVERY}

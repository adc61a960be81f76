"""The settings that the study's arms start from, written out: a change of defaults or presets does
not change what an arm means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from learner.config import merge
from learner.miniature.study.part import NETWORKS, Changes

LR = 2.4e-4
METHOD: dict[str, Any] = {
    "iterations": 120,
    "groups_per_iteration": 10,
    "rollouts_per_group": 16,
    "max_staleness": 0,
    "sampling": {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "cfg_scale": 1.0,
        "guidance": "none",
    },
    "learner": {
        "lr": LR,
        "betas": [0.9, 0.95],
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "warmup": 0,
        "schedule": "linear",
        "decay_from": 0.5,
        "final_lr": 0.05,
        "updates_per_iteration": 1,
        "minibatches": 1,
        "microbatch": 80,
        "precision": "fp32",
    },
    "loss": {
        "clip_low": 0.2,
        "clip_high": 0.2,
        "aggregation": "token-mean",
        "length_divisor": 0,
        "kl_coef": 0.0,
        "kl_estimator": "k3",
        "kl_in": "loss",
        "kl_level": "token",
        "ratio_to": "behaviour",
        "importance_cap": 0.0,
        "mask_low": 0.0,
        "mask_high": 0.0,
    },
    "entropy": {
        "controller": "none",
        "coef": 0.0,
        "gain": 0.1,
        "max_coef": 0.05,
        "damping": 0.0,
        "target": 0.0,
    },
    "real": {"weight": 0.0, "source": "digits:train"},
    "rewards": {
        "clip": {"weight": 1.0, "normalise": "group", "limit": 0.0},
        "hps": {"weight": 0.5, "normalise": "group", "limit": 0.0},
        "loo_fid": {
            "weight": 4.0,
            "normalise": "batch",
            "limit": 0.0,
            "decay": 0.5,
            "window": 0.0,
            "kind": "ema",
            "covariance": "full",
            "method": "exact",
            "mode": "ema_loo",
            "seed_images": 1000,
            "seed_from": "",
            "joint": False,
            "joint_weight": 0.0,
            "joint_dim": 0,
        },
    },
}
"""Of the systems on the digits; the others' parts change what differs."""

SECTIONS = ("sampling", "learner", "loss", "entropy", "real", "guards")
"""Sections of a run's configuration that are wholly of the method: not the preset's."""
INSTANCE_OFF = {"clip": {"weight": 0.0}, "hps": {"weight": 0.0}}
LOO_FID_OFF = {"loo_fid": {"weight": 0.0}}
JOINT = {"loo_fid": {"joint": True}}
ENTROPY = {"controller": "target"}


def further(features: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Joint LOO-FID in a further space, as heavy as in the first."""
    term = {"features": features, "weight": 2.0, "normalise": "batch", "decay": 0.5, "joint": True}
    return {**term, **changes}


AUTOENCODER = {"network": "convnet", "checkpoint": f"{NETWORKS}/autoencoder.safetensors"}
TWO_SPACES: dict[str, Any] = {
    "clip": {"weight": 0.5},
    "hps": {"weight": 0.25},
    "loo_fid": {"weight": 2.0, "joint": True},
    "further": {"autoencoder": further(AUTOENCODER)},
}
"""Joint LOO-FID in the features of a classifier and in those of an autoencoder, which keep variety
that a classifier's lose; instance rewards at half their weights."""
BY_GROUP: Changes = {"clip": {"weight": 3.0}, "hps": {"weight": 1.5}}
"""Instance rewards of the default, beside LOO-FID in two spaces."""


def with_real(*, weight: float = 1.0, lr: float = LR, **rewards: Any) -> dict[str, Any]:
    """The same with cross-entropy on real images' tokens, which keeps variety that no space of the
    rewards sees. The default's method today.

    Args:
        weight: of the cross-entropy.
        rewards: what is otherwise than in `TWO_SPACES`.
    """
    return {
        "rewards": merge(TWO_SPACES, rewards),
        "real": {"weight": weight, "batch": 64},
        "learner": {"lr": lr},
    }


MORE_REAL = with_real(weight=4.0, **BY_GROUP)
LARGER_WEIGHTS = with_real(
    weight=4.0,
    lr=2 * LR,
    clip={"weight": 9.0, "normalise": "batch"},
    hps={"weight": 4.5, "normalise": "batch"},
)
"""Divided by the standard deviation of the batch, instance rewards give groups whose images are all
good small advantages."""


def supervised(*, lr: float = LR) -> dict[str, Any]:
    """No reward: as many real images as others are sampled. What training on does without RL."""
    return {
        "rewards": merge(INSTANCE_OFF, LOO_FID_OFF),
        "real": {"weight": 1.0, "batch": 160},
        "learner": {"lr": lr},
    }

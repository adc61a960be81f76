"""The part `ablations`: one setting of "instance + LOO-FID" changed at a time, and the settings of
the public code of arXiv 2603.23086."""

from __future__ import annotations

from typing import Any

from learner.config import merge
from learner.miniature.study.method import METHOD
from learner.miniature.study.names import BASE, BOTH
from learner.miniature.study.part import Arm, Changes, Part, guided


def _loo_fid(**changes: Any) -> Changes:
    return {"rewards": {"loo_fid": changes}}


def _guided(guidance: str, scale: float) -> Changes:
    return {"sampling": {"cfg_scale": scale, "guidance": guidance}}


def _windows() -> tuple[Arm, ...]:
    return tuple(
        Arm(name=f"decay {decay:g}", changes=_loo_fid(decay=decay))
        for decay in (0.0, 0.8, 0.9, 0.95)
    )


def _guidance() -> tuple[Arm, ...]:
    """A guided policy is also sampled without guidance, as the others are."""
    found = []
    for scale in (1.5, 2.0):
        name = f"guided {scale:g}"
        unguided: Changes = {"cfg_scale": 1.0, "guidance": "none"}
        sampled = {f"{name}, sampled unguided": unguided}
        found.append(Arm(name=name, changes=_guided("guided", scale), sampled=sampled))
        found.append(Arm(name=f"distil {scale:g}", changes=_guided("distil", scale)))
    return tuple(found)


PUBLIC_CODE: Changes = {
    "sampling": {"cfg_scale": 1.5, "guidance": "distil"},
    "rewards": {
        "clip": {"weight": 0.7},
        "hps": {"weight": 0.7},
        "loo_fid": {"weight": 2.0, "normalise": "group", "covariance": "diagonal", "decay": 0.5},
    },
    "learner": {"schedule": "constant", "updates_per_iteration": 2},
    "loss": {
        "aggregation": "sequence-ratio",
        "ratio_to": "proximal",
        "kl_coef": 3.0,
        "kl_level": "sequence",
    },
    "entropy": {"controller": "paper", "target": 0.78},
}
"""The preset paper-llamagen-l-256, but for networks, data, batch, precision and learning rate."""
MENDED: Changes = merge(
    PUBLIC_CODE,
    {
        "sampling": {"guidance": "guided"},
        "rewards": {"loo_fid": {"covariance": "full", "decay": None, "window": 640.0}},
        "loss": {"ratio_to": "behaviour"},
        "entropy": {"target": 0.0},
    },
)
"""paper-fixed likewise. Its window of 20,000 images is 10 a dimension of Inception's features: 640
of the 64 here."""


ABLATIONS = Part(
    name="ablations",
    system="llamagen",
    question="What does each setting of the method do?",
    seeds=(201, 202, 203, 204, 205),
    base={BASE: {}, **guided(2)},
    method=METHOD,
    arms=(
        Arm(name=BOTH),
        Arm(name="diagonal covariance", changes=_loo_fid(covariance="diagonal")),
        Arm(name="influence", changes=_loo_fid(method="influence")),
        *_windows(),
        Arm(name="LOO-FID by group", changes=_loo_fid(normalise="group")),
        Arm(name="LOO-FID anchored", changes=_loo_fid(normalise="anchored")),
        Arm(
            name="instance by batch",
            changes={"rewards": {"clip": {"normalise": "batch"}, "hps": {"normalise": "batch"}}},
        ),
        *_guidance(),
        Arm(name="1 iteration ahead", changes={"max_staleness": 1}),
        Arm(name="4 iterations ahead", changes={"max_staleness": 4}),
        Arm(name="public code", changes=PUBLIC_CODE),
        Arm(name="public code mended", changes=MENDED),
    ),
    seconds=50,
)

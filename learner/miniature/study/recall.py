"""The part `recall`: settings that were tried so that recall is not lost, on validation seeds."""

from __future__ import annotations

from typing import Any

from learner.config import merge
from learner.miniature.study.method import ENTROPY, METHOD
from learner.miniature.study.names import BASE, BOTH, WITH_JOINT
from learner.miniature.study.part import NETWORKS, Arm, Changes, Part


def _instance(share: float) -> dict[str, Any]:
    """Instance rewards with a share of their weights."""
    return {"clip": {"weight": share}, "hps": {"weight": 0.5 * share}}


def _joint(share: float, **loo_fid: Any) -> dict[str, Any]:
    return {"rewards": {**_instance(share), "loo_fid": {"joint": True, **loo_fid}}}


def _two_spaces(weights: tuple[float, float] = (0.0, 0.0)) -> dict[str, Any]:
    """Joint LOO-FID in the reward's features and in those of its CLIP's images.

    Args:
        weights: of the class embeddings in each space; 0 is automatic.
    """
    space = {
        "features": {"network": "clip", "model": f"{NETWORKS}/clip"},
        "weight": 2.0,
        "decay": 0.5,
        "joint": True,
        "joint_weight": weights[1],
    }
    changes: Changes = {"rewards": {"further": {"clip": space}}}
    return merge(_joint(0.25, weight=2.0, joint_weight=weights[0]), changes)


THRICE = (26.0, 14.0)  # about three times the automatic weights
RECALL = Part(
    name="recall",
    system="llamagen",
    question="Which settings keep recall, in the judge's features and in pixels?",
    seeds=(301, 302, 303),
    base={
        BASE: {},
        f"{BASE}, CFG 1.5": {"cfg_scale": 1.5, "guidance": "guided"},
        f"{BASE}, CFG 2": {"cfg_scale": 2.0, "guidance": "guided"},
    },
    method=METHOD,
    arms=(
        Arm(name=BOTH),
        Arm(name=WITH_JOINT, changes={"rewards": {"loo_fid": {"joint": True}}}),
        Arm(name="a quarter of instance + joint", changes=_joint(0.25)),
        Arm(
            name="a quarter of instance + joint + entropy",
            changes=merge(_joint(0.25), {"entropy": ENTROPY}),
        ),
        Arm(name="the same in a longer window", changes=_joint(0.25, decay=0.8)),
        Arm(
            name="the same with larger groups",
            changes=merge(_joint(0.25), {"rollouts_per_group": 32, "learner": {"microbatch": 160}}),
        ),
        Arm(name="joint in two spaces", changes=_two_spaces()),
        Arm(name="joint in two spaces, classes x 3", changes=_two_spaces(THRICE)),
        Arm(
            name="joint in two spaces, classes x 3 + entropy",
            changes=merge(_two_spaces(THRICE), {"entropy": ENTROPY}),
        ),
        Arm(
            name="joint in two spaces, classes x 3, half as long",
            changes=merge(_two_spaces(THRICE), {"iterations": 120}),
        ),
    ),
    seconds=130,
)

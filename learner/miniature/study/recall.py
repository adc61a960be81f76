"""The part `recall`: settings that were tried so that recall is not lost, on validation seeds; the
part `llamagen` has others, on the test seeds."""

from __future__ import annotations

from typing import Any

from learner.config import merge
from learner.miniature.study import names
from learner.miniature.study.method import (
    BY_GROUP,
    METHOD,
    MORE_REAL,
    TWO_SPACES,
    further,
    with_real,
)
from learner.miniature.study.part import NETWORKS, Arm, Changes, Part, guided

HALF: dict[str, Any] = {"clip": {"weight": 0.5}, "hps": {"weight": 0.25}}
"""Instance rewards at half their weights."""
OF_CLIP = further({"network": "clip", "model": f"{NETWORKS}/clip"})
WITH_CLIP = {**HALF, "loo_fid": {"weight": 2.0, "joint": True}, "further": {"clip": OF_CLIP}}


def _joint(**loo_fid: Any) -> dict[str, Any]:
    return {"rewards": {**HALF, "loo_fid": {"joint": True, **loo_fid}}}


def _arm(name: str, *changes: Changes) -> Arm:
    found: dict[str, Any] = {}
    for each in changes:
        found = merge(found, each)
    return Arm(name=name, changes=found)


RECALL = Part(
    name="recall",
    system="llamagen",
    question="Which settings keep recall, in the judge's features and in pixels?",
    seeds=(301, 302, 303),
    base={names.BASE: {}, **guided(1.5, 2)},
    method=METHOD,
    arms=(
        _arm(names.BOTH),
        _arm("half of instance + joint", _joint()),
        _arm("half of instance + joint, longer window", _joint(decay=0.8)),
        _arm("joint LOO-FID in features and CLIP's", {"rewards": WITH_CLIP}),
        _arm(names.TWO_SPACES, {"rewards": TWO_SPACES}),
        _arm(f"{names.TWO_SPACES}, half as long", {"rewards": TWO_SPACES}, {"iterations": 60}),
        _arm("joint LOO-FID in three spaces", {"rewards": merge(WITH_CLIP, TWO_SPACES)}),
        _arm(names.WITH_REAL, with_real(**BY_GROUP)),
        _arm(names.MORE_REAL, MORE_REAL),
    ),
    seconds=50,
)

"""A part of the study that runs in seconds: the shipped networks, three iterations, few images."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from learner.config import merge
from learner.miniature.build import NETWORKS
from learner.miniature.study.names import BASE
from learner.miniature.study.part import Arm, Part
from learner.miniature.study.parts import LLAMAGEN
from learner.miniature.study.stages import Job

TINY: Part = replace(
    LLAMAGEN,
    base={BASE: {}, "base, CFG 2": {"cfg_scale": 2.0, "guidance": "guided"}},
    method=merge(
        LLAMAGEN.method,
        {
            "iterations": 3,
            "groups_per_iteration": 2,
            "rollouts_per_group": 4,
            "evaluation": {"num_images": 40},
            "rewards": {"loo_fid": {"seed_images": 100}},
        },
    ),
)


def tiny_job(out: Path, arm: str, seed: int = 1) -> Job:
    """A job whose networks are there."""
    of_base = Arm(name=BASE)
    job = Job(out=out, part=TINY, seed=seed, arm=of_base if arm == BASE else TINY.arm(arm))
    if not job.networks.exists():
        shutil.copytree(NETWORKS, job.networks)
    return job

"""Plan documents as `learner.plan --json` prints them, for the tests of deployment files."""

from __future__ import annotations

import json
from typing import Any


def role(name: str, count: int = 1, **values: Any) -> dict[str, Any]:
    """A role of a document; without other values, one that does not scale."""
    return {
        "name": name,
        "count": count,
        "min": count,
        "max": count,
        "num_cpus": 1.0,
        "num_gpus": 0.0,
        "memory_bytes": 4_000_000_000,
        "labels": {},
        "accelerator_type": "",
    } | values


def document(gpus: int, *workers: dict[str, Any], **values: Any) -> dict[str, Any]:
    """A document with a driver and a moments server beside these roles."""
    return {
        "version": 1,
        "preset": "llamagen-b-256",
        "gpu": "h200",
        "gpus": gpus,
        "arguments": [],
        "roles": [*workers, role("moments-server"), role("driver")],
        "object_store_bytes": 6_000_000_000,
        "iteration_s": 1.2,
        "images_per_s": 200.0,
        "bottleneck": "sample",
        "checkpoint_bytes": 1_700_000_000,
    } | values


def one_gpu() -> dict[str, Any]:
    return document(
        1,
        role("learner", num_gpus=0.4),
        role("sampler", num_gpus=0.3),
        role("reward-server", num_gpus=0.3),
        arguments=["--num-samplers", "1"],
    )


def eight_gpus() -> dict[str, Any]:
    return document(
        8,
        role("learner", 2, num_gpus=1, num_cpus=4, accelerator_type="H200"),
        role("sampler", 4, num_gpus=1, num_cpus=2, accelerator_type="H200"),
        role("reward-server", 8, min=4, max=16, num_gpus=0.25, num_cpus=2),
        arguments=["--num-samplers", "4", "--num-learners", "2", "--num-reward-servers", "8",
                   "--learner.num-gpus", "1", "--sampler.num-gpus", "1",
                   "--reward.num-gpus", "0.25", "--reward.min", "4", "--reward.max", "16"],
    )  # fmt: skip


def many_gpus() -> dict[str, Any]:
    return document(
        64,
        role("learner", 8, num_gpus=1),
        role("sampler", 40, num_gpus=1),
        role("reward-server", 28, min=14, max=32, num_gpus=0.5),
        role("reward-fid", 2, num_gpus=1),
    )


def cpus() -> dict[str, Any]:
    return document(
        0, role("learner"), role("sampler", 2), role("reward-server", 2, max=4), preset="miniature"
    )


def text(values: dict[str, Any]) -> str:
    return json.dumps(values)

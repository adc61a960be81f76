"""Disk and object store that a run needs, computed from its configuration."""

from __future__ import annotations

import logging
import math
import shutil
from dataclasses import replace
from pathlib import Path

from actors.checkpoints.loading import count_parameters
from actors.checkpoints.sources import planned_policy, planned_tokenizer
from cluster.io.run_layout import step_name, steps_in
from cluster.ray_session.object_store import StoreNeed
from cluster.roles import FEATURE_BATCH, FleetPlan
from learner.config import RunConfig
from learner.evaluation.held_out import GROUP as EVALUATION_GROUP

logger = logging.getLogger(__name__)

FP32 = 4
AVERAGES = 2  # of AdamW, for each weight
GB = 1e9


def store_need(config: RunConfig) -> StoreNeed:
    """Largest content of the object store at a time.

    Raises:
        CheckpointError, ConfigError: policy or tokenizer cannot be read.
    """
    policy, tokenizer = config.policy, config.tokenizer
    architecture = planned_policy(policy.source())
    codes = planned_tokenizer(tokenizer.source())
    side = math.isqrt(architecture.num_tokens) * codes.downsampling
    width = FP32 if config.weights.wire(config.sampler.dtype) == "float32" else FP32 // 2
    image = side * side * 3
    return StoreNeed(
        snapshot=width * count_parameters(architecture),
        group=largest_group(config) * image,
        groups=config.slots,
        batch=FEATURE_BATCH * image,
    )


def sampling_need(config: RunConfig, plan: FleetPlan) -> StoreNeed:
    """The same of an evaluation's plan: no weights travel."""
    return replace(store_need(config), snapshot=0, groups=plan.slots)


def largest_group(config: RunConfig) -> int:
    """Images of the largest group of a run."""
    sizes = [config.rollouts_per_group, config.output.gallery_columns]
    return max(*sizes, min(EVALUATION_GROUP, config.evaluation.num_images))


def checkpoint_bytes(config: RunConfig) -> int:
    """Approximate size of a checkpoint: fp32 weights, and AdamW's averages of what is trained."""
    policy = config.policy
    source = policy.source()
    averages = 0 if config.learner.lora.rank else AVERAGES
    return FP32 * (1 + averages) * count_parameters(planned_policy(source))


class DiskWatch:
    """Warns when the disk has no room for two more checkpoints.

    Args:
        checkpoints: directory of the checkpoints.
        estimate: bytes of a checkpoint, until there is one.
    """

    def __init__(self, checkpoints: Path, estimate: int) -> None:
        self._checkpoints, self._estimate = checkpoints, estimate
        self._warned = False

    def __call__(self) -> None:
        """Warn once if two more checkpoints do not fit, and again only after they did."""
        note = room_note(free_bytes(self._checkpoints), self._size(), self._checkpoints)
        if note and not self._warned:
            logger.warning("note: %s", note)
        self._warned = bool(note)

    def _size(self) -> int:
        steps = steps_in(self._checkpoints)
        newest = self._checkpoints / step_name(steps[-1]) if steps else None
        found = sum(f.stat().st_size for f in newest.rglob("*") if f.is_file()) if newest else 0
        return found or self._estimate


def free_bytes(folder: Path) -> int:
    """Free space for this user."""
    return shutil.disk_usage(folder).free


def room_note(free: int, checkpoint: int, folder: Path) -> str:
    """The warning, or empty if two checkpoints fit."""
    if free >= 2 * checkpoint:
        return ""
    return (
        f"the disk of {folder} has {free / GB:.3g} GB free, and a checkpoint takes "
        f"{checkpoint / GB:.3g}: fewer than two more fit (an old one is removed only after a new "
        "one is written). Make room, or set a lower --output.keep-checkpoints, a larger "
        "--output.checkpoint-every or --output.no-rollouts"
    )

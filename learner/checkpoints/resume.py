"""Which settings a resumed run may change."""

from __future__ import annotations

from typing import Any

from cluster.errors import ConfigError
from learner.config import RunConfig, dotted, to_dict

MAY_CHANGE = (
    "num_samplers",
    "num_reward_servers",
    "num_learners",
    "iterations",
    "timeout_s",
    "heartbeat_s",
    "max_restarts",
    "max_failed_share",
    "sampler.kernels",
    "sampler.num_",
    "sampler.labels",
    "sampler.accelerator_type",
    "reward.num_",
    "reward.labels",
    "reward.accelerator_type",
    "reward.min",
    "reward.max",
    "reward.target_wait_s",
    "reward.every_s",
    "reward_pools.",
    "rewards.loo_fid.rebuild_every",  # of earlier versions; does nothing
    "learner.num_",
    "learner.labels",
    "learner.accelerator_type",
    "learner.microbatch",
    "learner.checkpointing",
    "learner.compile",
    "learner.reference_device",
    "guards.",
    "output.",
    "evaluation.every",
    "evaluation.patience",
    "evaluation.hacking",
    "evaluation.diversity",
    "evaluation.max_",
    "weights.transport",
    "placement.",
    "ray.",
    "quota.",
)
"""Prefixes of fields that a resumed run may change: they do not change what it computes (but for
more iterations, which stretch the learning rate's schedule). Of evaluations, not what figures are
of: table, best checkpoint, patience and guards compare them across the run."""

OF_ROUNDING = ("num_learners", "learner.microbatch", "learner.compile", "sampler.kernels")
"""Fields that may change the last bits: a reproducible run keeps them."""

OF_MACHINE = (".num_threads",)
"""Suffixes of fields that a resumed run may change: of roles, and of further feature spaces."""
LATER_ASKED = (".tag",)
"""Suffixes of fields that a resumed run may set if they are empty, as earlier versions left
them."""
SHOWN = 5  # fields


def check_resume(saved: RunConfig, wanted: RunConfig) -> None:
    """Refuse to resume a run with a configuration that makes it another run.

    Raises:
        ConfigError: names the fields, with both values.
    """
    before, after = fields_of(saved), fields_of(wanted)
    changed = [
        f"{name} ({before.get(name, 'not set')} in the run, {after.get(name, 'not set')} now)"
        for name in dict.fromkeys((*after, *before))  # names within a mapping may be new, or gone
        if after.get(name) != before.get(name)
        and not name.endswith(OF_MACHINE)
        and (not name.startswith(MAY_CHANGE) or (saved.reproducible and name in OF_ROUNDING))
        and not (name.endswith(LATER_ASKED) and before.get(name) == "")
    ]
    if changed:
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise ConfigError(
            f"--resume continues the same run, and cannot change {', '.join(changed[:SHOWN])}"
            f"{more}: leave the option (or --preset) out, or start a new run"
        )


def fields_of(config: RunConfig) -> dict[str, Any]:
    """Every setting by its name with dots."""
    return dotted(to_dict(config))

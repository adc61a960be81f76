"""What a configuration names that is not there yet: for a dry run, which is no reason to fail."""

from __future__ import annotations

from pathlib import Path

from actors.models.loading import PolicyConfig, TokenizerConfig, check_policy
from actors.models.zoo import MODELS
from cluster.errors import ConfigError
from learner.config import RunConfig
from learner.datasets import DIGITS
from rewards.extra import find_extra


def lacking(config: RunConfig) -> list[str]:
    """One line for each file that has to be fetched or made before the run can start.

    Raises:
        CheckpointError, ConfigError: the policy is a file of the user's own and is not there, or
            does not fit its architecture.
    """
    lines = _models(config)
    if not any(line.startswith("policy") for line in lines):
        check_policy(config.policy)  # a missing file shows here
    files = {
        "rewards.loo_fid.reference": config.rewards.loo_fid.reference,
        "conditions.captions": config.conditions.captions,
    }
    for field, file in files.items():
        known = not file or file.startswith((DIGITS, "package://"))
        if not known and not Path(file).expanduser().exists():
            lines.append(f"{field}: there is no {file}")
    return lines + _rewards(config)


def _rewards(config: RunConfig) -> list[str]:
    """Rewards of the user's own that cannot be built as they are written; those of pools with a
    runtime environment of their own cannot be known here."""
    lines = []
    for extra in config.rewards.extras():
        pool = config.reward_pools.get(extra.term.pool)
        if pool is None or not pool.runtime_env:
            try:
                find_extra(extra)
            except ConfigError as error:
                lines.append(str(error))
    return lines


def _models(config: RunConfig) -> list[str]:
    asked: dict[str, PolicyConfig | TokenizerConfig] = {
        "policy": config.policy,
        "tokenizer": config.tokenizer,
    }
    lines = []
    for field, source in asked.items():
        model = MODELS.get(source.checkpoint)
        if model is None:
            continue
        places = [model.place(), *([model.project_place()] if model.project else [])]
        absent = [str(place) for place in places if not place.is_file()]
        if absent:
            lines.append(
                f"{field}: {model.name} is not fetched ({', '.join(absent)}); "
                f"python -m actors.weights fetch {model.name}"
            )
    return lines

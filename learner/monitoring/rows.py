"""An iteration's line of metrics: every figure under the name that the records keep."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from cluster.messages import ScoredGroup
from cluster.spans import Span
from learner.grpo.advantage import Advantages
from learner.monitoring.guards import scoring_times
from learner.training.batch import StepReport
from rewards.distribution.distribution_reward import DistributionReward

QUANTILES = {"p05": 0.05, "p95": 0.95}


def all_spans(
    groups: Sequence[ScoredGroup], answer: DistributionReward, report: StepReport
) -> tuple[Span, ...]:
    """What workers told of their time."""
    of_groups = (span for group in groups for span in (*group.rollouts.spans, *group.scores.spans))
    return (*of_groups, *answer.spans, *report.spans)


def staleness_of(groups: Sequence[ScoredGroup], version: int) -> np.ndarray:
    """(P,) int64: how many updates each group is behind the weights that learn from it."""
    return version - np.array([group.rollouts.version for group in groups], dtype=np.int64)


def iteration_metrics(
    iteration: int,
    max_staleness: int,
    groups: Sequence[ScoredGroup],
    answer: DistributionReward,
    advantages: Advantages,
    report: StepReport,
    restarts: int,
) -> dict[str, Any]:
    """Everything but the times. What was not measured is absent."""
    rewards = {n: v for n, v in advantages.rewards.items() if not np.isnan(v).all()}
    ages = staleness_of(groups, report.version - 1).tolist()
    return {
        "iteration": iteration + 1,  # as everywhere in the records: how many are done with it
        "version": report.version,
        **{f"staleness/groups_{age}": ages.count(age) for age in range(max_staleness + 1)},
        "moments/version": answer.version,
        "moments/staleness": iteration - answer.version,
        **{f"reward/{name}": float(np.nanmean(values)) for name, values in rewards.items()},
        **{f"reward_std/{name}": float(np.nanstd(values)) for name, values in rewards.items()},
        **{
            f"reward_{label}/{name}": float(np.nanquantile(values, share))
            for label, share in QUANTILES.items()
            for name, values in rewards.items()
        },
        **{f"reward_clipped/{name}": share for name, share in advantages.clipped.items()},
        "fid/ema": answer.fid,
        "fid/batch": answer.batch_fid,
        "fid/effective_size": answer.effective_size,
        "fid/gap": answer.gap,
        "fid/bias": answer.bias,
        "fid/lag": answer.lag,
        "fid/positive_share": answer.positive_share,
        **_of_classes(answer),
        "images/failed": int((~advantages.valid).sum()),
        "groups/flat": advantages.flat_groups,
        **report.metrics,
        "fleet/restarts": restarts,
    }


def _of_classes(answer: DistributionReward) -> dict[str, float]:
    if answer.class_rewards is None:  # of captions
        return {}
    return {
        "fid/between_classes": answer.between_classes,
        "fid/within_classes": answer.within_classes,
    }


def times(spans: Sequence[Span], started: float, groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Seconds of each phase, added over workers; and the rate of the whole, since `started`: the
    end of the iteration before."""
    seconds: dict[str, float] = {}
    for span in spans:
        key = f"time/{span.phase}"
        seconds[key] = seconds.get(key, 0.0) + span.seconds
    whole = time.time() - started
    images = sum(group.rollouts.request.num_rollouts for group in groups)
    if scoring := scoring_times(spans):
        seconds["time/slowest_server"] = max(scoring.values())
    return {**seconds, "time/iteration": whole, "time/images_per_s": images / whole}

"""An iteration's metrics: what was measured, and nothing that was not."""

from __future__ import annotations

import warnings

import numpy as np
import torch

from cluster.spans import Span
from learner.grpo.advantage import group_advantages
from learner.grpo.loss import LossStats
from learner.monitoring.metrics import iteration_metrics
from learner.training.batch import StepReport
from learner.training.preparation import StatsAccumulator
from rewards.combine import Combiner, RewardTerm
from rewards.distribution.distribution_reward import DistributionReward
from tests.unit.helpers import scored_group


class Alone:
    """One learner."""

    @staticmethod
    def all_sum(values: list[float]) -> list[float]:
        return values

    all_max = all_sum


def row(errors: list[str | None], *, classes: bool = True, spans: tuple[Span, ...] = ()) -> dict:
    scores = {"clip": [np.nan if error else 0.1 * k for k, error in enumerate(errors)]}
    groups = [scored_group(scores, errors=errors)]
    combiner = Combiner({"clip": RewardTerm(limit=2.0), "loo_fid": RewardTerm()})
    fid = np.array([[0.5, -0.5]])
    advantages = group_advantages(groups, {"loo_fid": fid}, combiner)
    statistics = {"class_rewards": {1: 0.0}, "between_classes": 0.0, "within_classes": 0.5}
    answer = DistributionReward(
        iteration=0,
        rewards=fid[0],
        fid=2.0,
        batch_fid=3.0,
        effective_size=10.0,
        **(statistics if classes else {}),
    )
    report = StepReport(version=1, metrics={"policy/entropy": 2.0}, spans=())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return iteration_metrics(
            0,
            groups,
            {"fid/": answer},
            advantages,
            report,
            max_staleness=0,
            restarts=0,
            spans=spans,
            seconds=2.0,
        )


def test_a_reward_that_no_image_got_is_absent() -> None:
    scored, failed = row([None, None]), row(["clip: boom", "clip: boom"])
    of_clip = {name for name in scored if name.endswith("/clip")}
    assert of_clip == {f"reward{part}/clip" for part in ("", "_std", "_p05", "_p95", "_clipped")}
    assert scored.keys() - failed.keys() == of_clip
    assert failed["images/failed"] == 2
    partly = row([None, "clip: boom"])
    assert partly.keys() == scored.keys()
    assert partly["reward/clip"] == 0


def test_statistics_of_classes_are_absent_where_there_are_none() -> None:
    of_classes = {"fid/between_classes", "fid/within_classes"}
    assert row([None, None]).keys() - row([None, None], classes=False).keys() == of_classes


def test_the_slowest_server_is_absent_where_none_reported_its_time() -> None:
    sample = Span("sampler-0", "sample", 0.0, 1.0)
    found = row([None, None], spans=(sample, sample))
    assert "time/slowest_server" not in found
    assert (found["time/sample"], found["time/images_per_s"]) == (2.0, 1.0)
    found = row([None, None], spans=(sample, Span("reward-server-0", "score", 0.0, 0.25)))
    assert found["time/slowest_server"] == 0.25


def stats(gap: float) -> LossStats:
    values = {name: torch.tensor(0.5) for name in LossStats.__dataclass_fields__}
    return LossStats(**{**values, "logprob_gap": torch.tensor(gap)})


def test_a_gap_that_is_no_number_is_not_zero() -> None:
    for gaps in ([float("nan"), 0.1], [0.1, float("nan")]):
        sums = StatsAccumulator(reference_kl=False)
        for gap in gaps:
            sums.add(stats(gap), 0.5)
        found = sums.total(Alone)  # type: ignore[arg-type]
        assert np.isnan(found["logprob_gap"])
        assert "reference_kl" not in found
        assert found["surrogate"] == 0.5
    measured = StatsAccumulator(reference_kl=True)
    measured.add(stats(0.2), 1.0)
    assert measured.total(Alone)["reference_kl"] == 0.5  # type: ignore[arg-type]

"""Early stop, and warnings of reward hacking and lost diversity, on made-up series."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cluster.errors import LearningError
from cluster.messages import MAIN_SPACE
from learner.evaluation.in_run import figures_of, judge_fid
from learner.evaluation.trends import Trends, stalled, upto
from learner.output import EvaluationConfig
from rewards.config import JudgeConfig
from rewards.metrics.samples import SPATIAL
from rewards.networks.features import FeaturesConfig
from tests.small_run import small_config

EVERY, STEPS = 20, 200
CONFIG = EvaluationConfig(every=EVERY)


def metrics(slope: float, noise: float = 0.02, fid_slope: float = 0.0, seed: int = 0) -> list[Any]:
    """Lines of metrics.jsonl: a reward and the reward's FID that drift by so much in a run."""
    generator = np.random.default_rng(seed)
    share = np.arange(STEPS) / STEPS
    reward = 0.3 + slope * share + generator.normal(0, noise, STEPS)
    fid = 10 + fid_slope * share + generator.normal(0, 0.1, STEPS)
    return [
        {"iteration": at + 1, "reward/clip": reward[at], "fid/ema": fid[at]} for at in range(STEPS)
    ]


def evaluations(fids: list[float], **others: list[float]) -> dict[int, dict[str, float]]:
    """Of the base policy and after every 20 iterations."""
    columns = {"fid": fids, **others}
    return {
        at * EVERY: {name: values[at] for name, values in columns.items()}
        for at in range(len(fids))
    }


def notes(history: dict[int, Any], rows: list[Any], **config: Any) -> list[tuple[int, str]]:
    """Warnings of a whole run, evaluation by evaluation."""
    trends = Trends(replace(CONFIG, **config), "fid", ["clip"], LOWERED)
    return [
        (step, note)
        for step in history
        if step
        for note in trends(upto(history, step), rows[:step]).notes
    ]


WORSE = [20.0, 18.0, 16.0, 17.0, 18.5, 19.0, 20.0]
LOWERED = {"loo_fid": "fid/ema"}
BETTER = [20.0, 18.0, 16.0, 15.0, 14.5, 14.0, 13.8]


def test_hacking_is_noticed_once() -> None:
    """The judge's FID rises after iteration 40, while the reward rises on: at the second
    evaluation that is more than a tenth worse."""
    ((step, note),) = notes(evaluations(WORSE), metrics(0.3))
    assert step == 100
    assert "the reward clip rose from 0.3" in note
    assert "since iteration 40, while the judge's fid went from 16 to 19" in note
    for advice in ("loss.kl_coef", "learner.lr", "less weight on that reward"):
        assert advice in note


def test_hacking_of_the_distribution_reward() -> None:
    """Its FID falls, and the judge's rises."""
    ((_, note),) = notes(evaluations(WORSE), metrics(0.0, fid_slope=-4))
    assert "the FID that the reward loo_fid lowers (fid/ema) fell from" in note
    assert "clip" not in note
    assert not notes(evaluations(WORSE), metrics(0.0, fid_slope=4))


def test_worse_than_the_base_policy_from_the_start() -> None:
    """Its best is the base policy."""
    ((step, note),) = notes(evaluations([16.0, 18.0, 19.0, 20.0]), metrics(0.5))
    assert step == 40
    assert "since iteration 0," in note


@pytest.mark.parametrize(
    ("fids", "slope"),
    [
        (BETTER, 0.3),  # as it should be
        (WORSE, 0.0),  # worse, but no reward rose
        (WORSE, -0.3),
        ([20.0, 18.0, 16.0, 19.0, 16.2, 19.0, 16.4], 0.3),  # one bad evaluation at a time
        ([20.0, 18.0, 16.0, 16.8, 16.9, 17.0, 17.1], 0.3),  # within the bound
    ],
)
def test_what_is_no_hacking(fids: list[float], slope: float) -> None:
    assert not notes(evaluations(fids), metrics(slope))


def test_noise_does_not_warn() -> None:
    """Of 200 runs without a drift of either, whose FID has a noise of 5 %: at most 1."""
    warned = 0
    for seed in range(200):
        fids = [16 * (1 + 0.05 * x) for x in np.random.default_rng(seed).normal(size=10)]
        warned += bool(notes(evaluations(fids), metrics(0.0, seed=seed)))
    assert warned <= 1


def test_lost_diversity() -> None:
    coverage, recall = [0.5, 0.45, 0.4, 0.34, 0.3], [0.6, 0.6, 0.55, 0.5, 0.5]
    history = evaluations(BETTER[:5], coverage=coverage, recall=recall)
    ((step, note),) = notes(history, metrics(0.3))
    assert step == 60
    assert "coverage is 0.340, of 0.500 (the base policy's)" in note
    assert "recall" not in note
    assert "rewards.loo_fid" in note
    assert not notes(history, metrics(0.3), max_diversity_loss=0.5)
    assert not notes(history, metrics(0.3), diversity="off")
    second = [{"coverage": 0.5, "second/recall": recall} for recall in (0.6, 0.2)]
    for fid, lost in (("fid", 0), ("second/fid", 1)):  # a space that no reward uses is watched
        trends = Trends(CONFIG, fid, ["clip"], LOWERED)
        assert len(trends(dict(zip((0, 20), second)), []).notes) == lost
    later = {step: row for step, row in history.items() if step >= 20}  # without the base policy's
    assert "that after iteration 20" in notes(later, metrics(0.3))[0][1]


def test_a_guard_may_stop_the_run() -> None:
    history, rows = evaluations(WORSE), metrics(0.3)
    trends = Trends(replace(CONFIG, hacking="stop"), "fid", ["clip"], {})
    trends(upto(history, 80), rows).enforce()
    found = trends(upto(history, 100), rows)
    assert not found.notes
    with pytest.raises(LearningError, match="evaluation after iteration 100: the reward clip rose"):
        found.enforce()


def test_a_resumed_run_does_not_warn_again() -> None:
    history, rows = evaluations(WORSE), metrics(0.3)
    trends = Trends(CONFIG, "fid", ["clip"], LOWERED)
    trends.replay(upto(history, 80), rows[:80])
    assert trends(upto(history, 100), rows[:100]).notes
    trends = Trends(CONFIG, "fid", ["clip"], LOWERED)
    trends.replay(upto(history, 100), rows[:100])
    assert not trends(history, rows).notes


def test_early_stop() -> None:
    history = evaluations([9.0, 20.0, 16.0, 17.0, 18.0], clip=[0.1, 0.2, 0.3, 0.2, 0.1])
    assert not stalled(history, "fid", 3)
    assert not stalled(history, "fid", 0)
    reason = stalled(history, "fid", 2)  # the base policy's is not a checkpoint
    assert reason == (
        "fid has not improved in 2 evaluations (best: 16 after iteration 40; evaluation.patience 2)"
    )
    assert "best: 0.3 after iteration 40" in stalled(history, "clip", 2)
    assert not stalled(history, "hps", 2)  # never there: nothing says that training stalls
    assert not stalled(upto(history, 60), "fid", 2)


def test_figures_of_judges() -> None:
    assert figures_of(JudgeConfig())[:3] == ["clip", "accuracy", "fid"]
    judge = JudgeConfig(features=FeaturesConfig(network="inception"))
    alone = ["clip", "accuracy", "fid", "inception_score"]
    assert figures_of(judge, moments=[MAIN_SPACE]) == alone
    assert figures_of(judge, moments=[MAIN_SPACE, SPATIAL]) == [*alone[:3], "sfid", alone[3]]
    assert {"second/fid", "second/recall", "sfid"} < {*figures_of(judge)}
    further = JudgeConfig(further={"clip": FeaturesConfig(network="clip")})
    assert {"clip/fid", "clip/recall"} < {*figures_of(further)} - {*figures_of(JudgeConfig())}


def test_the_judges_fid_is_in_a_space_of_its_own() -> None:
    network = {"features": {"network": "inception", "checkpoint": ""}}
    assert judge_fid(small_config()) == "fid"
    assert judge_fid(small_config(rewards=network, judge=network)) == "second/fid"
    both = network | {"second": network["features"], "further": {"clip": {"network": "clip"}}}
    assert judge_fid(small_config(rewards=network, judge=both)) == "clip/fid"
    logged = small_config(rewards=network | {"loo_fid": {"weight": 0}}, judge=network)
    assert judge_fid(logged) == "fid"

"""The evaluations of a run: which are made, what is kept, what follows from them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from learner.evaluation import held_out
from learner.evaluation.in_run import RunEvaluations
from learner.monitoring.metrics import append_evaluation
from learner.runs.run_dir import RunDirectory
from rewards.metrics.samples import RealImages
from tests.small_run import small_config


class Judged:
    """A run whose evaluations give these figures, one after the other."""

    def __init__(self, path: Path, patch: pytest.MonkeyPatch, **changes: Any) -> None:
        config = small_config(iterations=8, evaluation={"cfg_scales": (), "every": 2}, **changes)
        self.figures: list[dict[str, float]] = []
        self.made, self.read = 0, 0
        patch.setattr(held_out, "evaluate_policy", self._evaluate)
        patch.setattr(held_out, "real_images", self._real)
        self.run = RunDirectory.create(str(path), config)
        self.evaluations = self.again(config)

    def again(self, config: Any = None) -> RunEvaluations:
        """Of a new process."""
        return RunEvaluations(config or self.evaluations.config, self.run, None)  # type: ignore[arg-type]

    def _evaluate(self, *_: Any) -> dict[str, float]:
        self.made += 1
        return self.figures.pop(0)

    def _real(self, *_: Any) -> RealImages:
        self.read += 1
        return RealImages()

    def evaluate(self, step: int, **figures: float) -> None:
        """As the main loop does after so many iterations."""
        self.figures = [figures]
        append_evaluation(self.run, step, self.evaluations.current())
        self.evaluations.conclude(step).enforce()


def change(evaluations: RunEvaluations, **options: Any) -> None:
    """Other options of evaluations."""
    config = evaluations.config
    evaluations.config = replace(config, evaluation=replace(config.evaluation, **options))


def test_the_last_evaluation_while_training_is_the_tuned_policys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = Judged(tmp_path / "run", monkeypatch)
    judged.figures = [{"fid": 9.0}]
    judged.evaluations.base()
    assert [judged.evaluations.due(step) for step in (1, 2, 8)] == [False, True, True]
    judged.evaluate(2, fid=8.0)
    judged.evaluate(8, fid=7.0)
    judged.evaluations.tuned(8)
    assert judged.evaluations.table == {"base": {"fid": 9.0}, "tuned": {"fid": 7.0}}
    assert judged.run.read_evaluation() == judged.evaluations.table
    assert (judged.made, judged.read) == (3, 1)  # real images are read once
    judged.evaluations.forget_tuned()  # trained on
    assert [*judged.run.read_evaluation()] == ["base"]


def test_the_tuned_policy_is_evaluated_and_warned_about_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    judged = Judged(tmp_path / "run", monkeypatch)
    judged.figures = [{"fid": 9.0, "coverage": 0.5}, {"fid": 7.0, "coverage": 0.2}]
    judged.evaluations.base()
    with caplog.at_level(logging.WARNING):
        judged.evaluations.tuned(7)
    assert judged.evaluations.table["tuned"]["coverage"] == 0.2
    assert "note: evaluation after iteration 7: coverage is 0.200, of 0.500" in caplog.text


def test_training_ends_early_and_a_resumed_run_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = Judged(tmp_path / "run", monkeypatch, output={"keep_best": "fid"})
    change(judged.evaluations, patience=2)
    judged.evaluate(2, fid=5.0)
    judged.evaluate(4, fid=6.0)
    assert not judged.evaluations.ended
    judged.evaluate(6, fid=5.5)
    reason = "training ends after 6 of 8 iterations: fid has not improved in 2 evaluations"
    assert judged.evaluations.ended.startswith(reason)
    resumed = judged.again()
    resumed.resume(6)
    assert resumed.ended == judged.evaluations.ended
    resumed.resume(4)  # --from-step: goes on
    assert not resumed.ended
    change(resumed, patience=3)
    resumed.resume(6)
    assert not resumed.ended


def test_without_images_there_is_no_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = Judged(tmp_path / "run", monkeypatch, output={"keep_best": "fid"})
    change(judged.evaluations, num_images=0)
    judged.evaluations.base()
    judged.evaluations.tuned(8)
    assert not judged.evaluations.due(2)
    assert (judged.made, judged.evaluations.table) == (0, {})

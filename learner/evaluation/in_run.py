"""The evaluations of a run: the table before and after training, those while it trains, and what
follows from them."""

from __future__ import annotations

import logging
from collections.abc import Collection

from cluster.fleet import Fleet
from learner.config import RunConfig
from learner.evaluation import held_out
from learner.evaluation.trends import Found, History, Trends, stalled, upto
from learner.monitoring.metrics import append_evaluation, read_metrics
from learner.runs.records import STEP, TUNED, read_records, truncate
from learner.runs.run_dir import RunDirectory
from rewards.config import JudgeConfig
from rewards.metrics.figures import OF_A_SPACE, prefix_of
from rewards.metrics.samples import SPATIAL, RealImages
from rewards.preflight import same_space

logger = logging.getLogger(__name__)

Figures = dict[str, float]
BASE = "base"


class RunEvaluations:
    """Evaluates the policies of a run; keeps the table, and the real images' features.

    Args:
        config: replaced where the conditions are encoded.
    """

    def __init__(self, config: RunConfig, run: RunDirectory, fleet: Fleet) -> None:
        self.config = config
        self._run, self._fleet = run, fleet
        self.table = run.read_evaluation()
        self.ended = ""
        """Why training ends before its last iteration (`evaluation.patience`); else empty."""
        self._real: RealImages | None = None
        self._trends = trends_of(config)

    def real(self) -> RealImages:
        """The real images, read once."""
        if self._real is None:
            self._real = held_out.real_images(self.config, self._fleet)
        return self._real

    def due(self, done: int) -> bool:
        """Whether the policy is evaluated after `done` iterations."""
        evaluation = self.config.evaluation
        wanted = evaluation.num_images > 0 and evaluation.every > 0
        return wanted and done % evaluation.every == 0

    def base(self) -> None:
        """Evaluate the base policy."""
        for row in held_out.base_rows(self.config):
            self._fill(row)

    def tuned(self, done: int) -> None:
        """Evaluate the tuned policy, unless it was after its last iteration, and warn if it lost
        diversity."""
        self.table.pop(TUNED, None)  # of an earlier, shorter run
        if known := self._history().get(done) if done else None:
            self.table[TUNED] = known
            self._run.write_evaluation(self.table)
            return
        self._fill(held_out.tuned_row(self.config))
        if TUNED in self.table:
            history = self._base() | {done: self.table[TUNED]}
            self._warn(self._trends(history, ()))

    def forget_tuned(self) -> None:
        """Remove the tuned policy's row, of an earlier, longer or shorter run."""
        if self.table.pop(TUNED, None):
            self._run.write_evaluation(self.table)

    def current(self) -> Figures:
        """Evaluate the current policy as the tuned one is evaluated at the end.

        Raises:
            StopRequestedError: a stop was requested meanwhile.
        """
        return self._evaluate(held_out.tuned_row(self.config))

    def repeat(self, step: int) -> Figures:
        """Make and record the evaluation of a restored step, which a stop interrupted."""
        truncate(self._run, step, rollouts=False)
        figures = self.current()
        append_evaluation(self._run, step, figures)
        return figures

    def resume(self, done: int) -> None:
        """Restore the state after `done` iterations from the records."""
        history = upto(self._history(), done)
        self._trends = trends_of(self.config)
        self._trends.replay(history, read_metrics(self._run.metrics))
        self._end_if_stalled(history, done)

    def conclude(self, done: int) -> Found:
        """After an evaluation was recorded: warn, and see whether training ends or must stop."""
        history = self._history()
        found = self._trends(history, read_metrics(self._run.metrics))
        self._warn(found)
        self._end_if_stalled(history, done)
        return found

    def _end_if_stalled(self, history: History, done: int) -> None:
        figure, self.ended = self.config.output.keep_best, ""
        reason = stalled(history, figure, self.config.evaluation.patience)
        if reason and done in history and done < self.config.iterations:
            self.ended = (
                f"training ends after {done} of {self.config.iterations} iterations: {reason}. "
                "best.json names the best checkpoint; with --resume, a larger "
                "--evaluation.patience, or 0, trains on"
            )
            logger.info(self.ended)

    def _history(self) -> dict[int, Figures]:
        """Step -> figures of the evaluations so far, the base policy's as step 0."""
        rows = read_records(self._run.evaluations, STEP)
        return self._base() | {
            row[STEP]: {name: value for name, value in row.items() if name != STEP} for row in rows
        }

    def _base(self) -> dict[int, Figures]:
        """Under guidance 'distil' the base policy was evaluated with guidance, the tuned one is
        not, and there is none to compare with."""
        same = held_out.tuned_row(self.config).spec == self.config.sampling
        return {0: self.table[BASE]} if same and BASE in self.table else {}

    def _warn(self, found: Found) -> None:
        for line in found.notes:
            logger.warning(f"note: {line}")

    def _fill(self, row: held_out.TableRow) -> None:
        """Evaluate one row of the table, unless it is there."""
        if not self.config.evaluation.num_images or row.name in self.table:
            return
        logger.info(f"evaluating: {row.name}")
        self.table[row.name] = self._evaluate(row)
        self._run.write_evaluation(self.table)

    def _evaluate(self, row: held_out.TableRow) -> Figures:
        return held_out.evaluate_policy(self.config, self._fleet, row.spec, self.real())


def figures_of(judge: JudgeConfig, *, moments: Collection[str] | None = None) -> list[str]:
    """Figures of evaluations while training that `output.keep_best` may name.

    Args:
        moments: the spaces of a reference of moments alone; None: there are real images.
    """
    found = list(judge.score_names())
    for space in judge.spaces():
        prefix = prefix_of(space)
        if moments is None:
            found += [prefix + name for name in OF_A_SPACE]
        elif space in moments:
            found.append(f"{prefix}fid")
    if any(features.network == "inception" for features in judge.spaces().values()):
        found += ["sfid"] if moments is None or SPATIAL in moments else []
        found.append("inception_score")
    return found


def trends_of(config: RunConfig) -> Trends:
    """What is watched in the evaluations of a run."""
    rewards = [name for name, term in config.rewards.scorers().items() if term.weight]
    fid = judge_fid(config)
    spaces = config.rewards.spaces().values()
    lowered = {each.reward: f"{each.fid}ema" for each in spaces if each.term.weight}
    return Trends(config.evaluation, fid, rewards, lowered)


def judge_fid(config: RunConfig) -> str:
    """The judge's FID in the first space that no distribution reward lowers; in its main one if
    there is none such."""
    lowered = config.rewards.lowered().values()
    for space, ours in config.judge.spaces().items():
        if not any(same_space(theirs, ours) for theirs in lowered):
            return f"{prefix_of(space)}fid"
    return "fid"

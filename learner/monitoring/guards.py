"""Guards against runs that have gone wrong: what is looked at, and when to speak or to stop.

Everything here is a function of figures that the records keep. A guard's memory is how many
iterations in a row its figure was bad, so a resumed run reads it from the rows that were kept.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import LearningError
from cluster.io.strict_json import number
from cluster.spans import Span, role_of
from learner.training.skips import GuardsConfig

SLOW = 5.0
"""A reward server that takes so many times what the others of its pool take is named."""
SLOW_FLOOR_S = 0.5
"""What is faster than this is not slow: the noise of a busy machine."""


@dataclass(frozen=True)
class Findings:
    """What the guards say of one iteration."""

    metrics: dict[str, int]
    """How many iterations in a row each figure has been bad, for the records."""
    notes: tuple[str, ...] = ()
    """What to say, once."""
    stop: str = ""
    """Why the run must stop; empty if it need not."""

    def enforce(self) -> None:
        """Stop, if that is what was found.

        Raises:
            LearningError: with what is wrong and what to change.
        """
        if self.stop:
            raise LearningError(self.stop)


@dataclass
class Guards:
    """Watches the rows of a run, one after the other.

    Args:
        groups: that an iteration has.
        one_policy: samplers draw from the policy that is learned (not so under guidance 'distil').
    """

    config: GuardsConfig
    groups: int
    one_policy: bool = True
    _bad: dict[str, int] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Remember the rows that a resumed run goes on from; what was said then is not said again,
        and nothing stops."""
        for row in rows:
            self(row)

    def __call__(self, row: Mapping[str, Any]) -> Findings:
        """Look at one iteration's metrics; a number that was not finite may be None, as the records
        keep it."""
        row = {name: number(value) for name, value in row.items()}
        config = self.config
        problems = {
            "reward_flat": (config.reward, self._reward(row)),
            "entropy_low": (config.entropy, self._entropy(row)),
            "kl_high": (config.kl, self._kl(row)),
        }
        notes, stop = [], ""
        for name, (action, problem) in problems.items():
            self._bad[name] = self._bad.get(name, 0) + 1 if problem else 0
            if self._bad[name] < config.patience or action == "off":
                continue
            text = f"for {self._bad[name]} iterations, {problem}"
            if action == "stop":
                stop = stop or f"iteration {row['iteration']}: {text}"
            elif name not in self._told:
                self._told.add(name)
                notes.append(f"iteration {row['iteration']}: {text}")
        metrics = {f"guards/{name}": count for name, count in self._bad.items()}
        return Findings(metrics, tuple(notes), stop)

    def _reward(self, row: Mapping[str, Any]) -> str:
        """What is wrong with the rewards, if anything is."""
        if row.get("groups/flat", 0) >= self.groups:
            return (
                "all rewards were equal within every group, so that nothing is learned: look at "
                "the scorers and at gallery/; a higher sampling.temperature, more "
                "rollouts_per_group or an entropy controller (--entropy.controller target) bring "
                "differences back"
            )
        least = self.config.min_reward_std
        flat = [
            key.removeprefix("reward_std/")
            for key, value in row.items()
            if key.startswith("reward_std/") and value <= least
        ]
        if not flat:
            return ""
        return (
            f"the reward {' and '.join(flat)} had the same value for every image (deviation at "
            f"most {least:g}), so that nothing is learned from it: is the scorer all right, or the "
            "reward at its maximum? Its weight can be set to 0"
        )

    def _entropy(self, row: Mapping[str, Any]) -> str:
        base, found = row.get("policy/base_entropy", 0.0), row.get("policy/entropy", math.nan)
        if not base > 0 or not found < self.config.min_entropy_share * base:
            return ""
        return (
            f"the policy's entropy has been below {self.config.min_entropy_share:g} of the base "
            f"policy's ({found:.3g} of {base:.3g} nats a token now): images become alike. Go on "
            "from an earlier checkpoint with a lower learner.lr, "
            "or start anew with --entropy.controller target, a loss.kl_coef, or more weight on "
            "rewards.loo_fid"
        )

    def _kl(self, row: Mapping[str, Any]) -> str:
        limits = {"reference_kl": self.config.max_reference_kl}
        if self.one_policy:
            limits["mismatch_kl"] = self.config.max_mismatch_kl
        # inf is no divergence that is learned: a filter that rounds differently gives it
        found = {name: row.get(f"policy/{name}", 0.0) for name in limits}
        high = [
            f"policy/{name} {value:.3g} is above guards.max_{name} {limits[name]:g}"
            for name, value in found.items()
            if math.isfinite(value) and value > limits[name]
        ]
        if not high:
            return ""
        return (
            f"{' and '.join(high)} (nats a token): the policy runs away. A lower learner.lr, "
            "narrower clips or a larger loss.kl_coef hold it; checkpoints are as they were"
        )


@dataclass
class SlowServers:
    """Names a reward server that answers far slower than the others of its pool."""

    patience: int
    _slow: dict[str, int] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)

    def __call__(self, spans: Iterable[Span]) -> list[str]:
        """Look at one iteration's spans; returns what to say, once a server."""
        times = scoring_times(spans)
        slow = slow_servers(times)
        self._slow = {name: self._slow.get(name, 0) + 1 for name in slow}
        notes = []
        for name, count in self._slow.items():
            if count < self.patience or name in self._told:
                continue
            self._told.add(name)
            notes.append(
                f"{name} takes {times[name]:.3g} s for a batch, where the others of its pool take "
                f"{slow[name]:.3g} s: is its machine or GPU shared with something else? Others "
                "take over most of its work"
            )
        return notes


def scoring_times(spans: Iterable[Span]) -> dict[str, float]:
    """Server -> mean seconds of a batch of scoring."""
    found: dict[str, list[float]] = {}
    for span in spans:
        if span.phase == "score":
            found.setdefault(span.worker, []).append(span.seconds)
    return {name: statistics.fmean(seconds) for name, seconds in found.items()}


def slow_servers(times: Mapping[str, float]) -> dict[str, float]:
    """Servers that take more than `SLOW` times the median of the others of their pool, and more
    than `SLOW_FLOOR_S` -> that median."""
    found = {}
    for name, seconds in times.items():
        others = [t for n, t in times.items() if n != name and role_of(n) == role_of(name)]
        if others and seconds > SLOW_FLOOR_S:
            median = statistics.median(others)
            if seconds > SLOW * median:
                found[name] = median
    return found

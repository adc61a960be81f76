"""Guards: warn about, or stop, a run whose metrics have gone wrong.

A guard's state is its number of consecutive bad iterations, so a resumed run replays the metrics
it has recorded.
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
"""A reward server is slow if it takes this many times the median of its pool, ..."""
SLOW_FLOOR_S = 0.5
"""... and longer than this, which is more than the noise of a busy machine."""


@dataclass(frozen=True)
class Findings:
    """The guards' findings in one iteration."""

    metrics: dict[str, int]
    """Consecutive bad iterations of each guard, for the records."""
    notes: tuple[str, ...] = ()
    """Warnings; each once a run."""
    stop: str = ""
    """Why the run must stop, or empty."""

    def enforce(self) -> None:
        """Raises LearningError if the run must stop, with what to change."""
        if self.stop:
            raise LearningError(self.stop)


@dataclass
class Guards:
    """Checks the metrics of every iteration.

    Args:
        groups: of an iteration.
        one_policy: samplers draw from the learned policy (False under guidance 'distil').
    """

    config: GuardsConfig
    groups: int
    one_policy: bool = True
    _bad: dict[str, int] = field(default_factory=dict)
    _warned: set[str] = field(default_factory=set)

    def replay(self, history: Iterable[Mapping[str, Any]]) -> None:
        """Restore the state of a resumed run; warnings are not repeated, and nothing stops."""
        for metrics in history:
            self(metrics)

    def __call__(self, metrics: Mapping[str, Any]) -> Findings:
        """Check one iteration's metrics; None, as records have it, is a number that is not
        finite."""
        metrics = {name: number(value) for name, value in metrics.items()}
        config = self.config
        problems = {
            "reward_flat": (config.reward, self._reward(metrics)),
            "entropy_low": (config.entropy, self._entropy(metrics)),
            "kl_high": (config.kl, self._kl(metrics)),
        }
        notes, stop = [], ""
        for name, (action, problem) in problems.items():
            self._bad[name] = self._bad.get(name, 0) + 1 if problem else 0
            if self._bad[name] < config.patience or action == "off":
                continue
            text = f"for {self._bad[name]} iterations, {problem}"
            if action == "stop":
                stop = stop or f"iteration {metrics['iteration']}: {text}"
            elif name not in self._warned:
                self._warned.add(name)
                notes.append(f"iteration {metrics['iteration']}: {text}")
        streaks = {f"guards/{name}": count for name, count in self._bad.items()}
        return Findings(streaks, tuple(notes), stop)

    def _reward(self, metrics: Mapping[str, Any]) -> str:
        """The problem with the rewards, or empty; so for the others."""
        if metrics.get("groups/flat", 0) >= self.groups:
            return (
                "all rewards were equal within every group, so that nothing is learned: look at "
                "the scorers and at gallery/; a higher sampling.temperature, more "
                "rollouts_per_group or an entropy controller (--entropy.controller target) bring "
                "differences back"
            )
        least = self.config.min_reward_std
        flat = [
            key.removeprefix("reward_std/")
            for key, value in metrics.items()
            if key.startswith("reward_std/") and value <= least
        ]
        if not flat:
            return ""
        return (
            f"the reward {' and '.join(flat)} had the same value for every image (deviation at "
            f"most {least:g}), so that nothing is learned from it: is the scorer all right, or the "
            "reward at its maximum? Its weight can be set to 0"
        )

    def _entropy(self, metrics: Mapping[str, Any]) -> str:
        base, found = (
            metrics.get("policy/base_entropy", 0.0),
            metrics.get("policy/entropy", math.nan),
        )
        if not base > 0 or not found < self.config.min_entropy_share * base:
            return ""
        return (
            f"the policy's entropy has been below {self.config.min_entropy_share:g} of the base "
            f"policy's ({found:.3g} of {base:.3g} nats a token now): images become alike. Go on "
            "from an earlier checkpoint with a lower learner.lr, "
            "or start anew with --entropy.controller target, a loss.kl_coef, or more weight on "
            "rewards.loo_fid"
        )

    def _kl(self, metrics: Mapping[str, Any]) -> str:
        limits = {"reference_kl": self.config.max_reference_kl}
        if self.one_policy:
            limits["mismatch_kl"] = self.config.max_mismatch_kl
        # inf is not a divergence of policies: top-k that rounds differently gives it
        found = {name: metrics.get(f"policy/{name}", 0.0) for name in limits}
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
    """Warns about a reward server that is far slower than the others of its pool."""

    patience: int
    _slow: dict[str, int] = field(default_factory=dict)
    _warned: set[str] = field(default_factory=set)

    def __call__(self, spans: Iterable[Span]) -> list[str]:
        """Check one iteration's spans; returns warnings, one a server and run."""
        times = scoring_times(spans)
        slow = slow_servers(times)
        self._slow = {name: self._slow.get(name, 0) + 1 for name in slow}
        notes = []
        for name, count in self._slow.items():
            if count < self.patience or name in self._warned:
                continue
            self._warned.add(name)
            notes.append(
                f"{name} takes {times[name]:.3g} s for a batch, where the others of its pool take "
                f"{slow[name]:.3g} s: is its machine or GPU shared with something else? Others "
                "take over most of its work"
            )
        return notes


def scoring_times(spans: Iterable[Span]) -> dict[str, float]:
    """Server -> mean seconds of a scoring batch."""
    found: dict[str, list[float]] = {}
    for span in spans:
        if span.phase == "score":
            found.setdefault(span.worker, []).append(span.seconds)
    return {name: statistics.fmean(seconds) for name, seconds in found.items()}


def slow_servers(times: Mapping[str, float]) -> dict[str, float]:
    """Slow servers -> median time of the others of their pool."""
    found = {}
    for name, seconds in times.items():
        others = [t for n, t in times.items() if n != name and role_of(n) == role_of(name)]
        if others and seconds > SLOW_FLOOR_S:
            median = statistics.median(others)
            if seconds > SLOW * median:
                found[name] = median
    return found

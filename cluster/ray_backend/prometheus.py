"""A job's newest figures as metrics of Ray, which the agent of each node shows to Prometheus.

Ray puts `ray_` before the names. Its agents drop a value that is not set anew within 20 s, so all
are set at each exchange with the control actor, once a second.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.control.control_actor import FleetStatus
from cluster.spans import role_of

SINGLE = {
    "policy/entropy": ("tessera_entropy", "Mean token entropy of the policy, nats"),
    "policy/entropy_coef": ("tessera_entropy_coef", "Coefficient of the entropy in the loss"),
    "policy/reference_kl": ("tessera_reference_kl", "KL to the base policy, nats a token"),
    "policy/mismatch_kl": ("tessera_mismatch_kl", "KL of learner and samplers, nats a token"),
    "policy/clip_fraction": ("tessera_clip_fraction", "Share of clipped tokens"),
    "policy/staleness": ("tessera_staleness", "Age of the rollouts, versions of the policy"),
    "images/failed": ("tessera_images_failed", "Images of the iteration without a score"),
    "time/images_per_s": ("tessera_images_per_second", "Images per second"),
}
"""Metric of an iteration -> its name here, and what it is."""
FAMILIES = {
    "reward/": ("tessera_reward", "reward", "Mean of a reward over the iteration's images"),
    "fid/": ("tessera_fid", "figure", "FID in the reward's features, and what belongs to it"),
    "time/": ("tessera_phase_seconds", "phase", "Seconds of a phase, summed over workers"),
}
"""Prefix of such metrics -> name here, label with the rest of theirs, and what they are."""


@dataclass(frozen=True)
class Sample:
    """One value of a gauge."""

    name: str
    about: str
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)


def samples(status: FleetStatus) -> Iterator[Sample]:
    """What Prometheus is shown of a job. What is not measured, or not finite, is left out."""
    progress = status.progress
    unit = progress.unit
    yield Sample(f"tessera_{unit}s_done", f"Finished {unit}s", progress.done)
    if progress.iterations:
        yield Sample(f"tessera_{unit}s_planned", f"{unit}s of the whole job", progress.iterations)
    yield Sample("tessera_restarts", "Workers replaced so far", status.restarts)
    yield from _of_workers(status)
    for metric, value in progress.metrics.items():
        if isinstance(value, (int, float)) and math.isfinite(value):
            yield from _of_metric(metric, value)


def _of_workers(status: FleetStatus) -> Iterator[Sample]:
    name, about = "tessera_workers", "Workers of a role in a state"
    serving = [role_of(worker.name) for worker in status.singles if worker.state == "serving"]
    for role in dict.fromkeys(role_of(worker.name) for worker in status.singles):
        yield Sample(name, about, serving.count(role), {"role": role, "state": "serving"})
    for pool in status.pools:
        for state in ("serving", "starting", "draining"):
            yield Sample(name, about, getattr(pool, state), {"role": pool.role, "state": state})
        queued = pool.queued or 0
        yield Sample("tessera_queued", "Groups that wait for a worker", queued, {"role": pool.role})


def _of_metric(metric: str, value: float) -> Iterator[Sample]:
    if metric in SINGLE:
        name, about = SINGLE[metric]
        yield Sample(name, about, value)
        return
    for prefix, (name, label, about) in FAMILIES.items():
        if metric.startswith(prefix):
            yield Sample(name, about, value, {label: metric.removeprefix(prefix)})


class JobMetrics:
    """Sets Ray's gauges, each with the label `run`."""

    def __init__(self, run: str) -> None:
        self._run, self._gauges = run, dict[str, Any]()

    def report(self, status: FleetStatus) -> None:
        for sample in samples(status):
            labels = {"run": self._run, **sample.labels}
            self._gauge(sample, tuple(labels)).set(sample.value, labels)

    def _gauge(self, sample: Sample, labels: tuple[str, ...]) -> Any:
        if sample.name not in self._gauges:
            from ray.util.metrics import Gauge

            gauge = Gauge(sample.name, description=sample.about, tag_keys=labels)
            self._gauges[sample.name] = gauge
        return self._gauges[sample.name]

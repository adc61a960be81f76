"""What is done of a part, and how long the rest takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from learner.miniature.study.names import BASE
from learner.miniature.study.stages import Job, built, figures_of, read_record

NETWORKS_SECONDS = 100.0
POLICY_SECONDS = 4.0
"""CPU seconds of building a seed's networks, and of evaluating one policy."""


@dataclass(frozen=True)
class Line:
    """Work of one kind."""

    what: str
    count: int
    done: int
    seconds: float
    """CPU seconds of each."""


@dataclass(frozen=True)
class Plan:
    """All work of a part."""

    seeds: tuple[int, ...]
    lines: tuple[Line, ...]

    @property
    def seconds(self) -> float:
        """CPU seconds of what is left."""
        return sum((line.count - line.done) * line.seconds for line in self.lines)


def plan_of(jobs: Sequence[Job]) -> Plan:
    """The work of a part's jobs. An arm takes as long as those did that are done."""
    seeds = {job.seed: job for job in jobs}
    lines = [
        Line("networks of a seed", len(seeds), sum(map(built, seeds.values())), NETWORKS_SECONDS)
    ]
    records = {(job.arm.name, job.seed): read_record(job) for job in jobs if job.arm.name != BASE}
    usual = _seconds(records.values())
    for name in dict.fromkeys(name for name, _ in records):
        found = [record for (arm, _), record in records.items() if arm == name]
        seconds = median(_seconds(found) or usual or [jobs[0].part.seconds])
        lines.append(Line(f"training: {name}", len(found), sum(map(bool, found)), seconds))
    policies = [(job, policy) for job in jobs for policy in job.policies]
    done = sum(figures_of(job, policy) is not None for job, policy in policies)
    lines.append(Line("evaluations", len(policies), done, POLICY_SECONDS))
    return Plan(tuple(seeds), tuple(lines))


def _seconds(records: Iterable[Mapping[str, Any] | None]) -> list[float]:
    """CPU seconds of trained arms; adopted ones have none."""
    return [record["seconds"] for record in records if record and record["seconds"]]

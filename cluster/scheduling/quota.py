"""What the workers of one run may reserve together, of a cluster that several runs share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.errors import ConfigError
from cluster.roles import QuotaConfig

UNITS = 10_000  # of a CPU or GPU: how finely Ray counts them


@dataclass(frozen=True)
class Share:
    """What one worker reserves, or several together."""

    cpus: float = 0.0
    gpus: float = 0.0

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs and {self.gpus:g} GPUs"


@dataclass(frozen=True)
class RunQuota:
    """A run's quota, and what each of its workers counts for, by role."""

    config: QuotaConfig
    shares: Mapping[str, Share]

    def reserved(self, counts: Mapping[str, int]) -> Share:
        """What numbers of workers count for together."""
        pairs = [(self.shares.get(role, Share()), count) for role, count in counts.items()]
        cpus = sum(round(share.cpus * UNITS) * count for share, count in pairs)
        gpus = sum(round(share.gpus * UNITS) * count for share, count in pairs)
        return Share(cpus / UNITS, gpus / UNITS)

    def most(self, role: str, counts: Mapping[str, int]) -> int | None:
        """The most workers of a role beside the others; None: any number."""
        others = self.reserved({name: count for name, count in counts.items() if name != role})
        share = self.shares.get(role, Share())
        rooms = [
            (round(bound * UNITS) - round(taken * UNITS)) // each
            for bound, taken, each in (
                (self.config.cpus, others.cpus, round(share.cpus * UNITS)),
                (self.config.gpus, others.gpus, round(share.gpus * UNITS)),
            )
            if bound and each
        ]
        return max(min(rooms), 0) if rooms else None

    def refusal(self, role: str, count: int, counts: Mapping[str, int]) -> str:
        """Why a role may not have so many workers; empty: it may.

        Args:
            counts: workers of each role, those that are leaving included.
        """
        most = self.most(role, counts)
        if most is None or count <= max(most, counts.get(role, 0)):
            return ""
        wanted = self.reserved({**counts, role: count})
        return (
            f"{count} workers of {role} would take the run to {wanted}, and its quota is "
            f"{self.config}: {role} can have {most} beside the others (--quota.cpus and "
            "--quota.gpus set it, when the run starts or resumes)"
        )

    def check(self, counts: Mapping[str, int]) -> None:
        """Check what a run starts with.

        Raises:
            ConfigError: more than the quota.
        """
        total, bounds = self.reserved(counts), self.config
        over = [
            f"{taken:g} {what}s, more than quota.{what.lower()}s {bound:g}"
            for what, taken, bound in (
                ("CPU", total.cpus, bounds.cpus),
                ("GPU", total.gpus, bounds.gpus),
            )
            if bound and round(taken * UNITS) > round(bound * UNITS)
        ]
        if over:
            parts = [
                f"{role} {count} x {share}"
                for role, count in counts.items()
                if count and (share := self.shares.get(role, Share())) != Share()
            ]
            raise ConfigError(
                f"the run's workers would reserve {' and '.join(over)} ({'; '.join(parts)}): ask "
                "for fewer workers, lower num_cpus or num_gpus, or raise the quota"
            )

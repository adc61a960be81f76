"""What each worker reserves of the machine or cluster. Arithmetic alone, without Ray."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.errors import ConfigError
from cluster.roles import FleetPlan

SMALLEST_SHARE = 0.01


@dataclass(frozen=True)
class Placement:
    """What every worker of one role reserves."""

    role: str
    count: int
    num_cpus: float
    num_gpus: float
    device: str
    num_threads: int


def place(plan: FleetPlan, cpus: float, gpus: float) -> list[Placement]:
    """Compute the reservations of all roles, and check that they fit.

    Workers without `num_cpus` share what the others leave; there may be more workers than cores.

    Raises:
        ConfigError: more is asked for than there is.
    """
    fixed = sum(role.count * role.resources.num_cpus for role in plan.roles)
    sharing = sum(role.max_count for role in plan.roles if role.resources.num_cpus == 0)
    wanted_gpus = sum(role.count * role.resources.num_gpus for role in plan.roles)
    share = min(1.0, math.floor((cpus - fixed) / max(sharing, 1) * 100) / 100)
    if fixed > cpus or (sharing and share < SMALLEST_SHARE):
        asked = f"{fixed:g} CPUs are asked for by name, and " if fixed else ""
        raise ConfigError(
            f"the fleet does not fit {cpus:g} CPUs: {asked}{sharing} workers would share the rest, "
            f"less than {SMALLEST_SHARE:g} each; ask for fewer workers, or fewer CPUs by name"
        )
    if wanted_gpus > gpus:
        raise ConfigError(
            f"the fleet asks for {wanted_gpus:g} GPU{'s' * (wanted_gpus != 1)}, but there are "
            f"{gpus:g}: lower num_gpus "
            "(fractions share one GPU, 0 computes on the CPU) or the number of workers"
        )
    return [
        Placement(
            role.name,
            role.count,
            role.resources.num_cpus or share,
            role.resources.num_gpus,
            role.resources.device,
            role.resources.num_threads,
        )
        for role in plan.roles
    ]

"""Change the number of workers of a running job.

    python -m cluster.scale                          the workers
    python -m cluster.scale --reward-servers 6       of the only active run under runs/
    python -m cluster.scale --run NAME --samplers 8  of another one: a name, or its directory

New workers serve once they are ready; workers that leave finish their tasks first.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys

    from cluster.program.start import run_command

    sys.exit(run_command("cluster.scale"))

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import tyro

from cluster.control.control_actor import FleetStatus, RunConnection, RunSelection
from cluster.errors import FleetError
from cluster.program.console import REFUSED, exit_status
from cluster.program.invocation import command_of


@dataclass(frozen=True, kw_only=True)
class Arguments(RunSelection):
    """Change the number of workers of a running job; without a number, show the workers."""

    samplers: int | None = None
    """Number of samplers."""
    reward_servers: int | None = None
    """Number of reward servers of the main pool."""
    pool: Annotated[dict[str, int], tyro.conf.UseAppendAction] | None = None
    """Number of reward servers of a further pool: NAME NUMBER."""
    timeout_s: float = 300.0
    """Longest wait for the change, seconds."""

    def wanted(self) -> dict[str, int]:
        """Role -> number of its workers."""
        asked = {"sampler": self.samplers, "reward-server": self.reward_servers}
        named = {f"reward-{name}": count for name, count in (self.pool or {}).items()}
        return {role: count for role, count in (asked | named).items() if count is not None}


def scale(run: RunConnection, wanted: Mapping[str, int], timeout_s: float) -> FleetStatus:
    """Request numbers of workers, and wait until the run has them.

    Raises:
        FleetError: refused, or not carried out in time.
    """
    numbers = [run.call("scale", role, count) for role, count in wanted.items()]

    told: set[str] = set()

    def ready(status: FleetStatus) -> bool:
        for worker in (each for pool in status.pools for each in pool.workers):
            if worker.waits_for and worker.name not in told:
                told.add(worker.name)
                print(f"{worker.name} waits for room: {worker.waits_for}", file=sys.stderr)
        if refused := [why for number, why in status.refusals if number in numbers]:
            raise FleetError("; ".join(refused))
        return status.answered >= max(numbers) and settled(status, wanted)

    def too_late(status: FleetStatus) -> str:
        found = "; ".join(lines(status)) if status.answered else "the run did not answer"
        return (
            f"not carried out within {timeout_s:g} s: {found}. A run reads requests while it waits "
            "for groups; new workers wait for free CPUs and GPUs"
        )

    return run.await_status(ready, timeout_s, too_late)


def settled(status: FleetStatus, wanted: Mapping[str, int]) -> bool:
    """Whether the target numbers serve, and no worker starts or leaves."""
    pools = [status.pool(role) for role in wanted]
    return all(
        pool is not None and (pool.serving, pool.starting, pool.draining) == (pool.wanted, 0, 0)
        for pool in pools
    )


def lines(status: FleetStatus) -> list[str]:
    """One line for each role."""
    return [
        f"{pool.role}: {pool.serving} serving, {pool.starting} starting, {pool.draining} leaving, "
        f"{pool.queued} waiting for one"
        for pool in status.pools
    ]


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    asked = tyro.cli(Arguments, args=arguments, prog=command_of("cluster.scale"))
    wanted = asked.wanted()
    for role, count in wanted.items():
        if count < 1:
            print(f"error: {role} needs at least 1 worker, found {count}", file=sys.stderr)
            return REFUSED

    def work() -> None:
        with asked.connect() as run:
            if wanted:
                run.check_meant(asked.run)
            status = scale(run, wanted, asked.timeout_s) if wanted else run.status()
            print("\n".join([f"run {run.name}", *lines(status)]))

    return exit_status(work)

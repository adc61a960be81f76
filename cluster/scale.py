"""Change the number of workers of a running job.

    python -m cluster.scale                          what there is
    python -m cluster.scale --reward-servers 6       of the newest run under runs/
    python -m cluster.scale --run NAME --samplers 8  of another one: a name, or its directory

New workers serve once they are warm; those that leave finish what they have in hand.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys

    from cluster.program.start import run_command

    sys.exit(run_command("cluster.scale"))

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from cluster.control.control_actor import FleetStatus, RunSelection, connect_to_run, control_answer
from cluster.control.discovery import find_run
from cluster.errors import FleetError
from cluster.program.console import REFUSED, exit_status
from cluster.program.invocation import command_of

POLL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Arguments(RunSelection):
    """Change the number of workers of a running job; without a number, show what there is."""

    samplers: int | None = None
    """Samplers that there are to be."""
    reward_servers: int | None = None
    """Reward servers of the main pool that there are to be."""
    pool: Annotated[dict[str, int], tyro.conf.UseAppendAction] | None = None
    """Reward servers of further pools that there are to be: NAME NUMBER."""
    timeout_s: float = 300.0
    """Longest wait for the change to be carried out, seconds."""

    def wanted(self) -> dict[str, int]:
        """Role -> number of its workers."""
        asked = {"sampler": self.samplers, "reward-server": self.reward_servers}
        named = {f"reward-{name}": count for name, count in (self.pool or {}).items()}
        return {role: count for role, count in (asked | named).items() if count is not None}


def scale(control: Any, wanted: Mapping[str, int], timeout_s: float) -> FleetStatus:
    """Ask a run for numbers of workers, and wait until it has them.

    Raises:
        FleetError: refused, or not carried out in time.
    """
    numbers = [control_answer(control.scale.remote(role, count)) for role, count in wanted.items()]
    deadline = time.monotonic() + timeout_s
    while True:
        status: FleetStatus = control_answer(control.status.remote())
        refused = [why for number, why in status.refusals if number in numbers]
        if refused:
            raise FleetError("; ".join(refused))
        if status.answered >= max(numbers) and settled(status, wanted):
            return status
        if time.monotonic() > deadline:
            raise FleetError(
                f"not carried out within {timeout_s:g} s: "
                + ("; ".join(lines(status)) if status.answered else "the run did not answer")
                + ". A run looks for requests while it waits for groups; new workers wait for free "
                "CPUs and GPUs"
            )
        time.sleep(POLL_S)


def settled(status: FleetStatus, wanted: Mapping[str, int]) -> bool:
    """Whether as many serve as were asked for, and none starts or leaves."""
    pools = [status.pool(role) for role in wanted]
    return all(
        pool is not None and (pool.serving, pool.starting, pool.draining) == (pool.wanted, 0, 0)
        for pool in pools
    )


def lines(status: FleetStatus) -> list[str]:
    """One a role."""
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
        with connect_to_run(find_run(asked.run, asked.address)) as run:
            if wanted:
                status = scale(run.control, wanted, asked.timeout_s)
            else:
                status = control_answer(run.control.status.remote())
            print("\n".join([f"run {run.name}", *lines(status)]))

    return exit_status(work)

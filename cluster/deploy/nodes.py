"""Nodes of a Ray cluster with what is free of each, or a wait until there are enough of them.

python -m cluster.deploy.nodes                            of the cluster that runs here
python -m cluster.deploy.nodes --address 10.0.0.1:6379    of another one
python -m cluster.deploy.nodes --wait 4 --within 300      returns once there are four
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys

    from cluster.program.start import run_command

    sys.exit(run_command("cluster.deploy.nodes"))

import time
from dataclasses import dataclass

import tyro

from cluster.errors import FleetError
from cluster.placement.nodes import Node
from cluster.program.console import exit_status
from cluster.program.invocation import command_of
from cluster.ray_session.address import AUTO
from cluster.ray_session.session import RayConfig, free_nodes

POLL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """List the nodes of a Ray cluster."""

    address: str = AUTO
    """Its address, host:port; auto: $RAY_ADDRESS, or the cluster that has a node here."""
    wait: int = 0
    """Number of nodes to wait for."""
    within: float = 300.0
    """Longest wait, seconds."""

    def __post_init__(self) -> None:
        if self.wait < 0:
            raise ValueError(f"wait must be a number of nodes, >= 0, found {self.wait}")
        if not 0 <= self.within < 1e6:
            raise ValueError(f"within must be seconds, >= 0, found {self.within}")


def wait_for_nodes(address: str, number: int, within_s: float) -> list[Node]:
    """The nodes of a cluster, once there are enough of them.

    Raises:
        ConfigError, FleetError: no such cluster answers, or too few nodes joined in time.
    """
    deadline = time.monotonic() + within_s
    while True:
        nodes = free_nodes(RayConfig(address=address))
        if len(nodes) >= number:
            return nodes
        if time.monotonic() >= deadline:
            raise FleetError(
                f"{len(nodes)} of {number} nodes joined within {within_s:g} s: "
                f"{', '.join(node.name for node in nodes)}. On the others the output of `ray "
                "start` says why; most often the token differs, or a port is closed"
            )
        time.sleep(POLL_S)


def table(nodes: list[Node]) -> str:
    """A line for each node."""
    return "\n".join(
        f"{node.name:<40} free: {node.cpus:g} CPUs, {node.gpus:g} GPUs" for node in nodes
    )


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    asked = tyro.cli(Arguments, args=arguments, prog=command_of("cluster.deploy.nodes"))
    return exit_status(
        lambda: print(table(wait_for_nodes(asked.address, asked.wait, asked.within)))
    )

"""Starts the actors of a fleet."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster.io.paths import in_ray_package
from cluster.program.gpu_memory import limited_to_share
from cluster.program.invocation import current
from cluster.program.secrets import secret_variables, with_environment
from cluster.program.signals import ignoring_signals
from cluster.ray_backend import heartbeat
from cluster.ray_session import backend
from cluster.ray_session.backend import Nodes
from cluster.ray_session.private import started
from cluster.roles import FleetPlan, Role
from cluster.scheduling.placement import place, quota_of
from cluster.scheduling.pool import Worker

logger = logging.getLogger(__name__)


def actor_class(factory: Callable[..., Any], groups: Mapping[str, int]) -> Any:
    """Ray's actor class of a role.

    Args:
        groups: concurrency group -> number of threads.
    """
    options: dict[str, Any] = {"concurrency_groups": dict(groups)}
    return backend.actor_class(factory, options)


WrapClass = Callable[..., Any]
"""(class, concurrency groups) -> Ray's actor class."""


class Launcher:
    """Starts workers where the plan places them.

    Args:
        plan: has the roles; what they reserve is settled now.
    """

    def __init__(self, plan: FleetPlan, session: Nodes) -> None:
        self._session = session
        # A cluster that was joined starts its workers where `ray start` was called: relative paths
        # would lead elsewhere than here. Those of a job have its package on every node.
        here = Path.cwd()
        self._directory = str(here) if session.joined and not in_ray_package(here) else ""
        placement = place(plan, session.nodes)
        if placement.note:
            logger.warning("note: %s", placement.note)
        self.placements = {p.role: p for p in placement.roles}
        self.quota = quota_of(plan, placement.roles)

    def __call__(
        self,
        role: Role,
        index: int,
        wrap: WrapClass,
        threads: Mapping[str, int],
        *,
        addition: bool = False,
        late: bool = False,
    ) -> Worker:
        """Start one worker, without waiting for it.

        Args:
            threads: of concurrency groups, beside the one that answers in order.
            addition: beyond what the run began with.
            late: the run cannot go on without it, and what its predecessor had reserved may be gone
                with its machine: an equal share of the CPUs is then not waited for.
        """
        placement = self.placements[role.name]
        cpus = placement.num_cpus
        shares = not role.resources.num_cpus
        if shares and (late or (addition and self._session.free_cpus < cpus)):
            cpus = 0  # its share was of what others have reserved by now; it takes turns with them
        options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": placement.num_gpus}
        if role.concurrency > 1:
            options["max_concurrency"] = role.concurrency
        environment, secrets = secret_variables(role.runtime_env or {})
        if environment:
            options["runtime_env"] = environment
        variables = {**role.environment, **secrets}
        limited = limited_to_share(role.factory, placement.num_gpus)
        factory = ignoring_signals(with_environment(limited, variables, current(), self._directory))
        actor = wrap(factory, {heartbeat.GROUP: 1, **threads}).options(**options)
        handle = actor.remote(role.config, name=role.worker_name(index))
        return Worker(role, index, handle, started(handle), addition)

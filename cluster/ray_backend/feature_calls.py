"""Calls of reward servers beside groups: features of real images, a network's fingerprint.

Any server that runs the panel's network answers; another one, if it is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from ray.exceptions import RayActorError

from cluster import clock
from cluster.errors import FleetError
from cluster.fleet import join_features
from cluster.ray_backend.supervisor import Supervisor
from cluster.ray_session.calls import RemoteRole, why_lost
from cluster.roles import FleetPlan, Pictures
from cluster.scheduling.listening import Listening
from cluster.scheduling.pool import State, Worker, WorkerPool


class FeatureCalls:
    """Calls of any server of a pool, repeated when it is lost.

    Args:
        servers: pools of reward servers by name.
        wait: waits for an answer, and serves the fleet meanwhile: (reference, name of the call,
            longest wait) -> value.
        poll: serves the fleet for a moment.
        stop_if_requested: raises StopRequestedError if a stop is.
    """

    def __init__(
        self,
        plan: FleetPlan,
        servers: Mapping[str, WorkerPool],
        supervisor: Supervisor,
        listening: Listening,
        wait: Callable[[Any, str, float], Any],
        poll: Callable[[], object],
        stop_if_requested: Callable[[], None],
    ) -> None:
        self._plan, self._servers, self._supervisor = plan, servers, supervisor
        self._listening, self._wait, self._poll = listening, wait, poll
        self._stop_if_requested = stop_if_requested

    def features(self, batches: Iterable[Pictures], panel: str) -> dict[str, np.ndarray]:
        """See `cluster.fleet.Fleet`."""
        parts = []
        for batch in batches:
            self._stop_if_requested()
            parts.append(self.ask(panel, "features", batch, panel))
        return join_features(parts)

    def ask(self, panel: str, method: str, *args: Any) -> Any:
        """Call a method of any server that has a panel's feature network.

        Raises:
            StopRequestedError: a stop was requested while no server was ready.
            FleetError: no server is ready in time.
        """
        pool = self._servers[self._plan.feature_server(panel).name]
        while True:
            worker = self._someone(pool)
            remote = RemoteRole(worker.handle, worker.name, self._plan.timeout_s, self._wait)
            try:
                return getattr(remote, method)(*args)
            except RayActorError as error:
                self._supervisor.lost(pool, worker, why_lost(error))

    def _someone(self, pool: WorkerPool) -> Worker:
        """One that serves, once there is one."""
        began = clock.monotonic()
        while not pool.of(State.SERVING):
            self._stop_if_requested()
            if self._listening.silence(began) > self._plan.timeout_s:
                raise FleetError(
                    f"no {pool.role.name} was ready within {self._plan.timeout_s:g} s: is the "
                    "cluster short of CPUs or GPUs? (--timeout-s sets the bound)"
                )
            self._poll()
        return pool.of(State.SERVING)[0]

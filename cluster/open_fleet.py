"""Opens the fleet of a plan, in this process or on Ray: for runs and for evaluations."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.control.discovery import discovery_file
from cluster.fleet import Fleet, InlineFleet
from cluster.io.run_layout import DISCOVERY_FILE
from cluster.io.user_files import record_run
from cluster.program.signals import StopFlag
from cluster.ray_session.object_store import StoreNeed, check_store, explain_store_full
from cluster.ray_session.session import RayConfig, RaySession
from cluster.roles import FleetPlan

logger = logging.getLogger(__name__)


@contextmanager
def open_fleet(
    plan: FleetPlan,
    need: StoreNeed,
    directory: Path,
    should_stop: StopFlag,
    ray: RayConfig | None,
    again: str = "",
) -> Iterator[Fleet]:
    """A fleet, closed at the end of the block.

    Args:
        need: most that the object store will hold.
        directory: of the job's results, after which it is named. On Ray, a discovery file in it
            tells other commands (`cluster.status`, `cluster.scale`, `cluster.stop`) how to reach
            the fleet while the block runs.
        ray: None: every role in this process.
        again: shell command that continues the job after a stop or a kill, where that is not
            `learner.run --resume`.

    Raises:
        ConfigError: the fleet does not fit the cluster.
        FleetError: a worker cannot start, or the object store is too small.
    """
    if ray is None:
        (directory / DISCOVERY_FILE).unlink(missing_ok=True)  # of a job on Ray that was killed
        record_run(directory)
        with InlineFleet(plan, should_stop) as inline:
            yield inline
        return
    from cluster.ray_backend.fleet import RayFleet

    with (
        discovery_file(directory, again) as announce,
        RaySession(ray) as session,
        explain_store_full(need, session.object_store),
    ):
        if session.joined and not session.guarded:
            logger.warning(
                "note: the cluster asks for no token: anyone who reaches it can run code "
                "on it (start its nodes with RAY_AUTH_MODE=token)"
            )
        if note := check_store(need, session.object_store):
            logger.warning(f"note: {note}")
        name, ask = directory.name, should_stop.ask
        with RayFleet(plan, session, should_stop, run=name, ask_to_stop=ask) as fleet:
            announce(session.address)
            yield fleet

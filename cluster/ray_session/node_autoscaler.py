"""Asking Ray's autoscaler, where a cluster has one, for the nodes that a fleet needs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cluster import clock
from cluster.placement.nodes import Request
from cluster.placement.refusal import NoRoomError
from cluster.ray_session import private
from cluster.ray_session.backend import Nodes
from cluster.roles import FleetPlan
from cluster.scheduling.placement import FleetPlacement, gangs_of, place

logger = logging.getLogger(__name__)

LOOK_S, SAY_S = 2.0, 30.0  # between two looks at the nodes, and between two lines on the console


def place_with_autoscaler(plan: FleetPlan, session: Nodes) -> FleetPlacement:
    """Place a fleet; if it does not fit, have the autoscaler start nodes, and wait for them.

    Raises:
        NoRoomError: it does not fit, and there is no autoscaler, or it did not start what is
            needed in time.
    """
    asked = plan.placement
    try:
        return place(plan, session.nodes)
    except NoRoomError as error:
        if not (session.joined and asked.autoscale and private.autoscaler().found):
            raise
        logger.warning(
            "%s\nasking the cluster's autoscaler for nodes, and waiting at most %g s "
            "(--placement.autoscale-wait-s)",
            error,
            asked.autoscale_wait_s,
        )
    requests = [request for gang in gangs_of(plan, 1.0) for request in gang]
    with _requested(requests, session):
        return _wait(plan, session, asked.autoscale_wait_s)


def _wait(plan: FleetPlan, session: Nodes, wait_s: float) -> FleetPlacement:
    began = said = clock.monotonic()
    while True:
        clock.sleep(LOOK_S)
        nodes, now = session.nodes, clock.monotonic()
        try:
            return place(plan, nodes)
        except NoRoomError as error:
            if private.autoscaler().infeasible:
                raise NoRoomError(
                    f"{error}\nthe autoscaler has no type of node that would hold it"
                ) from None
            if now - began > wait_s:
                raise NoRoomError(
                    f"{error}\nthe autoscaler was asked for nodes {wait_s:g} s ago, and has not "
                    "started enough of them: its types of nodes (sizes, labels, most workers), or "
                    "the cloud's quota, may not allow more; --placement.autoscale-wait-s waits "
                    "longer"
                ) from None
        if now - said > SAY_S:
            said = now
            there = f"{len(nodes)} node{'s' * (len(nodes) != 1)}"
            logger.info("waiting for the autoscaler for %.0f s: %s so far", now - began, there)


@contextmanager
def _requested(requests: Sequence[Request], session: Nodes) -> Iterator[None]:
    """Have the cluster be large enough for some workers beside what it does already, until the end
    of the block. (Ray counts the request against whole nodes, not against what is free.)"""
    in_use = [used for node in session.nodes if (used := node.used)]
    bundles = [*(request.bundle for request in requests), *map(dict, in_use)]
    selectors = [dict(request.labels) for request in requests] + [{} for _ in in_use]
    private.request_nodes(bundles, selectors)
    try:
        yield
    finally:
        private.request_nodes([], [])

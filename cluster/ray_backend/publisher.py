"""How a snapshot travels from the learner to a sampler.

The learner returns it from a method, so that the driver owns it and it outlives the learner (with
`ray.put` it would be lost with the learner). It is stored once on the learner's node, and copied
once to each other node that asks for it: by the object store, or before that by a broadcast group
(`collective.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.ray_backend import collective, heartbeat
from cluster.ray_backend.collective import RECEIVE, Ticket
from cluster.ray_backend.transports import COLLECTIVE, OBJECT_STORE, over_nccl, why_not
from cluster.ray_session import backend
from cluster.ray_session.private import actor_id, call_inside, living_actors
from cluster.roles import FleetPlan

logger = logging.getLogger(__name__)

MOST_FAILURES = 2  # in succession of the same members, before the object store is used for good


@dataclass(frozen=True)
class Published:
    """References to one version of the weights."""

    snapshot: ray.ObjectRef
    """In the object store."""
    base: ray.ObjectRef | None = None
    """Full snapshot that `snapshot` builds upon."""
    number: int = 0
    """Of the broadcast that brings it to `members`; 0: none does."""
    members: tuple[Any, ...] = ()


class Publisher:
    """Has the learner publish its weights, and samplers load them.

    Args:
        transport: "object-store" or "collective".
        nccl: the broadcast group sends from GPU to GPU.
        adapters_alone: the learner trains adapters: the frozen weights travel once, and then the
            adapters of each version.
        timeout_s: longest wait of a sampler for a broadcast that is under way.
    """

    def __init__(
        self,
        transport: str,
        *,
        nccl: bool = False,
        adapters_alone: bool = False,
        timeout_s: float = 600.0,
    ) -> None:
        self._collective, self._nccl = transport == COLLECTIVE, nccl
        self._adapters_alone, self._timeout_s = adapters_alone, timeout_s
        self._learners: Sequence[Any] = ()
        self._members: tuple[Any, ...] = ()  # samplers of the present group
        self._ranked: Sequence[Any] = ()  # the same, by rank
        self._failed: tuple[Any, ...] = ()  # of the group that failed last
        self._group = self._number = self._failures = 0
        self._address: ray.ObjectRef | None = None
        self._pending: list[ray.ObjectRef] = []  # answers to the last broadcasts
        self._base: ray.ObjectRef | None = None

    def actor_class(self, factory: Callable[..., Any], groups: Mapping[str, int]) -> Any:
        """Ray's actor class of a sampler.

        Args:
            groups: its concurrency groups, and the threads of each.
        """
        receiving = {RECEIVE: 1} if self._collective else {}
        options: dict[str, Any] = {"concurrency_groups": {**groups, **receiving}}
        return backend.actor_class(factory, options)

    def forget(self) -> None:
        """The learner was replaced: drop its base and group."""
        self._leave(*self._members)
        self._base = None

    def publish(self, learners: Sequence[Any], samplers: Sequence[Any] = ()) -> Published:
        """Request the learners' weights, without waiting.

        Args:
            learners: actor handles; the first one's answer is the snapshot.
            samplers: that serve now, for the broadcast group.
        """
        self._learners = learners
        if self._adapters_alone:
            self._base = self._base or self._asked("base_snapshot")
            return Published(self._asked("adapter_snapshot"), self._base)
        self.look()
        if self._collective and samplers:
            return self._broadcast(tuple(samplers))
        return Published(self._asked("snapshot"))

    def load(self, sampler: Any, weights: Published) -> ray.ObjectRef:
        """Have a sampler (an actor handle) load weights, with their base if there is one."""
        if weights.number and sampler in weights.members:
            wait_s = self._timeout_s / 2  # it then has time for the object store
            return call_inside(sampler, collective.load, weights.number, wait_s, [weights.snapshot])
        base = [] if weights.base is None else [weights.base]
        return sampler.load_weights.remote(weights.snapshot, *base)

    def look(self) -> None:
        """Take the answers that are there to the last broadcasts. After a failure the others leave
        the group at once, and the next broadcast forms a new one."""
        if not self._pending:
            return
        ready, self._pending = backend.ready(self._pending, fetch_local=False)
        reasons = [reason for reason in map(_failure, ready) if reason]
        if reasons:
            self._disband(reasons[0])
        elif not self._pending:
            self._failures = 0

    def _asked(self, method: str) -> ray.ObjectRef:
        """Call all learners, since each may have a shard; the first returns the whole."""
        answers = [getattr(learner, method).remote() for learner in self._learners]
        return answers[0]

    def _broadcast(self, samplers: tuple[Any, ...]) -> Published:
        """Have learner and samplers take part in a broadcast, without waiting."""
        first, *others = self._learners
        if samplers != self._members:
            if self._members:
                self._leave(first, *self._members)
            self._members, self._ranked = samplers, _by_node(first, samplers)
            self._group += 1
            self._address = call_inside(first, collective.open_rendezvous)
            logger.info(
                "weights: a broadcast group of the learner and %d sampler%s, over %s",
                len(samplers),
                "s" * (len(samplers) != 1),
                "NCCL" if self._nccl else "gloo",
            )
        self._number += 1
        tickets = [
            Ticket(self._group, self._number, rank, len(samplers) + 1, self._nccl)
            for rank in range(len(samplers) + 1)
        ]
        snapshot, sent = call_inside(
            first, collective.send, tickets[0], self._address, num_returns=2
        )
        for learner in others:
            learner.snapshot.remote()
        self._pending += [
            sent,
            *(
                call_inside(sampler, collective.receive, ticket, self._address, group=RECEIVE)
                for sampler, ticket in zip(self._ranked, tickets[1:])
            ),
        ]
        return Published(snapshot, number=self._number, members=samplers)

    def _disband(self, reason: str) -> None:
        if self._members != self._failed:  # without the one that was lost, it may well go on
            self._failures = 0
        self._failures += 1
        self._failed = self._members
        self._collective = self._failures < MOST_FAILURES
        self._leave(self._learners[0], *self._members)
        then = "and the next one forms a new group"
        if not self._collective:
            then = f"as all later ones: that was {self._failures} times in succession"
        logger.warning(
            "weights: broadcast %d failed (%s): samplers load these weights from the object store, "
            "%s",
            self._number,
            reason,
            then,
        )

    def _leave(self, *handles: Any) -> None:
        """Disband the present group. What its members still wait for ends now, so that they are
        free for the next one, and is not counted against that."""
        for handle in handles:
            call_inside(handle, collective.leave, self._group, group=heartbeat.GROUP)
        self._members, self._pending = (), []


def _by_node(learner: Any, samplers: Sequence[Any]) -> Sequence[Any]:
    """Samplers of the learner's node first, then node by node: most of gloo's tree, whose far
    edges come first, then stays within nodes."""
    found = {actor: about["node"] for actor, about in living_actors().items()}
    home = found.get(actor_id(learner), "")
    nodes = [found.get(actor_id(sampler), "") for sampler in samplers]
    order = sorted(range(len(samplers)), key=lambda i: (nodes[i] != home, nodes[i]))
    return [samplers[index] for index in order]


def _failure(answered: ray.ObjectRef) -> str:
    """Why a member's part in a broadcast failed; empty: it did not."""
    try:
        return str(backend.get(answered))
    except RayError as error:
        return f"a member was lost: {type(error).__name__}"


def publisher_of(plan: FleetPlan) -> Publisher:
    """A publisher with the plan's transport, or the object store if that cannot run (logged)."""
    transport = plan.transport
    if transport == "nccl":
        logger.warning("weights.transport nccl is called %s now", COLLECTIVE)
        transport = COLLECTIVE
    if transport == COLLECTIVE and (reason := why_not(plan)):
        logger.warning(
            "weights.transport %s cannot run, going on with %s: %s", transport, OBJECT_STORE, reason
        )
        transport = OBJECT_STORE
    return Publisher(
        transport,
        nccl=over_nccl(plan),
        adapters_alone=plan.adapters_alone,
        timeout_s=plan.timeout_s,
    )

"""How a snapshot travels from the learner to a sampler.

The learner returns it from a method, so that the driver owns it and it outlives the learner (with
`ray.put` it would be lost with the learner). It is stored once on the learner's node, and copied
once to each other node that asks for it: by the object store, or before that by a broadcast group
(`collective.py`). With samplers on other nodes it travels in pieces, which each node passes
on to the next while later ones arrive (`relays/relay.py`), since the learner's link would carry
them once for every node.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.ray_backend import collective, heartbeat
from cluster.ray_backend.collective import RECEIVE, Ticket
from cluster.ray_backend.relays import relay
from cluster.ray_backend.transports import COLLECTIVE, OBJECT_STORE, over_nccl, why_not
from cluster.ray_session import backend
from cluster.ray_session.private import call_inside
from cluster.roles import FleetPlan

logger = logging.getLogger(__name__)

MOST_FAILURES = 2  # in succession of the same members, before the object store is used for good


@dataclass(frozen=True)
class Published:
    """References to one version of the weights."""

    snapshot: ray.ObjectRef
    """In the object store; without its buffer, if that is in pieces."""
    base: ray.ObjectRef | None = None
    """Full snapshot that `snapshot` builds upon."""
    number: int = 0
    """Of the broadcast that brings it to `members`; 0: none does."""
    members: tuple[Any, ...] = ()
    pieces: tuple[ray.ObjectRef, ...] = ()
    """Of the buffer, on the learner's node."""
    copies: Mapping[str, tuple[ray.ObjectRef, ...]] = field(default_factory=dict)
    """Node -> the copies of the pieces that are nearest to it."""


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
        self._nodes: dict[Any, str] = {}  # of handles
        self._size: ray.ObjectRef | None = None  # of a snapshot, bytes

    def actor_class(self, factory: Callable[..., Any], groups: Mapping[str, int]) -> Any:
        """Ray's actor class of a sampler.

        Args:
            groups: its concurrency groups, and the threads of each.
        """
        options: dict[str, Any] = {"concurrency_groups": {**groups, RECEIVE: 1}}
        return backend.actor_class(factory, options)

    def forget(self) -> None:
        """The learner was replaced: drop its base and group."""
        self._leave(*self._members)
        self._base = self._size = None

    def publish(self, learners: Sequence[Any], samplers: Sequence[Any] = ()) -> Published:
        """Request the learners' weights, without waiting.

        Args:
            learners: actor handles; the first one's answer is the snapshot.
            samplers: that serve now, and may pass the weights on.
        """
        self._learners = learners
        if self._adapters_alone:
            self._base = self._base or self._asked("base_snapshot")
            return Published(self._asked("adapter_snapshot"), self._base)
        self.look()
        if self._collective and samplers:
            return self._broadcast(tuple(samplers))
        return self._stored(samplers)

    def load(self, sampler: Any, weights: Published) -> ray.ObjectRef:
        """Have a sampler (an actor handle) load weights, with their base if there is one."""
        if weights.number and sampler in weights.members:
            wait_s = self._timeout_s / 2  # it then has time for the object store
            return call_inside(sampler, collective.load, weights.number, wait_s, [weights.snapshot])
        if weights.pieces:
            copies = weights.copies.get(self._nodes.get(sampler, ""), ())
            refs = [weights.snapshot], list(copies), list(weights.pieces)
            return call_inside(sampler, relay.load, *refs)
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

    def _stored(self, samplers: Sequence[Any]) -> Published:
        """Have the weights put into the object store: in pieces, which other nodes pass on, if
        there are any and a snapshot is large. Its size is known after the first one."""
        first, *others = self._learners
        self._look_for([first, *samplers])
        passing = chain(self._nodes[first], ((self._nodes[each], each) for each in samplers))
        count = relay.pieces_of(self._known_size()) if passing else 1
        if count == 1:
            return Published(self._asked("snapshot"))
        snapshot, self._size = call_inside(first, relay.pack, count, num_returns=2)
        pieces = nearest = tuple(call_inside(first, relay.piece) for _ in range(count))
        for learner in others:
            learner.snapshot.remote()
        copies = {}
        for node, sampler in passing[:-1]:
            nearest = copies[node] = tuple(
                call_inside(
                    sampler, relay.pass_on, [*nearest[at : at + relay.WINDOW]], group=RECEIVE
                )
                for at in range(count)
            )
        copies[passing[-1][0]] = nearest  # its samplers fetch them, once for all of the node
        return Published(snapshot, pieces=pieces, copies=copies)

    def _known_size(self) -> int:
        """Bytes of a snapshot; 0: not known yet."""
        if self._size is None or not backend.ready([self._size])[0]:
            return 0
        try:
            return int(backend.get(self._size))
        except RayError:  # the learner was lost
            return 0

    def _look_for(self, actors: Sequence[Any]) -> None:
        """Find the nodes of actors; Ray is asked if there is a new one."""
        if any(not self._nodes.get(actor) for actor in actors):
            self._nodes = dict(zip(actors, backend.nodes_of(actors)))

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


def chain(home: str, samplers: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The nodes by which weights are passed on, in order, each with the sampler that does it.

    Args:
        home: the learner's node, which has them.
        samplers: node and handle of each.
    """
    first: dict[str, Any] = {}
    for node, sampler in samplers:
        if node and node != home:
            first.setdefault(node, sampler)
    return sorted(first.items(), key=lambda item: item[0])


def _by_node(learner: Any, samplers: Sequence[Any]) -> Sequence[Any]:
    """Samplers of the learner's node first, then node by node: most of gloo's tree, whose far
    edges come first, then stays within nodes."""
    home, *nodes = backend.nodes_of([learner, *samplers])
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

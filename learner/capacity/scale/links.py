"""Bytes of an iteration over each host's link and in its object store, computed.

An object crosses a link once a host, however many workers of the host read it. The driver is on the
first host.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.ray_session.object_store import SNAPSHOTS
from learner.capacity.service_times import NUMBERS, ServiceTimes

ANSWERS = 2  # times that rollouts travel: to the driver, and back with the call for their images
BATCH = 8  # bytes a token of a learner's batch: its number and its logprob


@dataclass(frozen=True, kw_only=True)
class Host:
    """The workers on a host."""

    samplers: int = 0
    servers: Mapping[str, int] = field(default_factory=dict)
    """Pool of reward servers, by its role's name -> servers."""
    learners: int = 0


@dataclass(frozen=True, kw_only=True)
class Messages:
    """Bytes of what an iteration sends."""

    groups: int
    images: float
    """A group's images."""
    rollouts: float
    """A group's tokens, logprobs, entropies."""
    scores: float
    """A group's scores and features, of all pools."""
    snapshot: float
    """Of one version of the weights."""
    gradients: float = 0.0
    """Over each link that joins learners, both ways each."""

    @classmethod
    def of(cls, times: ServiceTimes, groups: int, scores: float, gradients: float = 0) -> Messages:
        return cls(
            groups=groups,
            images=times.image_bytes,
            rollouts=times.rollout_bytes,
            scores=scores,
            snapshot=times.snapshot_bytes,
            gradients=gradients,
        )


@dataclass(frozen=True)
class Traffic:
    """Bytes of an iteration over the links, of one kind of message."""

    sent: float
    """By the host that sends most."""
    received: float
    """By the host that receives most."""
    total: float
    """Over all links, each byte once."""

    @property
    def busiest(self) -> float:
        """One way over one link; links are full duplex."""
        return max(self.sent, self.received)


def traffic(hosts: Sequence[Host], messages: Messages) -> dict[str, Traffic]:
    """Bytes over the links by kind: images, rollouts, weights, gradients. Nothing of one host's own
    crosses its link."""
    samplers = sum(host.samplers for host in hosts)
    drawn = [messages.groups * host.samplers / samplers for host in hosts]
    return {
        "images": _images(hosts, drawn, messages),
        "rollouts": _rollouts(hosts, drawn, messages),
        "weights": _weights(hosts, messages),
        "gradients": _gradients(hosts, messages),
    }


def _images(hosts: Sequence[Host], drawn: Sequence[float], messages: Messages) -> Traffic:
    """From the host that drew a group to those of its reward servers, which may be any."""
    pools = sorted({name for host in hosts for name in host.servers})
    counts = {pool: sum(host.servers.get(pool, 0) for host in hosts) for pool in pools}
    asked = [  # share of all groups that a host's servers read; several pools read one copy
        1 - math.prod(1 - host.servers.get(pool, 0) / counts[pool] for pool in pools)
        for host in hosts
    ]
    copies, every = sum(asked), sum(drawn)
    sent = [groups * (copies - own) * messages.images for groups, own in zip(drawn, asked)]
    received = [own * (every - groups) * messages.images for groups, own in zip(drawn, asked)]
    return Traffic(max(sent), max(received), sum(sent))


def _rollouts(hosts: Sequence[Host], drawn: Sequence[float], messages: Messages) -> Traffic:
    """Between the driver and the others: rollouts, scores, the learners' batch."""
    there = sum(drawn[1:])
    count = sum(sum(host.servers.values()) for host in hosts)
    scored = sum(sum(host.servers.values()) for host in hosts[1:]) / count if count else 0.0
    batch = messages.groups * messages.rollouts * BATCH / NUMBERS
    others = sum(1 for host in hosts[1:] if host.learners)
    sent = there * messages.rollouts + others * batch
    received = there * messages.rollouts + messages.groups * scored * messages.scores
    return Traffic(sent, received, sent + received)


def _weights(hosts: Sequence[Host], messages: Messages) -> Traffic:
    """Once to each host with samplers, but for the first learner's own."""
    first = next((at for at, host in enumerate(hosts) if host.learners), 0)
    others = sum(1 for at, host in enumerate(hosts) if host.samplers and at != first)
    sent = others * messages.snapshot
    return Traffic(sent, messages.snapshot if others else 0.0, sent)


def _gradients(hosts: Sequence[Host], messages: Messages) -> Traffic:
    """Around a ring of the learners' hosts."""
    count = sum(1 for host in hosts if host.learners)
    each = messages.gradients if count > 1 else 0.0
    return Traffic(each, each, each * count)


def store_bytes(hosts: Sequence[Host], messages: Messages, staleness: int) -> float:
    """Most that the object store of any host holds at a time: images of groups in flight where they
    are drawn and scored, versions of the weights, the driver's rollouts."""
    samplers = sum(host.samplers for host in hosts)
    slots, found = (staleness + 1) * messages.groups, []
    for at, host in enumerate(hosts):
        servers = [
            host.servers[pool] / sum(each.servers.get(pool, 0) for each in hosts)
            for pool in host.servers
        ]
        share = min(host.samplers / samplers + max(servers, default=0.0), 1.0)
        weights = SNAPSHOTS * messages.snapshot if host.samplers or host.learners else 0.0
        rollouts = slots * ANSWERS * messages.rollouts if not at else 0.0
        found.append(slots * share * messages.images + weights + rollouts)
    return max(found)

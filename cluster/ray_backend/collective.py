"""A broadcast group of the learner and its samplers, over `torch.distributed`.

The learner (rank 0) sends every snapshot once; gloo or NCCL passes it on from member to member, so
that many nodes do not all fetch it from the learner's. It is the same snapshot that the learner
returns to the object store, which is where a sampler takes it from if it did not arrive.

The functions at the end run inside the actors. A sampler receives in a thread of its own, beside
its work, into a buffer that is verified before it is used; it loads it when its turn comes. gloo
does not notice a member that dies in the middle of a large transfer, and NCCL may not: every
wait is bounded, and `leave` ends it at once.

Over NCCL not yet run on a GPU. Names of torch that it does not promise to keep are used in
`_process_group` alone.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import msgpack
import ray
import torch
import torch.distributed as dist
from torch import Tensor

from cluster.errors import FleetError, TesseraError
from cluster.io.background import Background
from cluster.io.processes import in_environment
from cluster.messages import WeightSnapshot
from cluster.weights import open_snapshot

RECEIVE = "weights"
"""Ray concurrency group of a sampler: the thread that receives."""
JOIN_S = 60.0  # longest wait for all members
PART_S = 10.0  # longest wait for the exchange of one part
PART = 1 << 26  # bytes; a bound on each of them holds for weights of any size
LOOK_S = 0.1  # how soon an exchange ends after `leave`
FAILURES = (RuntimeError, ValueError, OSError, TesseraError)


@dataclass(frozen=True)
class Ticket:
    """A member's part in one broadcast."""

    group: int
    """A member of another group leaves that, and joins this one."""
    number: int
    """Of the broadcast; numbers rise."""
    rank: int
    size: int
    nccl: bool


class Member:
    """A worker's place in the group, and the snapshot that it received last."""

    def __init__(self) -> None:
        self.store: Any = None
        """Of the rendezvous that the learner opened last."""
        self._group = self._left = 0  # numbers of groups rise
        self._backend: Any = None
        self._buffer: Tensor | None = None
        self._changed = threading.Condition()
        self._received: tuple[int, WeightSnapshot] | None = None
        self._settled = 0  # number of the last broadcast that arrived or failed

    def send(self, ticket: Ticket, address: str, snapshot: WeightSnapshot) -> None:
        """Broadcast a snapshot whose buffer is a tensor.

        Raises:
            FAILURES: not all members joined, or took part.
        """
        try:
            self._join(ticket, address)
            header = [snapshot.version, snapshot.nbytes, snapshot.manifest]
            self.store.set(str(ticket.number), msgpack.packb(header))
            self.store.delete_key(str(ticket.number - 1))
            flat: Any = snapshot.buffer
            self._exchange(flat.cuda() if ticket.nccl else flat)
        except FAILURES:
            self.leave()
            raise

    def receive(self, ticket: Ticket, address: str) -> None:
        """Receive a snapshot into a buffer that is used again, and verify it.

        Raises:
            FAILURES: it did not arrive, or is damaged.
        """
        try:
            self._join(ticket, address)
            version, nbytes, manifest = msgpack.unpackb(self.store.get(str(ticket.number)))
            with self._changed:  # not while the one before is loaded
                self._received, buffer = None, self._buffer
            if buffer is None or buffer.nbytes != nbytes:
                device = "cuda" if ticket.nccl else "cpu"
                self._buffer = buffer = None  # at most one at a time
                buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
            self._exchange(buffer)
            content: Any = buffer
            snapshot = WeightSnapshot(version=version, manifest=manifest, buffer=content)
            open_snapshot(snapshot, buffer.device)
            self._buffer = buffer
            with self._changed:
                self._received = ticket.number, snapshot
        except FAILURES:
            self._buffer = None  # an exchange that was left may still write to it
            self.leave()
            raise
        finally:
            with self._changed:
                self._settled = ticket.number
                self._changed.notify_all()

    @contextmanager
    def received(self, number: int, wait_s: float) -> Iterator[WeightSnapshot | None]:
        """What a broadcast brought, unchanged within the block; None if it failed, did not end in
        `wait_s`, or if a later one came meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: self._settled >= number, wait_s)
            found = self._received
            yield found[1] if found and found[0] == number else None

    def leave(self, group: int = 0) -> None:
        """Leave the group (0: the present one), or never join it. A member that waits for the
        others, or is in the middle of an exchange, fails."""
        self._left = max(self._left, group or self._group)
        if group in (0, self._group):
            backend, self._backend = self._backend, None
            if backend is not None:
                backend.abort()

    def _join(self, ticket: Ticket, address: str) -> None:
        if ticket.group <= self._left:
            raise FleetError("the group was left")
        if ticket.group == self._group:
            return
        self.leave()
        self._group = ticket.group
        if ticket.rank:
            host, _, port = address.rpartition(":")
            wait = timedelta(seconds=JOIN_S)
            self.store = dist.TCPStore(host, int(port), is_master=False, timeout=wait)
        self._meet(ticket)
        self._backend = _process_group(self.store, ticket)
        self._exchange(torch.zeros(1, dtype=torch.uint8, device="cuda" if ticket.nccl else "cpu"))

    def _meet(self, ticket: Ticket) -> None:
        """Wait until all members are there: gloo then connects at once, or in its `PART_S` not."""
        self.store.set(f"joined {ticket.rank}", "")
        names, until = [f"joined {rank}" for rank in range(ticket.size)], time.monotonic() + JOIN_S
        while not self.store.check(names):
            if ticket.group <= self._left:
                raise FleetError("the group was left before all had joined")
            if time.monotonic() > until:
                raise FleetError(f"not all {ticket.size} members joined within {JOIN_S:g} s")
            time.sleep(LOOK_S)

    def _exchange(self, flat: Tensor) -> None:
        """Broadcast a flat tensor from rank 0, in place.

        Raises:
            FAILURES: a part took too long, a member is gone, or the group was left.
        """
        backend, parts = self._backend, list[int]()

        def broadcast() -> None:
            with _stream_beside(flat):
                for part in flat.split(PART):
                    backend.broadcast(part, 0).wait()
                    parts.append(len(part))

        if backend is None:
            raise FleetError("the group was left")
        task, sent, since = Background("a broadcast", broadcast), 0, time.monotonic()
        bound = JOIN_S if flat.nbytes == 1 else 2 * PART_S  # NCCL connects at the first
        while not task.done(LOOK_S):
            if len(parts) > sent:
                sent, since = len(parts), time.monotonic()
            if self._backend is not backend:
                raise FleetError("the group was left in the middle of a broadcast")
            if time.monotonic() - since > bound:
                raise FleetError(f"no member moved on for {bound:g} s")


def _process_group(store: Any, ticket: Ticket) -> Any:
    """A process group that is not torch's default one, which data-parallel learners have."""
    backends: Any = dist.distributed_c10d
    wait = timedelta(seconds=PART_S)
    store = dist.PrefixStore("group", store)
    if ticket.nccl:
        options = backends.ProcessGroupNCCL.Options()
        options._timeout = wait
        # `wait` then raises what went wrong, and no watchdog ends the process for it
        with in_environment("TORCH_NCCL_BLOCKING_WAIT", "1"):
            return backends.ProcessGroupNCCL(store, ticket.rank, ticket.size, options)
    options = backends.ProcessGroupGloo._Options()
    host = ray.util.get_node_ip_address()  # gloo's own choice may be all interfaces
    options._devices = [backends.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout, options._threads = wait, 2
    return backends.ProcessGroupGloo(store, ticket.rank, ticket.size, options)


@contextmanager
def _stream_beside(tensor: Tensor) -> Iterator[None]:
    """A CUDA stream beside the one that decodes. The block ends when its work is done, failed or
    not: until then no other stream gets the tensor's memory."""
    if tensor.device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(tensor.device)
    # The tensor's memory may be that of a freed one, which queued kernels still use.
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(stream):
        try:
            yield
        finally:
            stream.synchronize()


_members: WeakKeyDictionary[Any, Member] = WeakKeyDictionary()
_lock = threading.Lock()


def member(role: Any) -> Member:
    """The member that a role of this process is."""
    with _lock:
        return _members.setdefault(role, Member())


def open_rendezvous(role: Any) -> str:
    """In the learner: open the rendezvous of a new group, at an address of this node and no other;
    returns host:port."""
    host = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family)
    port = listener.getsockname()[1]
    member(role).store = dist.TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=JOIN_S),
        master_listen_fd=listener.detach(),
    )
    return f"{host}:{port}"


def send(role: Any, ticket: Ticket, address: str) -> tuple[WeightSnapshot, str]:
    """In the learner: pack the weights and broadcast them; returns the snapshot, for the object
    store, and why the broadcast failed (empty: it did not)."""
    failed: list[str] = []

    def broadcast(snapshot: WeightSnapshot) -> None:
        failed.append(_failure(lambda: member(role).send(ticket, address, snapshot)))

    snapshot = role.snapshot(send=broadcast)
    return snapshot, "".join(failed)


def receive(role: Any, ticket: Ticket, address: str) -> str:
    """In a sampler: take part in a broadcast; returns why it failed (empty: it did not)."""
    return _failure(lambda: member(role).receive(ticket, address))


def load(role: Any, number: int, wait_s: float, stored: list[ray.ObjectRef]) -> Any:
    """In a sampler: load the weights of a broadcast, or, if it did not bring them, from the object
    store.

    Args:
        stored: the snapshot's reference, in a list: Ray does not fetch it before the call.
    """
    with member(role).received(number, wait_s) as snapshot:
        if snapshot is not None:
            return role.load_weights(snapshot)
    return role.load_weights(ray.get(stored[0]))


def leave(role: Any, group: int) -> None:
    """In any member: leave a group that has failed."""
    member(role).leave(group)


def _failure(work: Callable[[], None]) -> str:
    try:
        work()
    except FAILURES as error:
        words = (str(error) or type(error).__name__).splitlines()[0]
        return re.sub(r"^\[\S+\] ", "", words).partition(". ")[0]  # without torch's source file
    return ""

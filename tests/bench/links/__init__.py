"""New weights over the links between hosts, and what they use of these, on real Ray.

python -m tests.bench.links [--megabytes 500] [--samplers 1 2 4 8] [--gigabits 1 10] [--rounds 3]
    [--ways pieces collective whole]

Three hosts of `tests/distributed/hosts`: a learner on the first, samplers on the other two. Seconds
from the call that publishes until every sampler has the weights in its own tensors; the median of
the rounds after a first one, which is printed and not counted. Share of the link: the snapshot's
bits over these seconds and the speed of a host's link, each of which must carry it once. So 1 would
need packing, verification and copying to take no time; plain TCP, printed beside, reaches 0.96, as
its packets have headers. Bytes of each link are counted on the interfaces, as multiples of the
snapshot: sent by the learner's host, received by each of the others.

Ways: pieces, `weights.transport object-store` as it is; whole, one object that every host fetches
from the learner's, as it was until 2026-11-29; collective, over gloo. All in turns in the same
processes. Needs root, iproute2, and memory for all samplers, which share this machine's cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import psutil
import ray
from ray.exceptions import RayActorError

from cluster.ray_backend import heartbeat
from cluster.ray_backend.publisher import Published, Publisher
from cluster.ray_backend.transports import COLLECTIVE, OBJECT_STORE
from cluster.ray_session.session import RayConfig, RaySession
from tests.bench.broadcast import LAYER_BYTES, BenchLearner, BenchSampler
from tests.distributed.hosts.cluster import HostCluster
from tests.distributed.hosts.network import Host, Network, why_not

WAYS = ("pieces", "collective", "whole")
WORKER_BYTES = 300e6  # of a process without weights
ANSWER_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Broadcast:
    """One broadcast, as measured."""

    seconds: float
    nbytes: int
    """Of the snapshot."""
    sent: float
    """By the learner's host, snapshots."""
    received: tuple[float, ...]
    """By each of the other hosts, snapshots."""
    lost: int = 0
    """Samplers that were lost meanwhile."""

    def share(self, gigabits: float) -> float:
        return self.nbytes * 8 / 1e9 / self.seconds / gigabits


class Driver:
    """A program on the learner's host that broadcasts whenever it is asked, by a line of its input:
    the way. Its answers are lines, too.

    Args:
        samplers: a host.
    """

    def __init__(self, cluster: HostCluster, megabytes: int, samplers: int) -> None:
        self._network = cluster.network
        first, *others = cluster.network.hosts
        places = [host.address for host in others for _ in range(samplers)]
        arguments = [cluster.address, str(megabytes), first.address, *places]
        self._program = first.popen(
            [sys.executable, "-m", "tests.bench.links", "--drive", *arguments],
            cluster.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.nbytes = int(self._answer()["nbytes"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._program.communicate(timeout=ANSWER_S)  # the end of its input is its end

    def broadcast(self, way: str) -> Broadcast:
        self.begin(way)
        return self.end()

    def begin(self, way: str) -> None:
        """Have it broadcast, without waiting."""
        self._before = [host.traffic() for host in self._network.hosts]
        assert self._program.stdin is not None
        print(way, file=self._program.stdin, flush=True)

    def end(self) -> Broadcast:
        """What came of it."""
        found = self._answer()
        spent = [host.traffic() - was for host, was in zip(self._network.hosts, self._before)]
        return Broadcast(
            seconds=found["seconds"],
            lost=found["lost"],
            nbytes=self.nbytes,
            sent=spent[0].sent / self.nbytes,
            received=tuple(each.received / self.nbytes for each in spent[1:]),
        )

    def _answer(self) -> Any:
        assert self._program.stdout is not None
        for line in self._program.stdout:
            with contextlib.suppress(ValueError):
                return json.loads(line)
        raise RuntimeError(f"the driver ended with status {self._program.wait()}")


def drive(address: str, megabytes: int, home: str, places: Sequence[str]) -> None:
    """What `Driver` runs."""
    count = max(megabytes * 10**6 // LAYER_BYTES, 1)
    with RaySession(RayConfig(address=address)):
        store, group = Publisher(OBJECT_STORE), Publisher(COLLECTIVE)

        def start(role: type, node: str, *arguments: Any) -> Any:
            actor = store.actor_class(role, {heartbeat.GROUP: 1})
            return actor.options(num_cpus=0, resources={f"node:{node}": 0.001}).remote(*arguments)

        learner = start(BenchLearner, home, count, "float32")
        samplers = [start(BenchSampler, place) for place in places]
        ray.get([sampler.build.remote(count) for sampler in samplers])
        print(json.dumps({"nbytes": count * LAYER_BYTES}), flush=True)
        for version, line in enumerate(sys.stdin, 1):
            publisher = group if line.strip() == "collective" else store
            ray.get(learner.learn.remote())
            start_s = time.perf_counter()
            if line.strip() == "whole":
                weights = Published(learner.snapshot.remote())
            else:
                weights = publisher.publish([learner], samplers)
            found = [loaded(ref) for ref in [publisher.load(each, weights) for each in samplers]]
            seconds, lost = time.perf_counter() - start_s, found.count(None)
            assert {*found} <= {float(version), None}, found
            print(json.dumps({"seconds": seconds, "lost": lost}), flush=True)


def loaded(ref: Any) -> float | None:
    """A sampler's answer; None if it was lost."""
    try:
        return float(ray.get(ref, timeout=ANSWER_S))
    except RayActorError:
        return None


TCP = """
import socket, sys, time
host, nbytes = sys.argv[1], int(sys.argv[2])
if not nbytes:
    with socket.create_server((host, 5999)) as server:
        print("up", flush=True)
        connection, _ = server.accept()
        while connection.recv(1 << 22):
            pass
    sys.exit()
block = bytes(1 << 22)
with socket.create_connection((host, 5999)) as connection:
    start = time.perf_counter()
    for _ in range(nbytes // len(block)):
        connection.sendall(block)
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)
    print(nbytes // len(block) * len(block) * 8 / 1e9 / (time.perf_counter() - start))
"""


def plain_tcp(sender: Host, receiver: Host, nbytes: int) -> float:
    """Gbit/s of one TCP connection."""
    line = [sys.executable, "-c", TCP, receiver.address]
    with receiver.popen([*line, "0"], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        server.stdout.readline()
        return float(sender.run([*line, str(nbytes)]).stdout)


@contextlib.contextmanager
def hosts(megabytes: int) -> Iterator[HostCluster]:
    """Three hosts with a Ray cluster whose object stores hold what a broadcast needs."""
    store = max(int(4.5e6 * megabytes), 200_000_000)
    with Network() as network, HostCluster(network) as cluster:
        yield cluster.start(object_store_memory=store)


def too_much(way: str, megabytes: int, samplers: int) -> str:
    """Why there is no room for a way; empty: there is."""
    copies = 2 if way == "collective" else 1
    need = 2 * samplers * (copies * megabytes * 1e6 + WORKER_BYTES) + 6e6 * megabytes
    free = psutil.virtual_memory().available
    return f"needs {need / 1e9:.0f} GB of memory, {free / 1e9:.0f} are free" if need > free else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--samplers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--gigabits", type=float, nargs="+", default=[1, 10])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    options = parser.parse_args()
    if reason := why_not():
        parser.exit(1, f"several hosts: {reason}\n")
    with hosts(options.megabytes) as cluster:
        for samplers in options.samplers:
            measure(cluster, options, samplers)
    print(f"load {os.getloadavg()[0]:.1f} after, {os.cpu_count()} CPU cores")


def measure(cluster: HostCluster, options: argparse.Namespace, samplers: int) -> None:
    """All ways at all speeds, with so many samplers a host."""
    first, second, _ = cluster.network.hosts
    left_out = {way: too_much(way, options.megabytes, samplers) for way in options.ways}
    for way in (way for way, reason in left_out.items() if reason):
        print(f"{samplers} a host, {way}: left out, {left_out[way]}")
    ways = [way for way in options.ways if not left_out[way]]
    if not ways:
        return
    with Driver(cluster, options.megabytes, samplers) as driver:
        for gigabits in options.gigabits:
            for host in cluster.network.hosts:
                host.limit(gigabits * 1e9)
            plain = plain_tcp(first, second, driver.nbytes)
            load = os.getloadavg()[0]
            warm = {way: driver.broadcast(way).seconds for way in ways}
            said = ", ".join(f"{way} {seconds:.2f} s" for way, seconds in warm.items())
            print(f"{samplers} a host, {gigabits:g} Gbit/s: first broadcasts {said}", flush=True)
            taken = [{way: driver.broadcast(way) for way in ways} for _ in range(options.rounds)]
            show(samplers, gigabits, plain, load, {w: [turn[w] for turn in taken] for w in ways})


def show(
    samplers: int, gigabits: float, plain: float, load: float, taken: dict[str, list[Broadcast]]
) -> None:
    """Rows of the table."""
    for way, found in taken.items():
        middle = sorted(found, key=lambda each: each.seconds)[len(found) // 2]
        best = max(each.share(gigabits) for each in found)
        received = " ".join(f"{each:.2f}" for each in middle.received)
        print(
            f"| {way:10} | {gigabits:4g} Gbit/s | {samplers} a host | {middle.seconds:6.2f} s | "
            f"share {middle.share(gigabits):.2f} (best {best:.2f}, TCP {plain / gigabits:.2f}) | "
            f"sent {middle.sent:.2f}, received {received} | load {load:.0f} |",
            flush=True,
        )
        name = f"links.{way}_{gigabits:g}gbit_{samplers}"
        print(f"RESULT {name}_share={middle.share(gigabits):.3f}")
        print(f"RESULT {name}_sent={statistics.median(each.sent for each in found):.2f}")

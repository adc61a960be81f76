"""New weights from one learner to four samplers of a node, on real Ray, against `ray.put` alone.

python -m tests.bench.broadcast [--megabytes 500] [--samplers 4] [--rounds 5] [--dtype float32]

Ours: packed, put into the object store once, checked and copied into each sampler's own tensors.
The plain way: `ray.put` of the dict of torch tensors, `load_state_dict` in each actor. The group:
`weights.transport collective` over gloo, which is for many nodes: on one it sends to each sampler
what the object store shares. All in the same run and the same processes, in turns; the first round
of each, which touches fresh memory (and forms the group), is printed but not counted. Memory is
what is private to a sampler's process (USS), against its value before it had a module.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch

from cluster.messages import WeightSnapshot
from cluster.ray_backend import heartbeat
from cluster.ray_backend.publisher import Publisher
from cluster.ray_backend.transports import COLLECTIVE, OBJECT_STORE
from cluster.ray_session.session import RayConfig, RaySession
from cluster.weights import Packer, load_weights

SIDE = 1024
LAYER_BYTES = 4 * SIDE * SIDE
GIB = 2**30


class Layers(torch.nn.Module):
    """fp32 matrices of 4 MiB, `count` of them, all with the same value."""

    def __init__(self, count: int, value: float) -> None:
        super().__init__()
        self.layers = torch.nn.ParameterList(torch.full((SIDE, SIDE), value) for _ in range(count))


class BenchLearner:
    """Publishes weights whose value is their version."""

    def __init__(self, count: int, dtype: str) -> None:
        torch.set_num_threads(1)
        self._module, self._pack, self.version = (
            Layers(count, 0.0),
            Packer(getattr(torch, dtype)),
            0,
        )

    def learn(self) -> None:
        self.version += 1
        with torch.no_grad():
            for parameter in self._module.parameters():
                parameter.fill_(self.version)

    def snapshot(self, send: Callable[[WeightSnapshot], object] | None = None) -> WeightSnapshot:
        return self._pack(self._module.state_dict(), self.version, send=send)

    def put(self) -> list[Any]:
        """The plain way; in a list, so that Ray does not fetch it on the way."""
        return [ray.put(dict(self._module.state_dict()))]


class BenchSampler:
    """Holds the last weights it received."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._module: Layers | None = None

    def memory(self) -> int:
        return private_bytes(os.getpid())

    def build(self, count: int) -> int:
        self._module = Layers(count, -1.0)
        return os.getpid()

    def load_weights(self, snapshot: WeightSnapshot) -> float:
        assert self._module is not None
        load_weights(self._module, snapshot)
        return self._value()

    def load_dict(self, state: dict[str, torch.Tensor]) -> float:
        assert self._module is not None
        self._module.load_state_dict(state)
        return self._value()

    def _value(self) -> float:
        assert self._module is not None
        return float(self._module.layers[-1][-1, -1])


def private_bytes(pid: int) -> int:
    """Memory that no other process shares (USS)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    private = (line.split() for line in lines if line.startswith("Private_"))
    return sum(int(fields[1]) * 1024 for fields in private)


@contextmanager
def peaks(pids: Sequence[int], into: dict[int, int], every_s: float = 0.05) -> Iterator[None]:
    """Largest private memory of each process at the start, at the end and in between."""
    done = threading.Event()

    def look() -> None:
        for pid in pids:
            into[pid] = max(into.get(pid, 0), private_bytes(pid))

    def watch() -> None:
        while not done.wait(every_s):
            look()

    look()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    look()  # a block shorter than `every_s` was not looked at in between


class Bench:
    """One learner and its samplers, as actors."""

    def __init__(self, count: int, samplers: int, dtype: str) -> None:
        self._publisher, self._group = Publisher(OBJECT_STORE), Publisher(COLLECTIVE)

        def start(role: type, *arguments: Any) -> Any:
            actor = self._group.actor_class(role, {heartbeat.GROUP: 1})
            return actor.options(num_cpus=0.1).remote(*arguments)

        self.learner = start(BenchLearner, count, dtype)
        self.samplers = [start(BenchSampler) for _ in range(samplers)]
        self._version = 0
        self.before = ray.get([s.memory.remote() for s in self.samplers])
        self.pids = ray.get([s.build.remote(count) for s in self.samplers])
        self.built = ray.get([s.memory.remote() for s in self.samplers])

    def ours(self, publisher: Publisher | None = None) -> list[float]:
        publisher = publisher or self._publisher
        weights = publisher.publish([self.learner], self.samplers)
        return ray.get([publisher.load(sampler, weights) for sampler in self.samplers])

    def group(self) -> list[float]:
        return self.ours(self._group)

    def plain(self) -> list[float]:
        (ref,) = ray.get(self.learner.put.remote())
        return ray.get([sampler.load_dict.remote(ref) for sampler in self.samplers])

    def seconds(self, broadcast: Callable[[], list[float]]) -> float:
        """Seconds of one broadcast of new weights; checks that they arrived."""
        ray.get(self.learner.learn.remote())
        self._version += 1
        start = time.perf_counter()
        values = broadcast()
        seconds = time.perf_counter() - start
        assert values == [float(self._version)] * len(self.samplers), values
        return seconds

    def memory(self) -> list[int]:
        return ray.get([sampler.memory.remote() for sampler in self.samplers])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--samplers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    count = options.megabytes * 2**20 // LAYER_BYTES
    weights = count * LAYER_BYTES
    with RaySession(RayConfig()):
        bench = Bench(count, options.samplers, options.dtype)
        load = os.getloadavg()[0]
        times: dict[str, list[float]] = {"ours": [], "plain": [], "group": []}
        peak: dict[str, dict[int, int]] = {name: {} for name in times}
        kept: dict[str, list[int]] = {}
        for name in times:  # memory is watched in a round of its own, which is not counted
            with peaks(bench.pids, peak[name]):
                first = bench.seconds(getattr(bench, name))
            kept[name] = bench.memory()
            print(f"{name}: first broadcast {first:.2f} s, while memory is watched", flush=True)
        for number in range(options.rounds):
            for name, found in times.items():
                found.append(bench.seconds(getattr(bench, name)))
            each = ", ".join(f"{name} {found[-1]:.3f} s" for name, found in times.items())
            print(f"round {number}: {each}", flush=True)
    medians = {name: statistics.median(found) for name, found in times.items()}
    print(f"{weights / 2**20:.0f} MiB to {options.samplers} samplers, {options.dtype} on the way")
    print("         median s    least s   private memory over own weights: kept     peak")
    for name, found in times.items():
        ratio = max(now - was for now, was in zip(kept[name], bench.before)) / weights
        top = max(peak[name][pid] - was for pid, was in zip(bench.pids, bench.before)) / weights
        print(f"{name:8s} {medians[name]:8.3f}   {min(found):8.3f}   {ratio:38.2f} {top:8.2f}")
        if name == "ours":
            ours_memory = max(ratio, top)
    print(f"load {load:.1f} before, {os.getloadavg()[0]:.1f} after, {os.cpu_count()} CPU cores")
    print(f"RESULT broadcast.speedup={medians['plain'] / medians['ours']:.2f}")
    print(f"RESULT broadcast.seconds={medians['ours']:.3f}")
    print(f"RESULT broadcast.private_memory_ratio={ours_memory:.3f}")
    print(f"RESULT broadcast.group_to_object_store={min(times['group']) / min(times['ours']):.2f}")


if __name__ == "__main__":
    from tests.bench.broadcast import main as imported_main  # so that workers know the classes

    imported_main()

"""Overlap of sampling, scoring and learning: roles of fixed cost on real Ray, the real main loop.

python -m tests.bench.pipeline [--only speedup mixes samplers overlap driver memory] [--seconds 2]

Roles sleep a known time, so that the machine's cores do not bound the figure (a busy machine still
wakes sleepers late). What is measured is what Tessera adds: loop, buffers, fleet, messages.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import psutil

from cluster.messages import MAIN_SPACE, GroupScores, RolloutGroup, SampleRequest, WeightSnapshot
from cluster.ray_backend.fleet import RayFleet
from cluster.ray_session.session import RayConfig, RaySession
from cluster.roles import FleetPlan, Resources, Role
from cluster.spans import Span
from learner.config import RunConfig
from learner.loop import Iteration, train
from learner.monitoring.metrics import Recorder
from learner.monitoring.timeline import Usage, bottleneck
from learner.rollouts.feature_space import RewardSpace
from learner.runs.run_dir import RunDirectory
from learner.training.batch import StepReport, TrainingBatch
from rewards.distribution.distribution_reward import DistributionReward
from tests.small_run import small_config

ROLLOUTS, TOKENS, SIDE = 4, 64, 16
PARTS = ("speedup", "mixes", "samplers", "overlap", "driver", "memory")
MIXES = {
    "balanced": (1.0, 1.0, 1.0),
    "sampling-bound": (1.0, 0.5, 0.5),
    "scoring-bound": (0.5, 1.0, 0.5),
    "learning-bound": (0.5, 0.5, 1.0),
    "uneven": (0.9, 0.3, 1.0),
}
"""Seconds an iteration of sampling, scoring and learning, over those of the slowest."""


@dataclass(frozen=True)
class Costs:
    """Seconds of one worker: a group to sample and to score, an iteration to learn, a group's
    images to decode."""

    sample: float = 0.0
    score: float = 0.0
    learn: float = 0.0
    decode: float = 0.0


class Timed:
    """Every role, at a fixed cost in seconds: of its work, and of decoding images."""

    def __init__(self, config: tuple[float, float], name: str) -> None:
        self.name, self._version, self._done = name, 0, 0
        self._seconds, self._decode = config

    def _work(self, phase: str, seconds: float | None = None) -> tuple[Span, ...]:
        start = time.time()
        if seconds := self._seconds if seconds is None else seconds:
            time.sleep(seconds)
        return (Span(self.name, phase, start, time.time()),)

    def load_weights(self, snapshot: WeightSnapshot) -> int:
        self._version = snapshot.version
        return self._version

    def sample(self, requests: list[SampleRequest]) -> list[RolloutGroup]:
        (request,) = requests
        spans = self._work("sample")
        numbers = np.zeros((ROLLOUTS, TOKENS), np.float32)
        return [
            RolloutGroup(
                request=request,
                version=self._version,
                tokens=numbers.astype(np.int32),
                logprobs=numbers,
                entropies=numbers,
                spans=spans,
            )
        ]

    def images(self, group: RolloutGroup) -> tuple[np.ndarray, Span]:
        (span,) = self._work("decode", self._decode)
        return np.zeros((ROLLOUTS, SIDE, SIDE, 3), np.uint8), span

    def score(self, request: SampleRequest, images: np.ndarray) -> GroupScores:
        return GroupScores(
            key=request.key,
            spans=self._work("score"),
            scores={"clip": np.arange(ROLLOUTS, dtype=np.float32)},
            features={MAIN_SPACE: np.zeros((ROLLOUTS, 8), np.float32)},
            errors=(None,) * ROLLOUTS,
        )

    def commit(
        self, iteration: int, features: dict[str, np.ndarray], valid: np.ndarray, **_: object
    ):
        self._done = iteration + 1
        rewards = np.zeros(len(valid))
        sizes = {"fid": 0.0, "batch_fid": 0.0, "effective_size": 1.0, "version": iteration}
        answer = DistributionReward(iteration=iteration, rewards=rewards, **sizes)
        return dict.fromkeys(features, answer)

    def refresh(self) -> None:
        pass

    def state(self) -> bytes:
        return b"%d" % self._done

    def step(self, batch: TrainingBatch) -> StepReport:
        spans = self._work("learn")
        self._version += 1
        return StepReport(version=self._version, metrics={}, spans=spans)

    def snapshot(self) -> WeightSnapshot:
        return WeightSnapshot(
            version=self._version, manifest=b"", buffer=np.zeros(1 << 20, np.uint8)
        )


def plan(costs: Costs, samplers: int = 1) -> FleetPlan:
    def role(name: str, seconds: float = 0.0, count: int = 1, decode: float = 0.0) -> Role:
        config, resources = (seconds, decode), Resources(num_cpus=0.01)
        return Role(name=name, factory=Timed, config=config, resources=resources, count=count)

    return FleetPlan(
        sampler=role("sampler", costs.sample, samplers, costs.decode),
        reward_server=role("reward-server", costs.score),
        moments_server=role("moments-server"),
        learner=role("learner", costs.learn),
    )


def bench_config(staleness: int, iterations: int, groups: int) -> RunConfig:
    return small_config(
        max_staleness=staleness,
        iterations=iterations,
        groups_per_iteration=groups,
        rollouts_per_group=ROLLOUTS,
        rewards={"hps": {"enabled": False}},
    )


@dataclass(frozen=True)
class Timing:
    """What a run took."""

    seconds: float
    """Of an iteration."""
    slowest: float
    """Of an iteration, in the slowest stage alone, as measured: sleepers wake late."""
    advice: str


def run(
    session: RaySession,
    costs: Costs,
    config: RunConfig,
    samplers: int = 1,
    after: Callable[[Iteration], None] = lambda _: None,
    warm: int = 2,
) -> Timing:
    """Of the iterations once `warm` are done."""
    ends: list[float] = []
    stages: list[dict[str, float]] = []
    with RayFleet(plan(costs, samplers), session) as fleet:
        fleet.broadcast(0)
        usage = Usage(time.time())

        def each(done: Iteration) -> None:
            ends.append(time.perf_counter())
            usage.add(done.spans)
            stages.append(dict.fromkeys(("sample", "score", "learn"), 0.0))
            for span in done.spans:
                if span.phase in stages[-1]:
                    stages[-1][span.phase] += span.seconds
            after(done)

        train(config, fleet, {MAIN_SPACE: RewardSpace()}, 0, each, lambda: False)
    count = len(ends) - warm
    means = {name: sum(row[name] for row in stages[warm:]) / count for name in stages[0]}
    slowest = max(means["sample"] / samplers, means["score"], means["learn"])
    advice = bottleneck(usage.shares(), config.max_staleness)
    return Timing((ends[-1] - ends[warm - 1]) / count, slowest, advice)


def mix(shares: tuple[float, float, float], seconds: float, groups: int) -> Costs:
    sample, score, learn = (share * seconds for share in shares)
    return Costs(sample / groups, score / groups, learn)


def speedup(session: RaySession, seconds: float) -> None:
    groups, costs = 20, mix(MIXES["balanced"], seconds, 20)
    found = {}
    for staleness in (0, 1, 2):
        config = bench_config(staleness, 8, groups)
        timing = run(session, costs, config)
        found[staleness] = timing.seconds
        rate = groups * ROLLOUTS / timing.seconds
        print(
            f"S={staleness}: {rate:.1f} images/s, {timing.seconds:.3f} s; {timing.advice}",
            flush=True,
        )
    print(f"RESULT pipeline.speedup_s1={found[0] / found[1]:.3f}")
    print(f"RESULT pipeline.speedup_s2={found[0] / found[2]:.3f}")


def mixes(session: RaySession, seconds: float) -> None:
    lowest, lowest_measured, groups = 1.0, 1.0, 20
    for name, shares in MIXES.items():
        timing = run(session, mix(shares, seconds, groups), bench_config(1, 8, groups))
        share, measured = seconds / timing.seconds, timing.slowest / timing.seconds
        lowest, lowest_measured = min(lowest, share), min(lowest_measured, measured)
        print(
            f"{name:15s} {share:6.1%} of what the slowest stage alone allows, {measured:6.1%} of "
            f"what it took; {timing.advice}",
            flush=True,
        )
    print(f"RESULT pipeline.of_slowest_stage={lowest:.3f}")
    print(f"RESULT pipeline.of_slowest_stage_as_measured={lowest_measured:.3f}")


def samplers(session: RaySession, seconds: float) -> None:
    groups, costs = 32, Costs(sample=seconds / 4, learn=seconds / 10)
    first, lowest = 0.0, 1.0
    for count in (1, 2, 4, 8, 16):
        iterations = 3 if count < 4 else 8
        config = bench_config(1, iterations, groups)
        took = run(session, costs, config, count, warm=1).seconds
        first = first or took
        linear = first / (count * took)
        lowest = min(lowest, linear)
        print(f"{count:2d} samplers: {took:7.3f} s, {linear:6.1%} of linear", flush=True)
    print(f"RESULT pipeline.linear_to_16={lowest:.3f}")


def overlap(session: RaySession, seconds: float) -> None:
    """One sampler whose images take 0.6 times as long as its tokens. A group's two phases after
    one another are the stand-in's own sum, as measured in the run."""
    groups, costs = 20, Costs(sample=0.1, decode=0.06)
    sums: list[float] = []

    def after(done: Iteration) -> None:
        phases = [span.seconds for span in done.spans if span.phase in ("sample", "decode")]
        sums.append(sum(phases) / groups)

    took = run(session, costs, bench_config(1, 8, groups), after=after).seconds / groups
    serial = sum(sums[2:]) / len(sums[2:])
    print(
        f"{1 / took:.2f} groups/s; one after the other {1 / serial:.2f}; sampling alone allows "
        f"{1 / costs.sample:.2f}",
        flush=True,
    )
    print(f"RESULT pipeline.decode_overlap={serial / took:.3f}")


def driver(session: RaySession, seconds: float) -> None:
    groups, marks = 16, []

    def after(done: Iteration) -> None:
        marks.append((time.process_time(), time.perf_counter()))

    run(session, Costs(), bench_config(1, 60, groups), after=after)
    (cpu, wall), (cpu_end, wall_end) = marks[9], marks[-1]
    count = groups * (len(marks) - 10)
    print(f"RESULT pipeline.driver_cpu_ms_per_group={(cpu_end - cpu) / count * 1000:.2f}")
    print(f"RESULT pipeline.wall_ms_per_group_at_no_cost={(wall_end - wall) / count * 1000:.2f}")


def memory(session: RaySession, seconds: float) -> None:
    process, sizes = psutil.Process(), []
    config = bench_config(1, 1000, 4)
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(RunDirectory.create(f"{folder}/run", config), 0, rollouts=True)

        def after(done: Iteration) -> None:
            recorder.record(done.metrics, done.groups, done.advantages, done.spans)
            if done.metrics["iteration"] % 100 == 0:
                sizes.append(process.memory_info().rss / 2**20)

        run(session, Costs(), config, after=after)
        recorder.close()
    print("driver, MiB after each 100 iterations: " + " ".join(f"{size:.1f}" for size in sizes))
    print(f"RESULT pipeline.driver_growth_mib_200_to_1000={sizes[-1] - sizes[1]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seconds", type=float, default=2.0, help="the slowest stage's, each time")
    options = parser.parse_args()
    parts = {
        "speedup": speedup,
        "mixes": mixes,
        "samplers": samplers,
        "overlap": overlap,
        "driver": driver,
        "memory": memory,
    }
    with RaySession(RayConfig()) as session:
        for name in options.only:
            print(f"--- {name} (load {os.getloadavg()[0]:.1f})", flush=True)
            parts[name](session, options.seconds)
    print(f"load at the end: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()

"""An iteration's seconds from those of its pieces: a flow shop of sampling, images and scores, then
moments, learning and new weights. Pure arithmetic, which never falls when a piece takes longer.

Groups pass the samplers in waves, one call of each sampler. A wave leaves a stage when the stage
has done the waves before it and its own:

    end(wave, stage) = max(end(wave - 1, stage) + occupancy, end(wave, stage - 1) + latency)

(the first wave's: the latter).

With staleness S an iteration is requested when S others are not learned from yet, so that S + 1 of
them share the time from request to new weights; no resource can be in use for longer than the
iteration. The largest of these bounds is the iteration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from learner.capacity.scale.links import Host, Traffic
from learner.capacity.service_times import ServiceTimes

DEPENDENCY = "each other"
LOOP = "main loop"
HAND_OVER = 2.0e-3  # s from one worker's answer to the next one's start, through the driver; as
# tests.bench.pipeline has it between groups without cost (2.2 ms, 2026-11-24)
CROWDED = 0.25  # part by which CPU work grows when many threads share each core and empty its
# caches: five on two cores took 1.13 to 1.19 times as long (tests.bench.planner, 2026-11-29)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What an iteration is made of, beside the seconds of its pieces."""

    groups: int
    """P"""
    calls: Sequence[int]
    """Groups of each call of the sampler that has most."""
    staleness: int
    """S"""
    hosts: Sequence[Host]
    traffic: Mapping[str, Traffic] = field(default_factory=dict)
    """Kind -> bytes of an iteration, as `links.traffic` has them; the time that gradients take is
    part of learning."""
    link: float = math.inf
    """Bytes/s one way between hosts."""
    paired: bool = False
    """Each sampler shares its GPU with reward servers."""
    shared: bool = False
    """The learner shares the first one, too."""
    cores: float = math.inf
    """Of each host, for workers that compute on CPUs."""
    threads: Mapping[str, int] = field(default_factory=dict)
    """Role -> threads of a worker that computes on a CPU."""

    @property
    def samplers(self) -> int:
        return sum(host.samplers for host in self.hosts)

    def servers(self, pool: str) -> int:
        return max(sum(host.servers.get(pool, 0) for host in self.hosts), 1)

    def seconds(self, kind: str) -> float:
        """An iteration's messages of a kind over the busiest link."""
        return self.traffic[kind].busiest / self.link if kind in self.traffic else 0.0


@dataclass(frozen=True)
class Prediction:
    """Of an iteration."""

    seconds: float
    sampling: float
    """From its first request to its last score."""
    learning: float
    """From its last score to new weights in the samplers."""
    loads: Mapping[str, float]
    """Resource -> seconds that it is in use."""
    bottleneck: str
    """Of `loads`, or `DEPENDENCY`."""


@dataclass(frozen=True)
class _Stage:
    """Seconds of one wave: until the stage is free for the next, and until this one is through."""

    occupancy: float
    latency: float


def predict(times: ServiceTimes, setting: Setting) -> Prediction:
    """Seconds of an iteration, and what bounds them."""
    sampling = _sampling(times, setting)
    transfer = setting.seconds("weights")
    publishing = times.publish + transfer + times.load
    learning = times.commit + times.learn + publishing + 3 * HAND_OVER
    loads = _loads(times, setting)
    bounds = {DEPENDENCY: (sampling + learning) / (setting.staleness + 1), **loads}
    seconds = max(bounds.values())
    bottleneck = max(bounds, key=lambda name: bounds[name])
    if bottleneck == DEPENDENCY and not setting.staleness:
        bottleneck = max({**loads, "learner": times.learn}, key=lambda n: loads.get(n, times.learn))
    return Prediction(seconds, sampling, learning, loads, bottleneck)


def _sampling(times: ServiceTimes, setting: Setting) -> float:
    """Seconds from the first request to the last score: the last stage's end of the last wave, and
    no less than the cores of a host need."""
    ends: list[float] = []
    left, cpu = setting.groups, 0.0
    for size in setting.calls:
        groups = min(size * setting.samplers, left)
        left -= groups
        stages = _stages(times, setting, size, groups)
        cpu += _cpu_seconds(times, setting, groups)
        before = 0.0
        for number, stage in enumerate(stages):
            end = before + stage.latency
            if number < len(ends):
                end = max(ends[number] + stage.occupancy, end)
            ends[number:] = [end, *ends[number + 1 :]]
            before = end
    tail = 0.0
    if math.isfinite(setting.cores):  # the last group's images and scores leave cores idle
        tail = (times.images + max(times.score.values(), default=0.0)) / 2 + HAND_OVER
    return max(ends[-1], cpu + tail)


def _stages(times: ServiceTimes, setting: Setting, size: int, groups: int) -> list[_Stage]:
    """Of a wave of `groups` groups, `size` on each sampler."""
    turns = _turns(setting)
    sample, images = size * times.sample * turns, size * times.images * turns
    part = groups / setting.groups
    scoring = _scoring(times, setting)
    if setting.threads.get("sampler"):  # images have a thread of their own
        sampler = [_Stage(sample, sample), _Stage(images, images + HAND_OVER)]
    else:  # on a GPU they take turns, and so do reward servers beside them
        beside = scoring * part if setting.paired else 0.0
        sampler = [_Stage(sample + images + beside, sample + images + HAND_OVER)]
    driver = groups * times.driver
    messages = part * max(setting.seconds("images"), setting.seconds("rollouts"))
    latency = max(
        (-(-groups // setting.servers(pool)) * s for pool, s in times.score.items()), default=0.0
    )
    return [
        *sampler,
        _Stage(driver, times.driver),
        _Stage(messages, messages / max(groups, 1)),
        _Stage(scoring * part, latency + HAND_OVER),
    ]


def _scoring(times: ServiceTimes, setting: Setting) -> float:
    """Seconds of the busiest reward server in an iteration."""
    return max(
        (-(-setting.groups // setting.servers(pool)) * s for pool, s in times.score.items()),
        default=0.0,
    )


def _turns(setting: Setting) -> float:
    """How much longer samplers take that compute at once on the cores of a host."""
    threads = setting.threads.get("sampler", 0)
    return max(1.0, threads * max(host.samplers for host in setting.hosts) / setting.cores)


def _cpu_seconds(times: ServiceTimes, setting: Setting, groups: int) -> float:
    """Seconds that the cores of the busiest host need for a wave, all of them in use."""
    if not math.isfinite(setting.cores):
        return 0.0
    found = []
    for at, host in enumerate(setting.hosts):
        drawn = groups * host.samplers / setting.samplers
        work, threads = 0.0, host.samplers * setting.threads.get("sampler", 0)
        if setting.threads.get("sampler"):
            work += drawn * (times.sample + times.images)
        for pool, seconds in times.score.items():
            servers = host.servers.get(pool, 0)
            if setting.threads.get(pool):
                work += groups * seconds * servers / setting.servers(pool)
                threads += servers * setting.threads[pool]
        crowd = 1.0 + CROWDED * max(0.0, 1.0 - setting.cores / max(threads, 1))
        found.append((work * crowd + groups * times.driver * (at == 0)) / setting.cores)
    return max(found)


def _loads(times: ServiceTimes, setting: Setting) -> dict[str, float]:
    """Seconds of an iteration in which each resource is in use."""
    most = -(-setting.groups // setting.samplers)
    sampler = most * times.sample + times.load
    if not setting.threads.get("sampler"):
        sampler += most * times.images
    scoring = _scoring(times, setting)
    learner = times.learn + times.publish
    if setting.paired:
        sampler += scoring
    if setting.shared:
        sampler += learner
    loads = {
        "sampler": sampler,
        **{
            pool: -(-setting.groups // setting.servers(pool)) * seconds
            for pool, seconds in times.score.items()
        },
        "learner": learner,
        # the loop waits for moments and learner in turn, and records
        "driver": setting.groups * times.driver + times.record,
        LOOP: times.commit + times.learn + times.record,
        "link": max(map(setting.seconds, ("images", "rollouts"))) + setting.seconds("weights"),
    }
    if math.isfinite(setting.cores):
        learned = times.learn * min(setting.threads.get("learner", 0) / setting.cores, 1.0)
        loads["CPU cores"] = _cpu_seconds(times, setting, setting.groups) + learned
    return loads

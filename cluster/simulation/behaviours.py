"""What simulated samplers and reward servers do: the real ones' messages, after their time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, Protocol

import numpy as np

from cluster.messages import MAIN_SPACE, GroupScores, RolloutGroup, SampleRequest
from cluster.ray_backend.group_calls import IMAGES
from cluster.roles import FleetPlan, Role
from cluster.simulation.actors import Behaviour, Work, instant
from cluster.spans import QUEUE, Span

TOKEN_BYTES = 12  # a token's number, logprob and entropy
NORMAL = NormalDist()


class Times(Protocol):
    """Seconds of work, as a worker takes them alone on its processor, and bytes. See
    `learner.capacity.service_times.ServiceTimes`."""

    @property
    def sample(self) -> float: ...
    @property
    def images(self) -> float: ...
    @property
    def score(self) -> Mapping[str, float]: ...
    @property
    def load(self) -> float: ...
    @property
    def image_bytes(self) -> float: ...
    @property
    def rollout_bytes(self) -> float: ...
    def varies(self, phase: str) -> float:
        """Standard deviation over mean."""
        ...


class Draws:
    """Seconds that vary, keyed by what they are of: the same in every simulation of a seed,
    whatever happens before."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def seconds(self, mean: float, variation: float, *key: object) -> float:
        """Log-normal seconds.

        Args:
            variation: standard deviation over mean.
        """
        if not (mean and variation):
            return mean
        text = "/".join(map(str, (self._seed, *key)))
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        uniform = (int.from_bytes(digest) + 0.5) / 2**64
        spread = math.sqrt(math.log1p(variation**2))
        return mean * math.exp(spread * NORMAL.inv_cdf(uniform) - spread**2 / 2)


class Worker:
    """What all simulated workers have.

    Args:
        name: of the worker.
        draws: variation of seconds.
    """

    def __init__(self, role: Role, name: str, times: Times, draws: Draws) -> None:
        self.role, self.name, self.times = role, name, times
        self._draws = draws

    def thread(self, method: str, group: str) -> str:
        return self.thread_of(method) if hasattr(self, method) else group

    def thread_of(self, method: str) -> str:
        """One thread for all, but for heartbeats."""
        return ""

    def work(self, method: str, arguments: Sequence[Any], named: Mapping[str, Any]) -> Work:
        made: Work = getattr(self, method)(*arguments, **named)
        return made

    def takes(self, phase: str, mean: float, *key: object) -> float:
        """Seconds of some work of this worker."""
        return self._draws.seconds(mean, self.times.varies(phase), phase, self.name, *key)

    def working(
        self,
        seconds: float,
        answer: Callable[[float, float], Sequence[tuple[Any, float]]],
    ) -> Work:
        """Work on the processor of the role."""
        on_gpu = self.role.resources.num_gpus > 0
        return Work(
            answer=answer,
            seconds=seconds,
            demand=1.0 if on_gpu else float(self.role.resources.num_threads),
        )


class SimulatedSampler(Worker):
    """A sampler: tokens and weights in one thread, images in another."""

    def __init__(self, role: Role, name: str, times: Times, draws: Draws) -> None:
        super().__init__(role, name, times, draws)
        self._version = 0
        self._load: Span | None = None

    def thread_of(self, method: str) -> str:
        return IMAGES if method in ("images", "images_of") else ""

    def load_weights(self, version: int, base: int | None = None) -> Work:
        def answer(begin: float, end: float) -> list[tuple[Any, float]]:
            self._version, self._load = version, Span(self.name, "load", begin, end)
            return [(version, 0.0)]

        return self.working(self.takes("load", self.times.load, version), answer)

    def forget_weights(self) -> Work:
        self._version = 0
        return instant()

    def sample(self, requests: Sequence[SampleRequest]) -> Work:
        drawn = [self.takes("sample", self.times.sample, *request.key) for request in requests]

        def answer(begin: float, end: float) -> list[tuple[Any, float]]:
            span = Span(self.name, "sample", begin, end)
            spans = (span,) if self._load is None else (self._load, span)
            self._load = None
            groups = [self._group(each, () if i else spans) for i, each in enumerate(requests)]
            return [(groups, self.times.rollout_bytes * len(groups))]

        return self.working(sum(drawn), answer)

    def _group(self, request: SampleRequest, spans: tuple[Span, ...]) -> RolloutGroup:
        count = request.num_rollouts
        length = max(round(self.times.rollout_bytes / TOKEN_BYTES / count), 1)
        zeros = _zeros(count, length)
        return RolloutGroup(
            request=request,
            version=self._version,
            tokens=zeros.view(np.int32),
            logprobs=zeros,
            entropies=zeros,
            spans=spans,
        )

    def images(self, group: RolloutGroup) -> Work:
        def answer(begin: float, end: float) -> list[tuple[Any, float]]:
            return [
                (np.zeros((group.request.num_rollouts, 1, 1, 3), np.uint8), self.times.image_bytes),
                (Span(self.name, "decode", begin, end), 0.0),
            ]

        return self.working(self.takes("images", self.times.images, *group.request.key), answer)

    def images_of(self, groups: Sequence[RolloutGroup]) -> Work:
        """See `cluster.scheduling.joint_calls`."""
        works = [self.images(group) for group in groups]

        def answer(begin: float, end: float) -> list[tuple[Any, float]]:
            found = [work.answer(begin, end) for work in works]
            spans = [found[0][1][0], *(Span(self.name, "decode", end, end) for _ in works[1:])]
            return [*(images for images, _ in found), (spans, 0.0)]

        return self.working(sum(work.seconds for work in works), answer)


class SimulatedRewardServer(Worker):
    """A reward server: one group after another, statistics beside them.

    Args:
        feature_dim: D of its features.
    """

    def __init__(
        self, role: Role, name: str, times: Times, draws: Draws, feature_dim: int = 8
    ) -> None:
        super().__init__(role, name, times, draws)
        self._feature_dim, self._last = feature_dim, 0.0

    def thread_of(self, method: str) -> str:
        return "scoring" if method in ("score", "scores_of") else ""

    def fingerprint(self, panel: str, space: str = MAIN_SPACE) -> Work:
        return instant("simulated")

    def feature_dim(self, panel: str, space: str = MAIN_SPACE) -> Work:
        return instant(self._feature_dim)

    def score(self, request: SampleRequest, images: Any) -> Work:
        count = request.num_rollouts
        names = self.role.scorers.get(request.panel, ())
        spaces = self.role.spaces.get(request.panel, (MAIN_SPACE,))

        def answer(begin: float, end: float) -> list[tuple[Any, float]]:
            scores = GroupScores(
                key=request.key,
                scores={name: _rising(count) for name in names},
                features={space: _zeros(count, self._feature_dim) for space in spaces},
                errors=(None,) * count,
                spans=(Span(self.name, QUEUE, begin, begin), Span(self.name, "score", begin, end)),
            )
            return [(scores, 4.0 * count * (self._feature_dim * len(spaces) + len(names)))]

        mean = self.times.score.get(self.role.name, 0.0)
        return self.working(self.takes("score", mean, *request.key), answer)

    def scores_of(self, requests: Sequence[SampleRequest], *images: Any) -> Work:
        """See `cluster.scheduling.joint_calls`."""
        works = [self.score(*each) for each in zip(requests, images, strict=True)]

        def answer(begin: float, end: float) -> list[tuple[Any, float]]:
            found = [work.answer(end if i else begin, end)[0] for i, work in enumerate(works)]
            return [([scores for scores, _ in found], sum(size for _, size in found))]

        return self.working(sum(work.seconds for work in works), answer)


_shared: dict[tuple[int, int], np.ndarray] = {}


def _zeros(count: int, length: int) -> np.ndarray:
    """(count, length) float32, shared by all messages of a shape."""
    found = _shared.get((count, length))
    if found is None:
        found = _shared[count, length] = np.zeros((count, length), np.float32)
    return found


def _rising(count: int) -> np.ndarray:
    """(count,) float32: scores with a spread, so that advantages are not flat."""
    found = _shared.get((count, 0))
    if found is None:
        found = _shared[count, 0] = np.arange(count, dtype=np.float32)
    return found


Factory = Callable[[Role, str], Behaviour]
"""(role, name of a worker) -> what it does."""


def behaviours_of(plan: FleetPlan, factories: Mapping[str, Factory]) -> Callable[[str], Behaviour]:
    """Name of a worker -> what it does.

    Args:
        factories: by the name of the role.
    """
    roles = {role.name: role for role in plan.roles}

    def made(name: str) -> Behaviour:
        role = roles.get(name) or roles[name.rpartition("-")[0]]
        return factories[role.name](role, name)

    return made

"""The fleet of roles behind one interface: `InlineFleet` in this process, `RayFleet` on a cluster.

    submit(requests) -> batch           request groups, to be sampled and scored
    collect(batch) ->  [ScoredGroup]    wait for them, in the order of the requests
    broadcast(version)                  the learner's weights to every sampler
    learner, moments                    the two roles that exist once
    stream(requests), score_images(...) groups in order, as slots become free: for evaluations,
                                        whose fleets may have no learner and no moments server

A group is sampled with the weights of the last broadcast before it was submitted. The same requests
give the same groups, whichever sampler draws them and in whatever order they finish: bit for bit on
CPUs, and by design on GPUs with `reproducible`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch

from cluster.control.control_actor import Progress
from cluster.errors import ConfigError, FleetError, LearnerLostError, StopRequestedError
from cluster.messages import (
    MAIN_SPACE,
    GroupScores,
    SampleRequest,
    ScoredGroup,
    WeightSnapshot,
    merge_scores,
)
from cluster.roles import (
    FleetPlan,
    LearnerRole,
    MomentsRole,
    Pictures,
    RewardServerRole,
    Role,
    SamplerRole,
)
from cluster.scheduling.in_flight import STOPPED, PendingBatch
from cluster.scheduling.validation import ScoreChecks, check_images, check_rollouts

Result = TypeVar("Result")


class Fleet(Protocol):
    """See the module."""

    @property
    def learner(self) -> LearnerRole: ...

    @property
    def moments(self) -> MomentsRole: ...

    @property
    def restarts(self) -> int:
        """How many lost workers were replaced so far."""
        ...

    def report_progress(self, progress: Progress) -> None:
        """Set the progress that `python -m cluster.status` shows."""
        ...

    def submit(self, requests: Sequence[SampleRequest]) -> PendingBatch: ...

    def collect(self, batch: PendingBatch, *, finish: bool = False) -> list[ScoredGroup]:
        """Wait for a batch. Raises StopRequestedError if a stop is requested, without `finish`."""
        ...

    def stream(self, requests: Iterable[SampleRequest]) -> Iterator[ScoredGroup]:
        """Groups of any number of requests, in order, not for training. Each request is submitted
        when a slot is free (`FleetPlan.slots`).

        Raises:
            StopRequestedError: a stop was requested meanwhile.
        """
        ...

    def score_images(
        self, batches: Iterable[tuple[SampleRequest, Pictures]]
    ) -> Iterator[GroupScores]:
        """Scores of given images by the request's panel, in order. Batches are read as slots become
        free.

        Args:
            batches: a request, of which key, condition and panel count, and its K images: (K, H,
                W, 3) uint8, or a list of (H, W, 3) of any sizes.

        Raises:
            DataError: images that do not fit their request.
            StopRequestedError: a stop was requested meanwhile.
        """
        ...

    def sample_images(self, requests: Iterable[SampleRequest]) -> list[np.ndarray]:
        """Images (K, H, W, 3) uint8 of each request, unscored: for galleries, not for training.
        Each is submitted when a slot is free.

        Raises:
            StopRequestedError: a stop was requested meanwhile.
        """
        ...

    def features(self, batches: Iterable[Pictures], panel: str) -> dict[str, np.ndarray]:
        """Features of real images in a panel's spaces: (N, D) float32 each.

        Args:
            batches: (B, H, W, 3) uint8, or lists of (H, W, 3) of any sizes; N images in all.

        Raises:
            StopRequestedError: a stop was requested meanwhile.
        """
        ...

    def fingerprint(self, panel: str, space: str = MAIN_SPACE) -> str:
        """Identifies the network of a panel's feature space."""
        ...

    def feature_dim(self, panel: str, space: str = MAIN_SPACE) -> int:
        """Dimensions of a panel's feature space; 0 where they depend on the images."""
        ...

    def refresh_moments(self) -> None:
        """Have the moments server prepare for the next commit, without waiting."""
        ...

    def serve_while(self, work: Callable[[], Result]) -> Result:
        """Run work that may take seconds in a thread, and serve the fleet meanwhile; returns its
        result."""
        ...

    def broadcast(self, version: int) -> None:
        """Publish the learner's weights, which are of this policy version, for all requests from
        now on. Does not wait until every sampler has them."""
        ...

    def recover_learner(self, error: LearnerLostError) -> None:
        """Replace a lost learner by one with the base policy, and abandon all requests. The caller
        then restores learner and moments server, broadcasts, and submits again.

        Raises:
            FleetError: it was lost too often, or cannot start.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class InlineFleet:
    """All roles in this process, called in turn: for debugging, tests and small machines."""

    restarts = 0

    def __init__(self, plan: FleetPlan, should_stop: Callable[[], bool] = lambda: False) -> None:
        def build(role: Role) -> Any:
            return role.factory(role.config, name=role.worker_name(0)) if role.count else None

        if plan.learner.count > 1:
            raise ConfigError(
                f"{plan.learner.count} learners compute in processes of their own: leave --inline "
                "out, or set --num-learners 1"
            )
        on_gpus = [role.name for role in plan.roles if role.resources.num_gpus]
        if on_gpus and not torch.cuda.is_available():
            raise ConfigError(
                f"{', '.join(on_gpus)}: num_gpus asks for a GPU, and none is usable here: "
                "set num_gpus to 0 to compute on the CPU (--sampler.num-gpus, --reward.num-gpus, "
                "--learner.num-gpus)"
            )
        self._should_stop = should_stop
        self._base: WeightSnapshot | None = None
        self._learner: LearnerRole = build(plan.learner)
        self._moments: MomentsRole = build(plan.moments_server)
        self._sampler: SamplerRole = build(plan.sampler)
        self._plan = plan
        self._servers: dict[str, RewardServerRole] = {r.name: build(r) for r in plan.servers}
        self._submitted: dict[PendingBatch, list[SampleRequest]] = {}
        self._check = ScoreChecks()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._submitted.clear()

    @property
    def learner(self) -> LearnerRole:
        self._plan.need(self._plan.learner)
        return self._learner

    @property
    def moments(self) -> MomentsRole:
        self._plan.need(self._plan.moments_server)
        return self._moments

    def report_progress(self, progress: Progress) -> None:
        """Does nothing: no other process can ask for it."""

    def submit(self, requests: Sequence[SampleRequest]) -> PendingBatch:
        self._plan.need(self._plan.sampler)
        batch = PendingBatch([None] * len(requests))
        self._submitted[batch] = list(requests)
        return batch

    def collect(self, batch: PendingBatch, *, finish: bool = False) -> list[ScoredGroup]:
        if batch in self._submitted:
            self._work(batch, finish)
        return batch.results

    def _work(self, batch: PendingBatch, finish: bool) -> None:
        requests = self._submitted[batch]
        position = len(requests) - batch.missing
        for together in decoded_together(requests[position:], self._plan.sampler):
            if not finish:
                self._stop_if_asked()
            for group in self._groups(together):
                batch.put(position, group)
                position += 1
        del self._submitted[batch]

    def _stop_if_asked(self) -> None:
        if self._should_stop():
            raise StopRequestedError(STOPPED)

    def _groups(self, requests: Sequence[SampleRequest]) -> Iterator[ScoredGroup]:
        """Decode groups as one batch; score each."""
        for request, rollouts in zip(requests, self._sampler.sample(requests), strict=True):
            check_rollouts(rollouts, request, self._plan.sampler.worker_name(0))
            images, span = self._sampler.images(rollouts)
            scores = self._scores(request, images)
            yield ScoredGroup(rollouts=rollouts.with_span(span), scores=scores)

    def _scores(self, request: SampleRequest, images: Pictures) -> GroupScores:
        pools = self._plan.scoring_pools(request.panel)
        return merge_scores([self._score(role, request, images) for role in pools])

    def score_images(
        self, batches: Iterable[tuple[SampleRequest, Pictures]]
    ) -> Iterator[GroupScores]:
        for request, images in batches:
            self._stop_if_asked()
            check_images(images, request)
            yield self._scores(request, images)

    def stream(self, requests: Iterable[SampleRequest]) -> Iterator[ScoredGroup]:
        self._plan.need(self._plan.sampler)
        for request in requests:
            self._stop_if_asked()
            yield from self._groups([request])

    def _score(self, role: Role, request: SampleRequest, images: Pictures) -> GroupScores:
        scores = self._servers[role.name].score(request, images)
        names = {
            "scorers": role.scorers.get(request.panel),
            "spaces": role.spaces.get(request.panel),
        }
        self._check(scores, request, pool=role.name, worker=role.worker_name(0), **names)
        return scores

    def sample_images(self, requests: Iterable[SampleRequest]) -> list[np.ndarray]:
        self._plan.need(self._plan.sampler)
        images = []
        for request in requests:
            self._stop_if_asked()
            (rollouts,) = self._sampler.sample([request])
            images.append(self._sampler.images(rollouts)[0])
        return images

    def features(self, batches: Iterable[Pictures], panel: str) -> dict[str, np.ndarray]:
        server, parts = self._feature_server(panel), []
        for batch in batches:
            self._stop_if_asked()
            parts.append(server.features(batch, panel))
        return join_features(parts)

    def fingerprint(self, panel: str, space: str = MAIN_SPACE) -> str:
        return self._feature_server(panel).fingerprint(panel, space)

    def feature_dim(self, panel: str, space: str = MAIN_SPACE) -> int:
        return self._feature_server(panel).feature_dim(panel, space)

    def _feature_server(self, panel: str) -> RewardServerRole:
        return self._servers[self._plan.feature_server(panel).name]

    def recover_learner(self, error: LearnerLostError) -> None:
        raise error  # it is in this process and cannot be lost

    def refresh_moments(self) -> None:
        self.moments.refresh()

    def serve_while(self, work: Callable[[], Result]) -> Result:
        return work()  # no other process to serve

    def broadcast(self, version: int) -> None:
        for batch in list(self._submitted):  # sampled with the weights before these
            self._work(batch, finish=True)
        if self._plan.adapters_alone:
            self._base = self._base or self.learner.base_snapshot()
            found = self._sampler.load_weights(self.learner.adapter_snapshot(), self._base)
        else:
            found = self._sampler.load_weights(self.learner.snapshot())
        if found != version:
            raise FleetError(f"the learner published version {found}, expected {version}")


def decoded_together(
    requests: Sequence[SampleRequest], sampler: Role
) -> Iterator[Sequence[SampleRequest]]:
    """Requests in order, in parts that a sampler decodes as one batch: of one
    `SampleRequest.batch`, of 1, 2, 4, ... groups."""
    for _, run in groupby(requests, lambda request: request.batch):
        alike = list(run)
        most = sampler.groups_in_call(alike[0].rows)
        while alike:
            count = 1 << (min(len(alike), most).bit_length() - 1)
            yield alike[:count]
            alike = alike[count:]


def join_features(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Concatenate features of batches: space -> (N, D)."""
    return {space: np.concatenate([part[space] for part in parts]) for space in parts[0]}

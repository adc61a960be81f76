"""The reward-server role: scores images with panels of scorers, for many callers at once."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from cluster.errors import DataError
from cluster.messages import (
    MAIN_SPACE,
    Condition,
    GroupScores,
    RequestKey,
    SampleRequest,
    ServerStats,
)
from cluster.program.precision import start_computing
from cluster.roles import FEATURE_BATCH
from cluster.spans import QUEUE, Span
from rewards.base import FeatureExtractor, Images, Scorer, split_spaces
from rewards.config import (
    ACCURACY,
    JUDGE,
    R_PRECISION,
    REWARDS,
    JudgeConfig,
    RewardsConfig,
    RewardServerConfig,
)
from rewards.networks.features import load_features
from rewards.scorers.r_precision import RPrecision
from rewards.scorers.text_image import TextImageScorer
from rewards.servers.batcher import Batcher
from rewards.servers.panel import Panel, PanelScores


@dataclass(frozen=True)
class Job:
    """One request's images, ready to be scored."""

    key: RequestKey
    images: Images
    conditions: list[Condition]


class RewardServer:
    """Scores groups of images with the panel that the request names.

    `score` may be called from many threads, which receive and unpack images and pack results; one
    worker thread runs the scorers on batches of requests (`Batcher`).
    """

    def __init__(self, config: RewardServerConfig, name: str = "reward-server") -> None:
        start_computing(reproducible=config.reproducible)
        self.name, self._threads = name, config.num_threads
        self._panels = build_panels(config, config.batching.max_batch or None)
        self._failed = 0
        self._counting = threading.Lock()
        self._computing = threading.Lock()  # user code changes settings of the process
        self._at = ""  # what is being scored
        self._batcher: Batcher[Job, PanelScores] = Batcher(
            self._score_jobs,
            # which requests meet in a batch depends on the clock, and the batch on the rounding
            max_batch=0 if config.reproducible else config.batching.max_batch,
            max_wait_s=config.batching.max_wait_ms / 1000,
            max_queued=config.batching.max_queued,
            batch_timeout_s=config.timeout_s,
            name=name,
            activity=self._activity,
        )
        torch.set_num_threads(self._threads)
        for panel in self._panels.values():
            panel.warm()

    def fingerprint(self, panel: str, space: str = MAIN_SPACE) -> str:
        """Fingerprint of the network of a panel's feature space."""
        return self._extractors(panel)[space].fingerprint

    def feature_dim(self, panel: str, space: str = MAIN_SPACE) -> int:
        """D of that network's features; 0 if it depends on the images."""
        return int(getattr(self._extractors(panel)[space], "dim", 0))

    def score(self, request: SampleRequest, images: Images) -> GroupScores:
        """Score the K images of a group, (K, H, W, 3) uint8 or a list.

        Raises:
            DataError: no images, or no such panel here.
            FleetError: the queue stays full, or the worker thread ended.
            StuckError: a scorer exceeds the time limit.
        """
        self._panel(request.panel)
        if not isinstance(images, np.ndarray):
            images = [np.asarray(image) for image in images]
        job = Job(request.key, images, [request.condition] * len(images))
        scored, work = self._batcher.submit(job, max(len(images), 1), request.panel)
        with self._counting:
            self._failed += sum(error is not None for error in scored.errors)
        spans = [Span(self.name, QUEUE, work.arrived, work.start)]
        if work.first:  # one span a batch
            spans.append(Span(self.name, "score", work.start, work.end))
        return GroupScores(
            key=request.key,
            scores=scored.scores,
            features=scored.features,
            errors=scored.errors,
            spans=tuple(spans),
        )

    def features(
        self, images: Images, panel: str, batch: int = FEATURE_BATCH
    ) -> dict[str, np.ndarray]:
        """Features of N real images: space -> (N, D) float32."""
        torch.set_num_threads(self._threads)
        batches = [images[at : at + batch] for at in range(0, len(images), batch)]

        def run(extract: FeatureExtractor, part: Images) -> np.ndarray:
            with self._computing:
                return extract(part)

        found: dict[str, np.ndarray] = {}
        for space, extract in self._extractors(panel).items():
            values = np.concatenate([run(extract, part) for part in batches])
            found |= split_spaces(space, extract, values)
        return found

    def stats(self) -> ServerStats:
        """Counters so far."""
        return replace(self._batcher.stats(), failed=self._failed)

    def close(self) -> None:
        """Fail queued requests and end the worker thread."""
        self._batcher.close()

    def _activity(self) -> str:
        """The running scorer and its requests."""
        asked = ", ".join(panel.running for panel in self._panels.values() if panel.running)
        return f"{self._at} (scorer {asked or 'not known'})"

    def _panel(self, name: str) -> Panel:
        if name not in self._panels:
            raise DataError(
                f"{self.name} has no panel {name!r}: it has {', '.join(self._panels) or 'none'}"
            )
        return self._panels[name]

    def _extractors(self, panel: str) -> Mapping[str, FeatureExtractor]:
        extractors = self._panel(panel).extractors
        if MAIN_SPACE not in extractors:
            raise DataError(f"{self.name} runs no feature network for the panel {panel!r}")
        return extractors

    def _score_jobs(self, jobs: list[Job], panel: object) -> list[PanelScores]:
        """In the worker thread: score all images of some requests at once."""
        torch.set_num_threads(self._threads)
        first, more = jobs[0], f" and {len(jobs) - 1} more" if len(jobs) > 1 else ""
        stream, iteration, group = first.key
        self._at = f"group {group} of {stream} {iteration}{more}"
        score = self._panel(str(panel)).score
        with self._computing:
            if len(jobs) == 1:
                return [score(first.images, first.conditions)]
            images = [image for job in jobs for image in job.images]
            conditions = [condition for job in jobs for condition in job.conditions]
            scored = score(images, conditions)
        sizes = [len(job.conditions) for job in jobs]
        firsts = itertools.accumulate(sizes, initial=0)
        return [scored.part(first, size) for first, size in zip(firsts, sizes)]


def build_panels(config: RewardServerConfig, max_batch: int | None) -> dict[str, Panel]:
    """The panels of a server, with the scorers of its pool."""
    panels = {REWARDS: _rewards_panel(config.rewards, config.pool, config.device, max_batch)}
    if config.judge is not None:
        panels[JUDGE] = _judge_panel(config.judge, config.texts, config.device, max_batch)
    return panels


def _rewards_panel(config: RewardsConfig, pool: str, device: str, max_batch: int | None) -> Panel:
    scorers = {
        name: scorer.load(device)
        for name, scorer in config.scorers().items()
        if scorer.pool == pool
    }
    extractors: dict[str, FeatureExtractor] = {}
    if config.features_pool == pool:
        extractors = {
            space: load_features(each.features, device) for space, each in config.spaces().items()
        }
    return Panel(scorers, extractors, max_batch)


def _judge_panel(
    config: JudgeConfig, texts: Sequence[Condition], device: str, max_batch: int | None
) -> Panel:
    scorers: dict[str, Scorer] = {
        name: scorer.load(device) for name, scorer in config.scorers().items()
    }
    if config.r_precision:
        clip = scorers["clip"]
        assert isinstance(clip, TextImageScorer)
        scorers[R_PRECISION] = RPrecision(clip, texts)
    if config.classifier.enabled:
        scorers[ACCURACY] = config.classifier.load(device)
    extractors = {
        space: load_features(features, device, judge=True)
        for space, features in config.spaces().items()
    }
    return Panel(scorers, extractors, max_batch)

"""Messages between the roles: immutable, numpy payloads, no torch and no ray.

Shapes: K rollouts in a group, T tokens in a rollout, D feature dimensions, H and W pixels.

    SampleRequest --> sampler --> RolloutGroup
    RolloutGroup --> sampler --> images (K, H, W, 3) uint8
    images + request --> reward server --> GroupScores
    learner --> WeightSnapshot --> every sampler
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np

from cluster.bounds import check_at_most
from cluster.spans import Span

MAIN_SPACE = "features"
"""The feature space of a panel's first extractor; evaluation may use further ones."""
TRAIN = "train"
"""The stream of requests that are trained on."""
Guidance = Literal["none", "guided", "distil"]
LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-5, 1e3
"""Below, logits overflow when they are divided; LlamaGen's script clamps at the same value. Above,
any policy is a uniform distribution to within rounding."""
MOST_CFG_SCALE = 100.0
MOST_TOP_K = 1 << 20  # more than any vocabulary has


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSpec:
    """Which distribution tokens are drawn from, and whose log-probability is learned.

    Order of the transforms: guidance, temperature, top-k, top-p, softmax (renormalised).

    guidance:
        none    sample and learn the conditional policy; needs cfg_scale = 1
        guided  the policy *is* the mixture uncond + cfg_scale * (cond - uncond)
        distil  sample the mixture, learn the conditional policy (the paper's public code); the
                ratio is then not 1 on-policy
    """

    temperature: float = 1.0
    """Divisor of the logits, from 1e-5 to 1000; 1 leaves them as they are."""
    top_k: int = 0
    """Keep the k most likely tokens (ties at rank k stay), at most 2^20; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches p; in (0, 1], 1 keeps all."""
    cfg_scale: float = 1.0
    """Classifier-free guidance scale s of uncond + s (cond - uncond), 0 to 100: 1 is no guidance, 0
    the unconditional policy, between them a mixture. LlamaGen's script differs below 1: it guides
    above 1 alone, and samples the conditional policy at every scale from 0 to 1."""
    guidance: Guidance = "none"
    """Classifier-free guidance: none, guided or distil; see the class."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, found {self.temperature}")
        if self.temperature < LEAST_TEMPERATURE:
            raise ValueError(
                f"temperature must be at least {LEAST_TEMPERATURE:g} (logits overflow below), "
                f"found {self.temperature:g}; top_k 1 draws the likeliest token"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 keeps every token), found {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], found {self.top_p}")
        if not self.cfg_scale >= 0:
            raise ValueError(f"cfg_scale must be >= 0, found {self.cfg_scale}")
        check_at_most(
            self, temperature=MOST_TEMPERATURE, top_k=MOST_TOP_K, cfg_scale=MOST_CFG_SCALE
        )
        if self.guidance not in ("none", "guided", "distil"):
            raise ValueError(f"guidance must be none, guided or distil, found {self.guidance!r}")
        if self.guidance == "none" and self.cfg_scale != 1:
            raise ValueError(
                f"cfg_scale {self.cfg_scale} has no effect with guidance 'none': "
                "choose guidance 'guided' or 'distil', or leave cfg_scale at 1"
            )

    @property
    def guided_sampling(self) -> bool:
        """Whether decoding needs the unconditional branch."""
        return self.guidance != "none" and self.cfg_scale != 1

    @property
    def rows(self) -> int:
        """Rows of a decoding step for each rollout."""
        return 2 if self.guided_sampling else 1

    @property
    def guidance_note(self) -> str:
        """What a scale below 1 means, where it means another thing elsewhere; else empty."""
        if self.guidance == "none" or self.cfg_scale >= 1:
            return ""
        here = (
            "draws from the unconditional policy"
            if not self.cfg_scale
            else ("draws between the unconditional and the conditional policy")
        )
        return (
            f"a guidance scale of {self.cfg_scale:g} {here}, which LlamaGen's script does not do: "
            "it samples without guidance at every scale up to 1, as 1 does here"
        )

    def learned(self) -> SamplingSpec:
        """The spec whose log-probabilities the learner computes (differs under `distil` only)."""
        if self.guidance != "distil":
            return self
        return SamplingSpec(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    @property
    def filters(self) -> bool:
        """Whether tokens may be filtered out, by top-k or top-p."""
        return self.top_k > 0 or self.top_p < 1

    def unfiltered(self) -> SamplingSpec:
        """The spec without top-k and top-p: same temperature, same guidance."""
        return replace(self, top_k=0, top_p=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureRow:
    """A caption's features as a row of a Parquet file, which the sampler reads: they may have 1 MB
    a caption, too much to send."""

    path: str
    """Absolute, on storage that every node reads."""
    row: int
    digest: int
    """Of the numbers and their shape, to notice a changed file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """What an image is to show: a class of the policy, and its text."""

    text: str
    """Read by text-image scorers, and by caption-conditional policies."""
    class_index: int | None = None
    """Row of the class table, for class-conditional policies and classifiers."""
    features: np.ndarray | FeatureRow | None = field(default=None, compare=False, repr=False)
    """(n, D) float: a text encoder's features of the caption, unpadded, for caption-conditional
    policies; or a reference to them. Not compared: they follow from the text."""


class RequestKey(NamedTuple):
    """Identity of a group; with the run's seed it determines the group's uniforms."""

    stream: str
    iteration: int
    group: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """Requests one group: K rollouts of one condition."""

    stream: str
    """What the group is for: "train", "moments", "evaluate", "gallery". Each has its own noise."""
    iteration: int
    group: int
    """Number of the group within its iteration."""
    condition: Condition
    num_rollouts: int
    seed: int
    """The run's seed."""
    spec: SamplingSpec
    panel: str = "rewards"
    """Which panel scores the images: "rewards" or "judge"."""
    image_size: int = 0
    """Height and width that the images are resized to, pixels; 0: as they are decoded."""

    def __post_init__(self) -> None:
        if self.num_rollouts < 1:
            raise ValueError(f"num_rollouts must be >= 1, found {self.num_rollouts}")
        if self.image_size < 0:
            raise ValueError(f"image_size must be >= 0, found {self.image_size}")
        if min(self.iteration, self.group, self.seed) < 0:
            raise ValueError("iteration, group and seed must be >= 0")

    @property
    def key(self) -> RequestKey:
        return RequestKey(self.stream, self.iteration, self.group)

    @property
    def rows(self) -> int:
        """Rows of a decoding step; guided rollouts take two each."""
        return self.num_rollouts * self.spec.rows

    @property
    def batch(self) -> tuple[Hashable, ...]:
        """Requests with the same value may be decoded together."""
        return (self.stream, self.iteration, self.num_rollouts, self.spec)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """K rollouts of one condition (the images travel apart)."""

    request: SampleRequest
    version: int
    """Policy version that drew the tokens."""
    tokens: np.ndarray
    """(K, T) int32, raster order."""
    logprobs: np.ndarray
    """(K, T) float32: behaviour logprobs, after guidance, temperature and filters."""
    entropies: np.ndarray
    """(K, T) float32, nats: entropy of the distribution each token was drawn from."""
    spans: tuple[Span, ...] = ()

    def with_span(self, span: Span) -> RolloutGroup:
        """The group with one more span."""
        return replace(self, spans=(*self.spans, span))


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupScores:
    """Scores and features of one group by one reward server. Row k belongs to rollout k."""

    key: RequestKey
    scores: dict[str, np.ndarray]
    """Scorer name -> (K,) float32; NaN where `errors` has a message."""
    features: dict[str, np.ndarray]
    """Feature space -> (K, D) float32; rows of failed images are NaN."""
    errors: tuple[str | None, ...]
    """Per image: None, or the error; a failed image has no score."""
    spans: tuple[Span, ...] = ()

    @property
    def valid(self) -> np.ndarray:
        """(K,) bool: which images were scored."""
        return np.array([error is None for error in self.errors], dtype=bool)


def merge_scores(parts: Sequence[GroupScores]) -> GroupScores:
    """Merge the scores of one group by servers with different scorers.

    Args:
        parts: in a fixed order: an image's error is that of the first part that has one. An image
            that failed in any part has no scores at all.
    """
    if len(parts) == 1:
        return parts[0]
    by_image = zip(*(part.errors for part in parts), strict=True)
    errors = tuple(next((error for error in row if error), None) for row in by_image)
    failed = np.array([error is not None for error in errors], dtype=bool)

    def merged(columns: Iterable[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        found = {name: values.copy() for column in columns for name, values in column.items()}
        for values in found.values():
            values[failed] = np.nan
        return found

    return GroupScores(
        key=parts[0].key,
        scores=merged(part.scores for part in parts),
        features=merged(part.features for part in parts),
        errors=errors,
        spans=tuple(span for part in parts for span in part.spans),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStats:
    """Counters of a reward server."""

    requests: int = 0
    """Answered requests."""
    images: int = 0
    failed: int = 0
    """Images that were answered with an error."""
    batches: int = 0
    """Runs of the scorers; images / batches is the mean batch."""
    queued_images: int = 0
    """Images that wait now."""
    wait_mean_s: float = 0.0
    """Seconds from a request's arrival to its scoring, over the newest requests."""
    wait_p95_s: float = 0.0
    busy_s: float = 0.0
    """Seconds in which scorers ran."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """A group with its scores."""

    rollouts: RolloutGroup
    scores: GroupScores


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSnapshot:
    """A state dict in transit, or the adapters of one: see `cluster.weights`."""

    version: int
    manifest: bytes
    """msgpack: names, dtypes, shapes, offsets, base, checksums."""
    buffer: np.ndarray = field(repr=False)
    """(n,) uint8, every tensor 64-byte aligned; read-only in shared memory. Out of a broadcast
    group, a tensor of the same kind, on any device; from other hosts, `snapshots.pieces.Pieces`."""
    base: int | None = None
    """Version of the full snapshot that this one builds upon; None is a full one."""

    @property
    def nbytes(self) -> int:
        return int(self.buffer.nbytes)

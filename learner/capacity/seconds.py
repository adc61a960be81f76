"""Seconds of each phase of an iteration on a GPU, by arithmetic: bytes, operations and launches of
the work against a card's figures. Estimates: none of the factors below was measured on a GPU.

A kernel takes the longest of its memory traffic, its operations and its launch; a phase is the sum
over its kernels, and what bounds it is the kind that the largest part of its time goes to.

Units: seconds, bytes, FLOP. Shapes: T tokens, K rollouts of a group, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from learner.capacity.cards import Card
from learner.training.data_parallel import GATHERED_BELOW
from rewards.base import ImageWork

Bound = Literal["memory", "compute", "launches", "copies", "CPU"]

# Assumed shares of a card's peaks, and assumed times of what has no peak: expectations, with their
# reasons. A measurement on a GPU replaces each of them.
MEMORY = 0.9  # of the bandwidth: 4.3 of 4.8 TB/s are expected of large copies on an H200
PRODUCTS = 0.8  # of the bf16 peak: 790 of 989 are expected of products of 8192 x 8192
PRODUCTS_FP32 = 0.75  # of the fp32 peak: cuBLAS without tensor cores
LAUNCH = 2.5e-6  # s a kernel of a replayed CUDA graph
EAGER_LAUNCH = 6e-6  # s a kernel that Python launches
FUSED_KERNELS, PLAIN_KERNELS = 8, 27  # of LlamaGen's layer in a step (actors/DESIGN.md)
FUSED_PRODUCTS, PLAIN_PRODUCTS = 4, 5  # of those, products with weights (w1 and w3 merged, or not)
FUSED_ATTENTION, PLAIN_ATTENTION = 0.85, 0.55  # of MEMORY: one query a row; PyTorch's takes a mask
WINDOW = 64  # slots that PyTorch's attention reads whole; the own kernel reads filled ones alone
FUSED_DRAW, PLAIN_DRAW = 4, 30  # passes over a step's fp32 logits: guidance, filters, sums, draw
FUSED_DRAW_KERNELS, PLAIN_DRAW_KERNELS = 1, 20
VIT_BF16 = 0.35  # of the bf16 peak: 1,000 images/s of ViT-H-14, in batches of 64
CONVOLUTION_BF16 = 0.3  # of the bf16 peak: a VQ decoder, half of whose kernels move memory
CONVOLUTION_FP32 = 1.2  # of the fp32 peak: Winograd's algorithm saves products of 3 x 3
PREPROCESSING = 1e-4  # s an image and network: resizing, normalising, host to device
LEARN_EAGER, LEARN_COMPILED = 0.345, 0.41  # of the bf16 peak in large microbatches: passes under
# autocast are about half products; compiled, their pointwise kernels are fused
LEARN_FP32 = 0.7  # of the fp32 peak
FILLS = 2048  # tokens of a microbatch at which a card reaches half of those shares
LEARN_KERNELS = 30  # of a layer's forward pass; the backward pass has twice as many
COMPILED_KERNELS = 0.4  # of these, what is left of them when a block is compiled
ADAMW = 28  # bytes a parameter: weight, gradient and two averages read, three written
HOST_COPY = 10e9  # bytes/s: one thread into or out of the object store
FIGURES_BASE, FIGURES_EACH = 12.0, 0.002  # s, and s an image, on two CPU cores: 226 s of CPU time
# were measured for 50,000 images in the spaces of Inception
REUSED_FID, MEASURED_DIM = 0.062, 2048  # s of a LOO-FID of 128 images, measured on two CPU cores


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """Sizes of a policy."""

    layers: int
    dim: int
    cached: int
    """Numbers of a token's keys in a layer's cache: `dim`, or more where heads are padded."""
    tokens: int
    """T of an image."""
    vocabulary: int
    block: int
    """Parameters of one layer."""
    parameters: int
    """Of all."""

    @property
    def head(self) -> int:
        return self.vocabulary * self.dim

    @property
    def forward(self) -> float:
        """FLOP of one token in a teacher-forced pass: products, causal attention."""
        return 2 * (self.layers * self.block + self.head + self.layers * self.tokens * self.dim)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """One sampler's part of an iteration."""

    groups: int
    rows: int
    """Batch rows of a group: K, twice that under guidance."""
    drawn: int
    """Rollouts of a group (K)."""
    max_groups: int
    width: int
    """Bytes of a weight and of a cached number."""
    fused: bool
    """Decodes with own kernels, not PyTorch's."""
    image_flops: float
    """Of the tokenizer's decoder, for one image."""
    image_bf16: bool

    @property
    def calls(self) -> list[int]:
        """Groups of each call: as many as may and wait, in powers of two."""
        left, found = self.groups, list[int]()
        while left:
            found.append(min(self.max_groups, 1 << (left.bit_length() - 1)))
            left -= found[-1]
        return found


@dataclass(frozen=True, kw_only=True)
class Learning:
    """One learner's part of an iteration."""

    rollouts: int
    rows: int
    """Batch rows of a rollout: 2 with a guided policy."""
    microbatch: int
    passes_before: int
    """Forward passes over all rollouts before the updates: reference, proximal policy."""
    updates: int
    checkpointing: bool
    bf16: bool
    compiled: bool
    learners: int = 1
    """Of the group; they share weights and gradients."""


@dataclass(frozen=True)
class Phase:
    """One phase of an iteration."""

    name: str
    role: str
    """Whose worker does it."""
    seconds: float
    bound: Bound


class _Costs:
    """Seconds by what bounds them."""

    def __init__(self) -> None:
        self._seconds: dict[Bound, float] = defaultdict(float)

    def add(self, kind: Bound, seconds: float) -> None:
        self._seconds[kind] += seconds

    def kernels(
        self, count: int, launch: float, parts: Mapping[Bound, float], times: float = 1
    ) -> None:
        """Add kernels that take the longest of some parts and of their launches."""
        longest: dict[Bound, float] = {"launches": count * launch, **parts}
        kind = max(longest, key=longest.__getitem__)
        self.add(kind, times * longest[kind])

    def phase(self, name: str, role: str) -> Phase:
        bound = max(self._seconds, key=self._seconds.__getitem__)
        return Phase(name, role, sum(self._seconds.values()), bound)


@functools.cache
def sample(model: Transformer, work: Sampling, card: Card, role: str = "sampler") -> Phase:
    """Decode the tokens of a sampler's groups, call after call."""
    costs = _Costs()
    for size, calls in Counter(work.calls).items():
        for filled in range(1, model.tokens + 1):
            _decode_step(costs, model, work, size, filled, card, calls)
    return costs.phase("sample", role)


def _decode_step(
    costs: _Costs,
    model: Transformer,
    work: Sampling,
    groups: int,
    filled: int,
    card: Card,
    calls: int,
) -> None:
    """One token of `groups` groups, with `filled` slots of the cache in use, in so many calls."""
    rows, layers = groups * work.rows, calls * model.layers
    bandwidth, rate = MEMORY * card.bandwidth, _products(card, work.width == 2)

    def product(weights: int) -> dict[Bound, float]:
        return {"memory": work.width * weights / bandwidth, "compute": 2 * rows * weights / rate}

    products = FUSED_PRODUCTS if work.fused else PLAIN_PRODUCTS
    costs.kernels(products, LAUNCH, product(model.block), layers)
    slots = filled if work.fused else min(-(-filled // WINDOW) * WINDOW, model.tokens)
    cache = 2 * rows * slots * model.cached * work.width
    reached = FUSED_ATTENTION if work.fused else PLAIN_ATTENTION
    costs.kernels(1, LAUNCH, {"memory": cache / (bandwidth * reached)}, layers)
    others = (FUSED_KERNELS if work.fused else PLAIN_KERNELS) - products - 1
    costs.kernels(others, LAUNCH, {}, layers)
    costs.kernels(1, LAUNCH, product(model.head), calls)
    passes = FUSED_DRAW if work.fused else PLAIN_DRAW
    logits = 4 * groups * work.drawn * model.vocabulary
    kernels = FUSED_DRAW_KERNELS if work.fused else PLAIN_DRAW_KERNELS
    costs.kernels(kernels, LAUNCH, {"memory": passes * logits / bandwidth}, calls)


def _products(card: Card, bf16: bool) -> float:
    return PRODUCTS * card.bf16 if bf16 else PRODUCTS_FP32 * card.fp32


def decode_images(work: Sampling, card: Card, role: str = "sampler") -> Phase:
    """Tokens of a sampler's groups to pixels."""
    rate = CONVOLUTION_BF16 * card.bf16 if work.image_bf16 else CONVOLUTION_FP32 * card.fp32
    seconds = work.groups * work.drawn * work.image_flops / rate
    return Phase("images", role, seconds, "compute")


def score(name: str, role: str, images: float, networks: Sequence[ImageWork], card: Card) -> Phase:
    """Run networks over a server's images."""
    costs = _Costs()
    costs.add("CPU", images * len(networks) * PREPROCESSING)
    for network in networks:
        costs.add("compute", images * network.flops / _network_rate(network, card))
    return costs.phase(name, role)


def _network_rate(network: ImageWork, card: Card) -> float:
    if network.bf16:
        return (CONVOLUTION_BF16 if network.convolutions else VIT_BF16) * card.bf16
    return (CONVOLUTION_FP32 if network.convolutions else PRODUCTS_FP32) * card.fp32


def moments(images: int, spaces: Sequence[tuple[int, bool]], role: str = "moments-server") -> Phase:
    """The commit of an iteration's features. It uses an older decomposition of the history; new
    ones are made beside learning, and no one waits for them.

    Args:
        spaces: of each feature space its dimensions, and whether its covariance is full.
    """
    parts = (REUSED_FID * (dim / MEASURED_DIM) ** (2 if full else 1) for dim, full in spaces)
    seconds = sum(parts) * max(images / 128, 1) ** 0.2
    return Phase("moments", role, seconds, "CPU")


def figures(images: int) -> float:
    """FID, precision, recall and the others of an evaluation, in the driver. Neighbours of 10,000
    real images grow with the images; the rest hardly does."""
    return FIGURES_BASE + FIGURES_EACH * images


def learning_flops(model: Transformer, work: Learning) -> float:
    """What a learner computes in an iteration."""
    tokens = work.rollouts * work.rows * model.tokens
    head = 2 * model.head  # logits exist in pieces and are computed again in the backward pass
    again = head + (model.forward - head if work.checkpointing else 0)
    return tokens * (
        work.passes_before * model.forward + work.updates * (3 * model.forward + again)
    )


def learn(model: Transformer, work: Learning, card: Card, role: str = "learner") -> Phase:
    """Logprobs of the reference, updates, AdamW."""
    microbatch = min(work.microbatch, work.rollouts)
    passes = -(-work.rollouts // microbatch)
    tokens = microbatch * work.rows * model.tokens
    if work.bf16:
        rate = (LEARN_COMPILED if work.compiled else LEARN_EAGER) * card.bf16
    else:
        rate = LEARN_FP32 * card.fp32
    compute = learning_flops(model, work) / (rate * tokens / (tokens + FILLS))
    each = model.layers * LEARN_KERNELS * (COMPILED_KERNELS if work.compiled else 1)
    of_update = 3 + work.checkpointing  # in units of a forward pass
    kernels = passes * each * (work.passes_before + work.updates * of_update)
    parts: dict[Bound, float] = {"compute": compute}
    if work.learners > 1:
        parts["copies"] = exchanged(model, work) / card.link
    costs = _Costs()
    costs.kernels(math.ceil(kernels), EAGER_LAUNCH, parts)
    adamw = work.updates * ADAMW * model.parameters / work.learners
    costs.add("memory", adamw / (MEMORY * card.bandwidth))
    return costs.phase("learn", role)


def exchanged(model: Transformer, work: Learning) -> float:
    """Bytes of an iteration between neighbours in a ring of learners: all-gathers of weights, and
    of an update fp32 gradients once."""
    passes = -(-work.rollouts // min(work.microbatch, work.rollouts))
    gathers = 1 if model.parameters < GATHERED_BELOW else 2 * passes
    sent = gathers * (2 if work.bf16 else 4) + 4
    return float(work.updates * sent * model.parameters)


def publish(model: Transformer, width: int, card: Card, role: str = "learner") -> Phase:
    """Weights of one learner into the object store, through one pinned buffer; a group's copy to
    host memory, in fp32, is not counted."""
    size = width * model.parameters
    return Phase("publish", role, size / card.pcie + size / HOST_COPY, "copies")


def load(model: Transformer, width: int, card: Card, role: str = "sampler") -> Phase:
    """Weights from the object store into a sampler, through a staging buffer."""
    size = width * model.parameters
    return Phase("load", role, size / HOST_COPY + size / card.pcie, "copies")

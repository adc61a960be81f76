"""The sampler role: holds a policy's weights and answers requests with groups of rollouts."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from actors.checkpoints.loading import PolicyConfig, TokenizerConfig, load_decoder, load_policy
from actors.decoding.decode import decode_tokens, rollout_uniforms
from actors.decoding.steps import Workspace
from actors.kernels import plain
from cluster.clock import epoch
from cluster.errors import CheckpointError, FleetError
from cluster.messages import TRAIN, RolloutGroup, SampleRequest, WeightSnapshot
from cluster.program.precision import refusals_explained, start_computing
from cluster.roles import Resources
from cluster.spans import Span
from cluster.weights import load_weights

KEPT_LOADS = 64  # spans, of a sampler that gets no training requests


@dataclass(frozen=True, kw_only=True)
class SamplerResources(Resources):
    """What a sampler takes of its machine, and how exactly it computes."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the policy's weights and activations while sampling. With bfloat16 the head's
    operands are rounded, its sums are not: logits are fp32. Behaviour and learner logprobs differ
    slightly (policy/mismatch_kl)."""
    image_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which the tokenizer turns tokens into images. bfloat16 is faster on a GPU, and moves
    pixels: of the miniature by at most one of 255 levels, of VQ-16 with random weights by one on
    average and nine at most."""
    max_groups: int = 1
    """Most groups of an iteration that a sampler decodes as one batch: 1, 2, 4, ... fill a GPU when
    groups are small. With more than 1, other batch sizes round differently, so that results depend
    on timing: first in their last bits, later in whole tokens."""
    kernels: Literal["auto", "torch"] = "auto"
    """What decoding computes with between its matrix products. auto: on CUDA Triton's kernels, or,
    with a message that says why, plain PyTorch. torch: plain PyTorch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_groups < 1 or self.max_groups.bit_count() != 1:
            raise ValueError(f"max_groups must be 1, 2, 4, 8, ..., found {self.max_groups}")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """A sampler's models and device."""

    policy: PolicyConfig = field(default_factory=PolicyConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    resources: SamplerResources = field(default_factory=SamplerResources)
    reproducible: bool = False
    own_weights: bool = False
    """Load the weights of `policy`, as version 0: no learner will send any."""


class Sampler:
    """Decodes groups with the weights it loaded last.

    `images` needs the frozen decoder only: it may run in a thread beside `sample`. All others must
    be called in turn.
    """

    def __init__(self, config: SamplerConfig, name: str = "sampler") -> None:
        start_computing(reproducible=config.reproducible)
        self.name = name
        self.version = 0 if config.own_weights else -1  # -1: no weights yet
        resources = config.resources
        self._device, self._threads = resources.device, resources.num_threads
        dtype = getattr(torch, resources.dtype)
        self._policy = load_policy(
            config.policy, weights=config.own_weights, device=self._device, dtype=dtype
        )
        image_dtype = getattr(torch, resources.image_dtype)
        self._decoder = load_decoder(config.tokenizer, device=self._device, dtype=image_dtype)
        kernels = plain if resources.kernels == "torch" else None
        self._workspace = Workspace(self._policy, kernels=kernels)
        self._loads: deque[Span] = deque(maxlen=KEPT_LOADS)  # not yet reported with a group
        self._stream: torch.cuda.Stream | None = None
        if torch.device(self._device).type == "cuda":
            self._stream = torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.current_stream())  # for the decoder's weights

    def load_weights(self, snapshot: WeightSnapshot, base: WeightSnapshot | None = None) -> int:
        """Load a snapshot into the policy; returns its version.

        Args:
            base: the full snapshot that `snapshot` builds upon, where it does.

        Raises:
            CheckpointError: damaged, older than the present one, of another base or architecture.
                The weights are then unchanged.
        """
        if snapshot.version < self.version:
            raise CheckpointError(
                f"{self.name} holds version {self.version} and refuses the older {snapshot.version}"
            )
        torch.set_num_threads(self._threads)
        start = epoch()
        load_weights(self._policy, snapshot, base)
        self.version = snapshot.version
        self._loads.append(Span(self.name, "load", start, epoch()))
        return self.version

    def forget_weights(self) -> None:
        """Refuse requests until weights of any version are loaded: the learner returned to a
        checkpoint."""
        self.version = -1

    @refusals_explained("sampling")
    def sample(self, requests: Sequence[SampleRequest]) -> list[RolloutGroup]:
        """Decode the tokens of some groups as one batch. The first one has the span; in training,
        also those of weights loaded since.

        Args:
            requests: of one batch (`SampleRequest.batch`).

        Raises:
            FleetError: no weights were loaded yet.
        """
        if self.version < 0:
            raise FleetError(f"{self.name} was asked to sample before it was given weights")
        torch.set_num_threads(self._threads)
        start = epoch()

        first = requests[0]
        if any(request.batch != first.batch for request in requests):
            raise FleetError(
                f"{self.name} was asked to decode requests together that differ in stream, "
                f"iteration, number of rollouts or spec: {sorted({r.batch[:3] for r in requests})}"
            )
        uniforms = [
            rollout_uniforms(r.seed, r.key, r.num_rollouts, self._policy.num_tokens)
            for r in requests
        ]
        decoded = decode_tokens(
            self._policy,
            self._policy.encode([r.condition for r in requests for _ in range(r.num_rollouts)]),
            torch.from_numpy(np.concatenate(uniforms)).to(self._device),
            first.spec,
            self._workspace,
        )
        tokens = decoded.tokens.to(torch.int32).cpu().numpy()
        logprobs, entropies = decoded.logprobs.cpu().numpy(), decoded.entropies.cpu().numpy()
        groups = []
        for index, request in enumerate(requests):
            rows = slice(index * first.num_rollouts, (index + 1) * first.num_rollouts)
            group = RolloutGroup(
                request=request,
                version=self.version,
                tokens=tokens[rows],
                logprobs=logprobs[rows],
                entropies=entropies[rows],
            )
            groups.append(group)
        spans = (*self._take_loads(first), Span(self.name, "sample", start, epoch()))
        groups[0] = replace(groups[0], spans=spans)
        return groups

    def _take_loads(self, request: SampleRequest) -> tuple[Span, ...]:
        if request.stream != TRAIN:
            return ()
        loads = tuple(self._loads)
        self._loads.clear()
        return loads

    @refusals_explained("the tokenizer's decoder")
    @torch.inference_mode()
    def images(self, group: RolloutGroup) -> tuple[np.ndarray, Span]:
        """Decode a group's tokens to images.

        Returns:
            Images (K, H, W, 3) uint8, and the span; apart, since they travel apart.
        """
        torch.set_num_threads(self._threads)
        start = epoch()
        with self._image_stream():
            tokens = torch.from_numpy(group.tokens.astype(np.int64)).to(self._device)
            codes, size = self._policy.codes(tokens), group.request.image_size
            images = self._decoder.pixels(codes, size).cpu().numpy()
        return images, Span(self.name, "decode", start, epoch())

    def _image_stream(self) -> AbstractContextManager[object]:
        """A CUDA stream beside that of `sample`, so that neither waits for the other."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

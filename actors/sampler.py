"""The sampler role: holds a policy's weights and answers requests with groups of rollouts."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from actors.decode import decode_tokens, rollout_uniforms
from actors.models.loading import PolicyConfig, TokenizerConfig, load_decoder, load_policy
from actors.steps import Workspace
from cluster.errors import CheckpointError, FleetError
from cluster.messages import RolloutGroup, SampleRequest, Span, WeightSnapshot
from cluster.roles import Resources
from cluster.weights import load_weights


@dataclass(frozen=True, kw_only=True)
class SamplerResources(Resources):
    """What a sampler takes of its machine, and how exactly it computes."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the policy's weights while sampling; logits are fp32 either way. With bfloat16, behaviour
    and learner logprobs part a little (policy/mismatch_kl)."""


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """A sampler's models and device."""

    policy: PolicyConfig = field(default_factory=PolicyConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    resources: SamplerResources = field(default_factory=SamplerResources)


class Sampler:
    """Decodes groups with the weights it was last given."""

    def __init__(self, config: SamplerConfig, name: str = "sampler") -> None:
        self.name = name
        self.version = -1  # no weights yet: it refuses to serve
        resources = config.resources
        self._device, self._threads = resources.device, resources.num_threads
        dtype = getattr(torch, resources.dtype)
        self._policy = load_policy(config.policy, weights=False, device=self._device, dtype=dtype)
        self._decoder = load_decoder(config.tokenizer, device=self._device)
        self._workspace = Workspace(self._policy)

    def load_weights(self, snapshot: WeightSnapshot, base: WeightSnapshot | None = None) -> int:
        """Take up a snapshot; returns its version.

        Args:
            base: the full snapshot that `snapshot` builds upon, where it does.

        Raises:
            CheckpointError: damaged, older than what is held, of another base or architecture. What
                was held before is still there.
        """
        if snapshot.version < self.version:
            raise CheckpointError(
                f"{self.name} holds version {self.version} and refuses the older {snapshot.version}"
            )
        torch.set_num_threads(self._threads)
        load_weights(self._policy, snapshot, base)
        self.version = snapshot.version
        return self.version

    def forget_weights(self) -> None:
        """Refuse to serve until weights are loaded again, of whatever version: the learner went
        back to a checkpoint."""
        self.version = -1

    def sample(self, request: SampleRequest) -> tuple[RolloutGroup, np.ndarray]:
        """Decode one group.

        Returns:
            The rollouts, and their images (K, H, W, 3) uint8: apart, because they travel apart.

        Raises:
            FleetError: no weights were loaded yet.
        """
        if self.version < 0:
            raise FleetError(f"{self.name} was asked to sample before it was given weights")
        torch.set_num_threads(self._threads)
        start = time.time()
        uniforms = rollout_uniforms(
            request.seed, request.key, request.num_rollouts, self._policy.num_tokens
        )
        decoded = decode_tokens(
            self._policy,
            self._policy.encode([request.condition] * request.num_rollouts),
            torch.from_numpy(uniforms).to(self._device),
            request.spec,
            self._workspace,
        )
        middle = time.time()
        images = self._images(decoded.tokens)
        end = time.time()
        group = RolloutGroup(
            request=request,
            version=self.version,
            tokens=decoded.tokens.to(torch.int32).cpu().numpy(),
            logprobs=decoded.logprobs.cpu().numpy(),
            entropies=decoded.entropies.cpu().numpy(),
            spans=(
                Span(self.name, "sample", start, middle),
                Span(self.name, "decode", middle, end),
            ),
        )
        return group, images

    @torch.inference_mode()
    def _images(self, tokens: torch.Tensor) -> np.ndarray:
        """(K, T) tokens -> (K, H, W, 3) uint8."""
        return self._decoder.pixels(self._policy.codes(tokens)).cpu().numpy()

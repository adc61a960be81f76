"""The policy under training: fp32 weights, passes in the wanted precision, its frozen reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from actors.decode import token_logprobs
from actors.models.base import Conditions
from actors.models.loading import PolicyConfig, PolicyModule, load_policy
from cluster.messages import SamplingSpec
from cluster.tensors import load_strict, read_tensors, write_tensors
from learner.adapters import Adapters
from learner.optimizer import OptimizerConfig

POLICY_FILE = "policy.safetensors"
ADAPTERS_FILE = "adapters.safetensors"


class TrainedPolicy:
    """Weights with gradients, and what they started from.

    The module stays in eval mode: these policies have no dropout layers, and their condition
    dropout belongs to pre-training alone, so every pass gives the same logprobs as the sampler.
    """

    def __init__(
        self, config: PolicyConfig, options: OptimizerConfig, *, reference: bool, seed: int = 0
    ) -> None:
        """
        Args:
            reference: whether `reference_logprobs` will be asked for.
            seed: the run's; adapters start from it.
        """
        self._options, self.device = options, options.device
        self.module = load_policy(config, device=self.device).requires_grad_(True)
        self.module.checkpointing = options.checkpointing
        self._adapters: Adapters | None = None
        if options.lora.rank:
            self._adapters = Adapters(self.module, options.lora, seed)
        self._reference: PolicyModule | None = None
        if reference and self._adapters is None:
            kept = self.device if options.reference_device == "learner" else "cpu"
            self._reference = load_policy(config, device=kept)

    def logprobs(
        self, tokens: Tensor, conditions: Conditions, spec: SamplingSpec
    ) -> tuple[Tensor, Tensor]:
        """Logprobs and entropies (B, T) fp32, with gradients; see `token_logprobs`."""
        with self._precision():
            return token_logprobs(self.module, tokens, conditions, spec)

    @contextmanager
    def reference(self) -> Iterator[PolicyModule]:
        """The frozen reference, on the learner's device while the block runs."""
        if self._adapters is not None:
            with self._adapters.off():
                yield self.module
            return
        assert self._reference is not None
        away = self._options.reference_device == "cpu" and self.device != "cpu"
        try:
            yield self._reference.to(self.device)
        finally:
            if away:
                self._reference.to("cpu")

    def reference_logprobs(
        self, reference: PolicyModule, tokens: Tensor, conditions: Conditions, spec: SamplingSpec
    ) -> Tensor:
        """Logprobs (B, T) fp32 of the module that `reference` gave."""
        with torch.no_grad(), self._precision():
            return token_logprobs(reference, tokens, conditions, spec)[0]

    def weights(self) -> dict[str, Tensor]:
        """The state dict of a plain policy, adapters merged in."""
        return dict(self.module.state_dict()) if not self._adapters else self._adapters.plain()

    def frozen_weights(self) -> dict[str, Tensor]:
        """The state dict of the plain policy that adapters belong to."""
        assert self._adapters is not None
        return self._adapters.plain(merged=False)

    def adapters(self) -> dict[str, tuple[Tensor, Tensor, float]]:
        """See `Adapters.pairs`."""
        assert self._adapters is not None
        return self._adapters.pairs()

    def save(self, directory: Path) -> None:
        """Write the policy, and its adapters where it has some."""
        write_tensors(directory / POLICY_FILE, self.weights(), self.module.config.to_dict())
        if self._adapters:
            write_tensors(directory / ADAPTERS_FILE, self._adapters.tensors(), {})

    def restore(self, directory: Path) -> None:
        """Inverse of `save`.

        Raises:
            CheckpointError: a file is missing, damaged or of another model.
        """
        if self._adapters:
            file = directory / ADAPTERS_FILE
            self._adapters.load(read_tensors(file), str(file))
        else:
            file = directory / POLICY_FILE
            load_strict(self.module, read_tensors(file), str(file))

    def _precision(self) -> torch.autocast:
        bf16 = self._options.precision == "bf16"
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=bf16)

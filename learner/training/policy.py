"""The policy under training: fp32 weights, passes under autocast, and its frozen reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from actors.checkpoints.loading import PolicyConfig, load_policy
from actors.decoding.decode import Likelihoods, token_likelihoods, token_logprobs
from actors.models.base import Conditions, PolicyModule
from cluster.io.run_layout import POLICY_FILE
from cluster.messages import Condition, SamplingSpec
from cluster.model_files.tensors import load_strict, read_tensors
from learner.training.compilation import compile_blocks
from learner.training.data_parallel import DataParallelGroup, stays_gathered
from learner.training.lora import Adapters
from learner.training.optimizer import OptimizerConfig
from learner.training.state_files import TensorFile

ADAPTERS_FILE = "adapters.safetensors"


class LearnerPolicy:
    """The policy with gradients, and its frozen reference.

    The module stays in eval mode, so that every pass gives the sampler's logprobs: condition
    dropout is for pre-training only, and there are no dropout layers.
    """

    def __init__(
        self, config: PolicyConfig, options: OptimizerConfig, *, reference: bool, seed: int = 0
    ) -> None:
        """Load the policy, with adapters and a frozen reference as configured.

        Args:
            reference: keep the reference that `reference_logprobs` needs.
            seed: of the adapters' initial weights.
        """
        self._options, self.device, self._dp_group = options, options.device, DataParallelGroup()
        self.module = load_policy(config, device=self.device).requires_grad_(True)
        self.module.checkpointing = options.checkpointing
        self._passes_left = 0  # of an update
        self._gathered = False
        self._adapters: Adapters | None = None
        if options.lora.rank:
            self._adapters = Adapters(self.module, options.lora, seed)
        self._reference: PolicyModule | None = None
        if reference and self._adapters is None:
            kept = self.device if options.reference_device == "learner" else "cpu"
            self._reference = load_policy(config, device=kept)
        on_gpu = self.device != "cpu"
        if options.compile == "always" or (options.compile == "auto" and on_gpu):
            for module in (self.module, self._reference):
                if module is not None:
                    compile_blocks(module)

    def logprobs(self, tokens: Tensor, conditions: Conditions, spec: SamplingSpec) -> Likelihoods:
        """Logprobs, entropies and unfiltered logprobs (B, T) fp32, with gradients; see
        `token_likelihoods`."""
        if torch.is_grad_enabled():
            self._passes_left = max(self._passes_left - 1, 0)
            last = not self._passes_left
            self._dp_group.announce_pass(self.module, last=last, gathered=self._gathered)
        with self._precision():
            return token_likelihoods(self.module, tokens, conditions, spec)

    def rehearse(self, spec: SamplingSpec) -> None:
        """A backward pass without effect, so that an operation without a deterministic algorithm is
        refused before the run. Two rollouts, since one may have code of its own."""
        tokens = torch.zeros(2, self.module.num_tokens, dtype=torch.long, device=self.device)
        found = self.logprobs(tokens, any_conditions(self.module), spec)
        loss = torch.stack([values.sum() for values in found]).sum()
        # The first parameters suffice, since the way to them leads through all blocks.
        trained = [p for p in self.module.parameters() if p.requires_grad][:2]
        torch.autograd.grad(loss, trained, allow_unused=True)

    def join(self, dp_group: DataParallelGroup) -> None:
        """Shard the weights over the group; a reference that is a copy stays unsharded."""
        self._gathered = stays_gathered(self.module)
        dp_group.shard_module(self.module, self._options.precision)
        self._dp_group = dp_group

    def begin_update(self, passes: int) -> None:
        """Announce the passes with gradients, dummy ones included, of an optimizer step: learners
        exchange gradients in the last one. Without it they do in every pass."""
        self._passes_left = passes

    def dummy_pass(self, conditions: Conditions) -> None:
        """Take part in a collective pass of the other learners; adds zero to the gradient.

        Args:
            conditions: any one.
        """
        tokens = torch.zeros(1, self.module.num_tokens, dtype=torch.long, device=self.device)
        logprobs = self.logprobs(tokens, conditions, SamplingSpec()).logprobs
        if logprobs.requires_grad:
            (0 * logprobs.sum()).backward()

    @contextmanager
    def reference(self) -> Iterator[PolicyModule]:
        """The frozen reference, on the learner's device within the block."""
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
        """Logprobs (B, T) fp32 of the module that `reference` gave, unfiltered (`learner.grpo.kl`):
        temperature and guidance are the spec's, top-k and top-p are not applied."""
        with torch.no_grad(), self._precision():
            return token_logprobs(reference, tokens, conditions, spec.unfiltered())[0]

    def weights(self) -> dict[str, Tensor]:
        """State dict with adapters merged in. Collective, as the methods below: the first learner
        gets the result, the others an empty one."""
        plain = self._adapters.plain() if self._adapters else self.module.state_dict()
        return self._dp_group.gather(plain)

    def frozen_weights(self) -> dict[str, Tensor]:
        """State dict of the policy without its adapters."""
        assert self._adapters is not None
        return self._dp_group.gather(self._adapters.plain(merged=False))

    def adapters(self) -> dict[str, tuple[Tensor, Tensor, float]]:
        """See `Adapters.pairs`."""
        assert self._adapters is not None
        pairs = self._adapters.pairs()
        inner = self._dp_group.gather({name: a for name, (a, _, _) in pairs.items()})
        outer = self._dp_group.gather({name: b for name, (_, b, _) in pairs.items()})
        return {name: (inner[name], outer[name], pairs[name][2]) for name in inner}

    def files(self) -> dict[str, TensorFile]:
        """Files of a checkpoint: the policy, and its adapters if it has some."""
        kept = {POLICY_FILE: TensorFile(self.weights(), self.module.config.to_dict())}
        if self._adapters:
            kept[ADAPTERS_FILE] = TensorFile(self._dp_group.gather(self._adapters.tensors()))
        return kept

    def restore(self, directory: Path) -> None:
        """Load the files of a checkpoint.

        Raises:
            CheckpointError: a file is missing, damaged or of another model.
        """
        if self._adapters:
            file = directory / ADAPTERS_FILE
            self._adapters.load(self._parts(file, self._adapters.tensors()), str(file))
        else:
            file = directory / POLICY_FILE
            load_strict(self.module, self._parts(file, self.module.state_dict()), str(file))

    def _parts(self, file: Path, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This learner's shards of a file's tensors."""
        found = read_tensors(file)
        return {name: self._dp_group.local_shard(found[name], own.get(name)) for name in found}

    def _precision(self) -> torch.autocast:
        bf16 = self._options.precision == "bf16"
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=bf16)


def any_conditions(policy: PolicyModule) -> Conditions:
    """Two conditions that the policy takes, of no meaning."""
    config = policy.config
    if config.conditioning != "caption":
        return policy.encode([Condition(text="", class_index=0)] * 2)
    shape = 2, config.caption_tokens, config.caption_dim
    features = torch.zeros(shape, device=next(iter(policy.state_dict().values())).device)
    return Conditions(features, torch.ones_like(features[..., 0], dtype=torch.bool))

"""Regional compilation: torch.compile of a policy's transformer blocks, which are all alike."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cluster.errors import ConfigError
from learner.training.data_parallel import blocks_of

BACKEND = "inductor"
VARIANTS = 32
"""Most compiled variants of a block: with and without gradients, adapters or captions, one row."""

logger = logging.getLogger(__name__)


def compile_blocks(policy: nn.Module) -> None:
    """Compile `forward` of each block, in place and at its first call. Names of the state dict,
    hooks (FSDP2's) and activation checkpointing stay outside. Blocks share what is compiled.

    If compilation fails, the blocks run without it, after one warning.

    Raises:
        ConfigError: at that point, in a reproducible run: a resumed one might round differently.
    """
    import torch._dynamo  # takes a second, which runs that compile nothing save
    import torch._functorch.config

    torch._dynamo.config.recompile_limit = VARIANTS
    # The backward pass, too, at the first call: there a failure can be caught.
    torch._functorch.config.force_non_lazy_backward_lowering = True
    fallback = Fallback()
    for block in blocks_of(policy):
        block.forward = CompiledForward(block.forward, fallback)


class Fallback:
    """Whether compilation of a policy's blocks has failed."""

    def __init__(self) -> None:
        self.failed = False

    def record(self, error: Exception) -> None:
        """Warn, and run without compilation from now on.

        Raises:
            ConfigError: in a reproducible run.
        """
        self.failed = True
        reason = " ".join(str(error).strip().partition("\n\n")[0].split())  # its first paragraph
        if torch.are_deterministic_algorithms_enabled():  # the switch of `start_computing`
            raise ConfigError(
                "reproducible: torch.compile of the policy's blocks failed, and without it others "
                f"or a resumed run may round differently ({type(error).__name__}: {reason}): set "
                "--learner.compile never"
            ) from error
        logger.warning(
            "torch.compile of the policy's blocks failed (%s: %s). They run without it: slower, "
            "and with the same results up to rounding. --learner.compile never does not try it",
            type(error).__name__,
            reason,
        )


class CompiledForward:
    """A block's forward pass, compiled for any number of rows."""

    def __init__(self, forward: Callable[..., Tensor], fallback: Fallback) -> None:
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        self._failures = TorchDynamoException, FailOnRecompileLimitHit
        self._forward, self._fallback = forward, fallback
        self._compiled: Callable[..., Any] = torch.compile(forward, backend=BACKEND, fullgraph=True)

    def __call__(self, x: Tensor, *inputs: object) -> Tensor:
        """x (B, S, dim); other inputs whose first dimension is B vary with it."""
        if not self._fallback.failed:
            for each in (x, *inputs):
                if isinstance(each, Tensor) and each.ndim and len(each) == len(x):
                    torch._dynamo.maybe_mark_dynamic(each, 0)
            try:
                return self._compiled(x, *inputs)
            except self._failures as error:
                self._fallback.record(error)
        return self._forward(x, *inputs)

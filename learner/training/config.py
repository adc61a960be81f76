"""The configuration of a learner."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from actors.checkpoints.loading import PolicyConfig, TokenizerConfig
from cluster.messages import SamplingSpec
from learner.data.conditions import ConditionsConfig
from learner.grpo.entropy import EntropyConfig
from learner.grpo.loss import LossConfig
from learner.training.optimizer import OptimizerConfig
from learner.training.real_tokens import RealTokensConfig
from learner.training.skips import GuardsConfig


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """Configuration of a learner, put together by `learner.fleet_plan`."""

    policy: PolicyConfig = field(default_factory=PolicyConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Encodes real images for `real`."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    entropy: EntropyConfig = field(default_factory=EntropyConfig)
    real: RealTokensConfig = field(default_factory=RealTokensConfig)
    conditions: ConditionsConfig = field(default_factory=ConditionsConfig)
    """Has the features of real images' captions."""
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    spec: SamplingSpec = field(default_factory=SamplingSpec)
    seed: int = 0
    """The run's."""
    iterations: int = 1
    max_staleness: int = 0
    reproducible: bool = False
    """Deterministic algorithms."""
    timeout_s: float = 600.0
    """Longest wait for the other learners of the group."""
    wire_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of floating-point weights in snapshots."""

"""The interface of a scorer's configuration. A shipped scorer is one file with a subclass of
`ScorerTerm`, and one field of `rewards.config.RewardsConfig`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.messages import Condition
from cluster.preflight import Findings
from rewards.base import ImageWork, Scorer
from rewards.combine import RewardTerm


class ScorerConfig(ABC):
    """A scorer before it is loaded."""

    @abstractmethod
    def load(self, device: str) -> Scorer:
        """The scorer, in the reward server that runs it."""

    @abstractmethod
    def check(self, field: str, findings: Findings) -> None:
        """Find missing files and downloads before a run starts, without loading the network.

        Args:
            field: the option that holds this configuration, for messages.
        """

    def check_texts(self, field: str, conditions: Sequence[Condition], findings: Findings) -> None:
        """Find texts that the scorer would not read as written; none without a text encoder.

        Raises:
            DataError: such texts, where options do not allow them.
        """
        return None

    def memory(self) -> tuple[float, float]:
        """Bytes of weights and activations on a GPU; 0 weights: unknown."""
        return 0.0, 0.0

    def work(self) -> ImageWork | None:
        """What the network computes for an image; None: unknown."""
        return None


@dataclass(frozen=True, kw_only=True)
class ScorerTerm(ScorerConfig, RewardTerm):
    """A scorer whose scores are a reward."""

    enabled: bool = True
    """Whether the scorer runs; weight 0 runs it for the logs alone."""
    pool: str = ""
    """Reward servers that run the scorer: a name of reward_pools; empty is the main pool."""

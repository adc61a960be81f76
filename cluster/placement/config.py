"""Options of placement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class PlacementConfig:
    """On which nodes of a cluster the workers of a run are placed."""

    learners: Literal["pack", "any"] = "pack"
    """Several learners: on as few nodes as possible, since they add up gradients, or anywhere."""
    reward_servers: Literal["spread", "any"] = "spread"
    """Reward servers of a pool: evenly over the nodes, so that no node's network carries all
    images and a lost node takes few of them, or anywhere."""
    samplers_with_reward_servers: bool = False
    """Keep each sampler on one node with a reward server of the main pool, so that .75 and .25 of a
    GPU share one. With other numbers of them, the smaller number is that of the groups."""
    wait_s: float = 30.0
    """Longest wait for what the workers reserve, seconds; then the run is refused, with what is
    needed and what is free."""
    autoscale: bool = True
    """Ask Ray's autoscaler, where the cluster has one, for nodes that are missing."""
    autoscale_wait_s: float = 900.0
    """Longest wait for nodes that the autoscaler starts, seconds."""

    def __post_init__(self) -> None:
        for name in ("wait_s", "autoscale_wait_s"):
            if not 0 < getattr(self, name) < 1e6:
                raise ValueError(f"{name} must be > 0 seconds, found {getattr(self, name):g}")

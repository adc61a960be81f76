"""What a part of the study declares: a system, seeds, sampled base policies, and arms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from learner.miniature.study.names import BASE

Changes = Mapping[str, Any]
"""Nested plain values of a run's configuration."""
NETWORKS = "<networks>"
"""Stands for the folder of a seed's networks in paths of arms and of what is kept."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A training run that differs in one part of the method from the others."""

    name: str
    changes: Changes = field(default_factory=dict)
    """To the part's method, or to the preset if `shipped`."""
    shipped: bool = False
    """Starts from the preset as it is today, not from the part's method, which never changes."""
    sampled: Mapping[str, Changes] = field(default_factory=dict)
    """Further ways to sample the tuned policy: name of the policy in the results -> fields of its
    `SamplingSpec`. Under the arm's own name it is sampled as it was trained."""

    @property
    def folder(self) -> str:
        """Name of its directory."""
        return folder_of(self.name)

    @property
    def policies(self) -> tuple[str, ...]:
        """Names in the results."""
        return (self.name, *self.sampled)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Arms of one system over seeds. Parts of one system share networks and trained arms."""

    name: str
    system: str
    """Name in `learner.miniature.systems.registry`."""
    images: str = "digits"
    """What its networks are of: systems on the same images share a folder of networks."""
    question: str
    """What the part asks, a sentence."""
    seeds: tuple[int, ...]
    base: Mapping[str, Changes]
    """Policy before training: name in the results -> fields of its `SamplingSpec`."""
    method: Changes
    """Every setting of the method that arms start from; networks and data are the preset's."""
    arms: tuple[Arm, ...]
    on_request: tuple[Arm, ...] = ()
    """Arms that run only if they are named."""
    seconds: float
    """CPU seconds of training one arm, until some were measured."""

    def arm(self, name: str) -> Arm:
        return {arm.name: arm for arm in (*self.arms, *self.on_request)}[name]

    @property
    def names(self) -> tuple[str, ...]:
        """Of all arms."""
        return tuple(arm.name for arm in (*self.arms, *self.on_request))


def guided(*scales: float, policy: str = BASE) -> dict[str, Changes]:
    """Ways to sample a policy, one a scale of guidance: name in the results -> fields of its
    `SamplingSpec`."""
    return {
        f"{policy}, CFG {scale:g}": {"cfg_scale": scale, "guidance": "guided"} for scale in scales
    }


def folder_of(name: str) -> str:
    """The name of a policy as that of a file: "base, CFG 1.5" -> base_CFG_1.5."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("_")

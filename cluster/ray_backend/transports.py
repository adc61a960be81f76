"""How weights reach the samplers: the options, and whether a transport can run on this cluster.

The object store is the default and the fallback: it needs nothing and survives any worker's death.
NCCL leaves the weights on the learner's GPU and sends them from there (Ray Direct Transport, alpha
in Ray 2.60). It is experimental: no machine with several GPUs has run it yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.roles import Role

OBJECT_STORE = "object-store"
WireDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """How new weights travel from the learner to the samplers."""

    transport: Literal["object-store", "nccl", "nixl", "cuda-ipc"] = "object-store"
    """How weights travel. object-store works everywhere and survives any sampler's death. nccl is
    experimental: between GPUs, one for each worker. If it cannot run, object-store is used, with a
    message. (nixl and cuda-ipc were removed.)"""
    dtype: Literal["sampler", "float32", "bfloat16"] = "sampler"
    """Dtype in which weights are sent. sampler: the samplers' dtype (sampler.dtype). bfloat16
    halves the bytes, and rounds the weights of float32 samplers."""
    take_up: Literal["group", "token"] = "group"
    """Not used any more, and dropped in the next release: samplers load new weights between groups.
    (token was removed.)"""

    def __post_init__(self) -> None:
        if self.transport in ("nixl", "cuda-ipc"):
            raise ValueError(
                f"weights.transport {self.transport} was removed (it never ran on a GPU): leave it "
                f"out for {OBJECT_STORE}, or set nccl"
            )
        if self.take_up == "token":
            raise ValueError(
                "weights.take_up token was removed (no benchmark showed a gain): leave it out; "
                "samplers load new weights between groups"
            )

    def wire(self, sampler: WireDtype) -> WireDtype:
        """Dtype in which weights are sent to samplers that compute in `sampler`."""
        return sampler if self.dtype == "sampler" else self.dtype


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What the choice of a transport depends on."""

    learner_gpus: float
    """Of one learner; 0 computes on the CPU."""
    sampler_gpus: float
    num_learners: int = 1

    @classmethod
    def of(cls, learner: Role, sampler: Role) -> Surroundings:
        return cls(
            num_learners=learner.count,
            learner_gpus=learner.resources.num_gpus,
            sampler_gpus=sampler.resources.num_gpus,
        )


def why_not(
    transport: str, here: Surroundings, adapters_alone: bool = False, max_staleness: int = 0
) -> str:
    """Why a transport cannot run; empty if it can."""
    if transport == OBJECT_STORE:
        return ""
    if adapters_alone:
        return "adapters travel alone, and are too small for it to matter"
    if max_staleness:
        return f"it sends the newest weights alone, and max_staleness {max_staleness} needs older"
    return "; ".join(_obstacles(here))


def _obstacles(here: Surroundings) -> Sequence[str]:
    found = []
    for who, gpus in (("the learner", here.learner_gpus), ("samplers", here.sampler_gpus)):
        if gpus <= 0:
            found.append(f"{who} must have a GPU (num_gpus is 0)")
    if found:
        return found
    if here.num_learners > 1:
        found.append(f"the weights are sharded over {here.num_learners} learners")
    if min(here.learner_gpus, here.sampler_gpus) < 1:
        found.append(
            f"learner and samplers need a GPU each, found shares of {here.learner_gpus:g} and "
            f"{here.sampler_gpus:g}"
        )
    return found

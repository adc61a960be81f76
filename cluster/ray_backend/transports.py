"""How weights reach the samplers: the options, and whether one can run where the fleet is.

The object store is the default and the fallback: it needs nothing, and no worker's death harms it.
The others leave the weights on the learner's GPU and move them from there (Ray Direct Transport,
alpha in Ray 2.60). They are experimental: no machine with GPUs has run them yet (README.md has what
was tested without).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.roles import Role

OBJECT_STORE = "object-store"
WireDtype = Literal["float32", "bfloat16"]
TakeUp = Literal["group", "token"]


@dataclass(frozen=True)
class DeviceTransport:
    """What Ray calls a transport, and what it needs."""

    ray_name: str
    group: bool = False
    """Sender and receivers must form a group beforehand, which nobody can join later."""


DEVICE_TRANSPORTS = {
    "nccl": DeviceTransport("nccl", group=True),
    "nixl": DeviceTransport("nixl"),
    "cuda-ipc": DeviceTransport("cuda_ipc"),
}


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """How new weights travel from the learner to the samplers."""

    transport: Literal["object-store", "nccl", "nixl", "cuda-ipc"] = "object-store"
    """object-store works everywhere and survives any sampler's death. Experimental, between GPUs:
    nccl (a GPU for each worker), nixl (needs the package), cuda-ipc (all on one GPU). One that
    cannot run is replaced by object-store, with a message."""
    dtype: Literal["sampler", "float32", "bfloat16"] = "sampler"
    """Of the weights on the way; sampler is what samplers compute in (sampler.dtype). bfloat16
    halves what travels, and rounds the weights of float32 samplers."""

    take_up: TakeUp = "group"
    """When a sampler takes up new weights. group: between groups, so that results do not depend on
    the clock, and repeat. token: before the next token it draws, in the middle of groups (their
    earlier tokens, and the cache of these, stay those of the weights before); rollouts are fresher,
    each token's version is recorded, and results depend on the clock: they do not repeat, and
    `--resume` goes on differently. Needs max_staleness >= 1."""

    def wire(self, sampler: WireDtype) -> WireDtype:
        """dtype on the way, for samplers that compute in `sampler`."""
        return sampler if self.dtype == "sampler" else self.dtype


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What the choice of a transport depends on."""

    learner_gpus: float
    """Of one learner; 0 computes on the CPU."""
    sampler_gpus: float
    num_samplers: int
    num_learners: int = 1
    gpus: float
    """Of the cluster."""
    nodes: int
    nixl: bool
    """Whether the package is there."""

    @classmethod
    def of(cls, learner: Role, sampler: Role, gpus: float, nodes: int) -> Surroundings:
        return cls(
            num_learners=learner.count,
            learner_gpus=learner.resources.num_gpus,
            sampler_gpus=sampler.resources.num_gpus,
            num_samplers=sampler.max_count,
            gpus=gpus,
            nodes=nodes,
            nixl=importlib.util.find_spec("nixl") is not None,
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
        return f"it moves the newest weights alone, and max_staleness {max_staleness} needs older"
    return "; ".join(_obstacles(transport, here))


def _obstacles(transport: str, here: Surroundings) -> Sequence[str]:
    found = []
    for who, gpus in (("the learner", here.learner_gpus), ("samplers", here.sampler_gpus)):
        if gpus <= 0:
            found.append(f"{who} must have a GPU (num_gpus is 0)")
    if found:
        return found
    if here.num_learners > 1:
        found.append(f"the weights are divided among {here.num_learners} learners")
    if transport == "nixl" and not here.nixl:
        found.append("the package is not there: pip install nixl, on every node")
    if transport == "nccl" and min(here.learner_gpus, here.sampler_gpus) < 1:
        found.append(
            f"learner and samplers need a GPU each, found shares of {here.learner_gpus:g} and "
            f"{here.sampler_gpus:g}"
        )
    if transport == "cuda-ipc":
        shares = here.learner_gpus + here.num_samplers * here.sampler_gpus
        if here.gpus != 1 or here.nodes != 1 or shares > 1:
            found.append(
                "learner and samplers must share the one GPU of one node, found "
                f"{here.gpus:g} GPUs on {here.nodes} nodes, and shares that add up to {shares:g}"
            )
    return found

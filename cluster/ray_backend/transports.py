"""How weights reach the samplers: the options, and whether a transport can run.

The object store is the default: shared memory on a node, and from node to node in pieces that each
passes on. A broadcast group sends from GPU to GPU where it can (NCCL).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cluster.roles import FleetPlan

OBJECT_STORE, COLLECTIVE = "object-store", "collective"
WireDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """How new weights travel from the learner to the samplers."""

    transport: Literal["object-store", "collective", "nccl", "nixl", "cuda-ipc"] = "object-store"
    """How weights travel. object-store: once to each host, passed on from host to host. collective
    also sends them through a torch.distributed broadcast group: over NCCL (not yet run on GPUs) if
    learner and samplers have whole GPUs, else gloo; what does not arrive comes from the object
    store. nccl is its old name, dropped in the next release. (nixl and cuda-ipc were removed.)"""
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
                f"out for {OBJECT_STORE}, or set {COLLECTIVE}"
            )
        if self.take_up == "token":
            raise ValueError(
                "weights.take_up token was removed (no benchmark showed a gain): leave it out; "
                "samplers load new weights between groups"
            )

    def wire(self, sampler: WireDtype) -> WireDtype:
        """Dtype in which weights are sent to samplers that compute in `sampler`."""
        return sampler if self.dtype == "sampler" else self.dtype


def why_not(plan: FleetPlan) -> str:
    """Why a broadcast group is of no use to a run; empty if it is."""
    if plan.own_weights:
        return "no learner publishes weights"
    if plan.adapters_alone:
        return "adapters travel alone, and are too small for it to matter"
    return ""


def over_nccl(plan: FleetPlan) -> bool:
    """Whether the group sends from GPU to GPU: NCCL wants one of its own for every member."""
    return min(plan.learner.resources.num_gpus, plan.sampler.resources.num_gpus) >= 1

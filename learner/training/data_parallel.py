"""The data-parallel group of several learners.

Each learner holds a shard of weights, gradients and optimizer state (PyTorch's FSDP2) and computes
gradients of its shard of the rollouts. Sums are exchanged, never means: with N rollouts every
learner divides by N, so shards may differ in size. All learners make the same number of passes,
because each pass gathers weights from all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.errors import FleetError
from learner.training.transfers import to_host

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

GATHERED_BELOW = 1_000_000_000
"""Parameters of a policy below which its weights stay gathered during an update: 2 bytes each in
blocks under bf16, else 4, for one exchange of weights an update instead of two a pass. Every
learner also holds the whole fp32 gradient until the last pass, whatever the size."""


@dataclass(frozen=True)
class DataParallelGroup:
    """One learner's place in the group. With size 1 every exchange returns its input."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    store: Any = field(default=None, repr=False)
    """Keeps the rendezvous store alive."""

    @property
    def first(self) -> bool:
        """Whether this learner (rank 0) writes files and publishes weights."""
        return self.rank == 0

    def shard(self, total: int) -> slice:
        """This learner's part of `total` samples; parts differ by one at most, and may be empty."""
        return self._shard_of(self.rank, total)

    def max_local(self, indices: np.ndarray, total: int) -> int:
        """Largest number of these samples, of `total`, in the shard of one learner."""
        shards = [self._shard_of(rank, total) for rank in range(self.size)]
        return max(int(((indices >= s.start) & (indices < s.stop)).sum()) for s in shards)

    def _shard_of(self, rank: int, total: int) -> slice:
        return slice(rank * total // self.size, (rank + 1) * total // self.size)

    def all_sum(self, values: Sequence[float]) -> list[float]:
        """Sum of each value over the learners."""
        return self._all_reduce(values, dist.ReduceOp.SUM)

    def all_max(self, values: Sequence[float]) -> list[float]:
        """Largest of each value over the learners."""
        return self._all_reduce(values, dist.ReduceOp.MAX)

    def _all_reduce(self, values: Sequence[float], how: Any) -> list[float]:
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, how)
        return tensor.tolist()

    def shard_module(self, policy: nn.Module, precision: Literal["fp32", "bf16"]) -> None:
        """Shard the weights of a policy over the learners (FSDP2): each block, and the rest.

        Under bf16, learners gather blocks in bf16, which autocast would make of them anyway (their
        norms' gains included), and sum gradients in fp32. The rest stays fp32: embeddings, because
        they begin the residual stream, and the head, which sums its gradient over pieces.
        """
        if self.size == 1:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import (
            FSDPModule,
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        mesh = init_device_mesh(self.device, (self.size,))
        half = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        of_blocks = half if precision == "bf16" else MixedPrecisionPolicy()
        reshard = not stays_gathered(policy)
        for block in blocks_of(policy):
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard, mp_policy=of_blocks)
            if hasattr(block, "captions"):
                register_fsdp_forward_method(block, "captions")
        fully_shard(policy, mesh=mesh, reshard_after_forward=reshard)
        for module in policy.modules():
            if isinstance(module, FSDPModule):  # sums, not means
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # all that gloo has

    def announce_pass(self, policy: nn.Module, *, last: bool, gathered: bool) -> None:
        """Before each pass with gradients: they are exchanged in the last one of an update. Until
        then every learner sums its own, and keeps weights as they are if `gathered`."""
        if self.size == 1:
            return
        sharded = cast("FSDPModule", policy)
        sharded.set_requires_gradient_sync(last)
        sharded.set_reshard_after_backward(last or not gathered)

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Full tensors from the shards, copies in host memory. A collective: all learners call it,
        and the first one gets the result (the others an empty one). With size 1, the input."""
        if self.size == 1:
            return dict(tensors)
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if self.first:
                fresh = full is not tensor and full.device.type == "cpu"
                found[name] = full if fresh else to_host({name: full})[name]
        return found

    def local_shard(self, tensor: Tensor, like: Tensor | None) -> Tensor:
        """This learner's shard of a full tensor, sharded as `like` is."""
        if self.size == 1 or like is None or not tensor.ndim:
            return tensor
        from torch.distributed.tensor import DTensor, distribute_tensor

        if not isinstance(like, DTensor):
            return tensor
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def blocks_of(policy: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a policy: its children's that are in a `ModuleList`."""
    stacks = [child for child in policy.children() if isinstance(child, nn.ModuleList)]
    return [block for stack in stacks for block in stack]


def stays_gathered(policy: nn.Module) -> bool:
    """Whether learners keep a policy's weights gathered between the passes of an update."""
    return sum(parameter.numel() for parameter in policy.parameters()) < GATHERED_BELOW


def open_rendezvous(host: str, size: int) -> tuple[dist.TCPStore, str]:
    """Open a rendezvous store on this machine, at a free port; returns it and its address."""
    store = dist.TCPStore(host, 0, size, is_master=True, wait_for_workers=False)
    return store, f"{host}:{store.port}"


def join(
    rank: int, size: int, address: str, device: str, timeout_s: float, store: Any = None
) -> DataParallelGroup:
    """Join the group; returns when all learners have.

    Args:
        address: of `open_rendezvous`.
        store: of `open_rendezvous`, at the first learner.

    Raises:
        FleetError: not all joined in time.
    """
    host, _, port = address.rpartition(":")
    timeout = timedelta(seconds=timeout_s)
    try:
        store = store or dist.TCPStore(host, int(port), size, is_master=False, timeout=timeout)
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=torch.device("cuda", 0) if device == "cuda" else None,  # Ray shows it one
        )
        dist.barrier()
    except (RuntimeError, ValueError) as error:
        raise FleetError(
            f"learner {rank} of {size} did not meet the others at {address} within "
            f"{timeout_s:g} s: {error}"
        ) from error
    return DataParallelGroup(rank, size, device, store)

"""Learners that share the work of one: who they are, and what they tell each other.

Each holds the whole policy and computes gradients of its part of the rollouts. What is exchanged
are sums, so that weights by rollouts stay exact whatever the sizes of the parts: with a batch of N,
every part is divided by N, not by its own size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.errors import FleetError

OPTIMIZER_KEYS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's


@dataclass(frozen=True)
class Peers:
    """One learner's place among its peers; alone, every exchange is what it was given."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    store: Any = field(default=None, repr=False)
    """Keeps the meeting point alive."""

    @property
    def first(self) -> bool:
        """Whether this is the learner that writes files and publishes weights."""
        return self.rank == 0

    def rows(self, total: int) -> slice:
        """This learner's part of `total` rows; parts differ by one at most, and may be empty."""
        return slice(self.rank * total // self.size, (self.rank + 1) * total // self.size)

    def sums(self, values: Sequence[float]) -> list[float]:
        """Sum of each value over the learners."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def largest(self, values: Sequence[float]) -> list[float]:
        """Largest of each value over the learners."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def _reduced(self, values: Sequence[float], how: Any) -> list[float]:
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, how)
        return tensor.tolist()

    def reduce_to(self, tensor: Tensor, rank: int) -> None:
        """Sum over the learners, in place, valid on `rank` alone."""
        dist.reduce(tensor, rank)

    def copy_from(self, tensor: Tensor, rank: int) -> None:
        """The contents that `rank` has, in place."""
        dist.broadcast(tensor, rank)

    def bring_to_first(
        self, state: Mapping[str, Tensor], like: Tensor, owner: int
    ) -> Iterator[tuple[str, Tensor]]:
        """Optimizer state of one parameter, from its owner to the first learner."""
        if self.size == 1:
            yield from state.items()
            return
        flag = torch.tensor([float(bool(state))], device=self.device)
        dist.broadcast(flag, owner)
        if not flag.item():
            return
        for key in OPTIMIZER_KEYS:
            if self.rank == owner:
                tensor = state[key].to(self.device)
            else:
                shape = () if key == "step" else like.shape
                tensor = torch.empty(shape, device=self.device)
            if owner and self.rank == owner:
                dist.send(tensor, 0)
            if owner and self.first:
                dist.recv(tensor, owner)
            if self.first:
                yield key, tensor


def open_meeting(host: str, size: int) -> tuple[dist.TCPStore, str]:
    """A meeting point on this machine, at a free port; returns it and its address."""
    store = dist.TCPStore(host, 0, size, is_master=True, wait_for_workers=False)
    return store, f"{host}:{store.port}"


def join(
    rank: int, size: int, address: str, device: str, timeout_s: float, store: Any = None
) -> Peers:
    """Meet the other learners; returns when all are there.

    Args:
        address: of `open_meeting`, at the first learner.
        store: what `open_meeting` returned, at the first learner.

    Raises:
        FleetError: not all came in time.
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
    return Peers(rank, size, device, store)

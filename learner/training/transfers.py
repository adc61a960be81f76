"""Copies between host and device, without waiting where that is possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from actors.models.base import Conditions, Policy
from cluster.messages import Condition


def to_device(array: np.ndarray, device: str | torch.device) -> Tensor:
    """A copy of an array on a device. On a GPU it goes through page-locked memory, so that the host
    does not wait for what the GPU does."""
    tensor = torch.tensor(array)  # arrays may be read-only
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory, which later steps do not change. From a GPU: with one wait for all,
    into page-locked memory, which torch takes in powers of two and keeps for the next copies."""
    copies: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        copies[name] = copy.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.current_stream().synchronize()
    return copies


class StepConditions:
    """Conditions of a step's rollouts: encoded once, then selected without waiting for the device,
    because the host knows which rollout has which."""

    def __init__(self, policy: Policy, conditions: Sequence[Condition]) -> None:
        """conditions: one a rollout; rollouts of a group may share an object."""
        distinct = {id(condition): condition for condition in conditions}
        places = {key: place for place, key in enumerate(distinct)}
        self._encoded = policy.encode(list(distinct.values()))
        self._places = np.array([places[id(condition)] for condition in conditions])
        if self._encoded.index is not None:
            self._places = self._encoded.index.cpu().numpy()[self._places]

    def __getitem__(self, samples: np.ndarray | slice) -> StepConditions:
        """The conditions of some rollouts."""
        selected = object.__new__(StepConditions)
        selected._encoded, selected._places = self._encoded, self._places[samples]
        return selected

    def batch(self) -> Conditions:
        """As the policy reads them."""
        encoded = self._encoded
        device = encoded.values.device
        if encoded.mask is None:
            return Conditions(encoded.values[to_device(self._places, device)])
        used, index = np.unique(self._places, return_inverse=True)
        chosen = to_device(used, device)
        return Conditions(encoded.values[chosen], encoded.mask[chosen], to_device(index, device))

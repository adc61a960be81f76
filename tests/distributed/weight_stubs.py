"""Roles that hold a few tensors and compute nothing, for tests of how weights travel.

Imports little more than torch: each worker process imports this module.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from cluster.messages import RolloutGroup, SampleRequest, WeightSnapshot
from cluster.ray_backend.collective import Member
from cluster.roles import FleetPlan, Resources, Role
from cluster.spans import Span
from cluster.weights import Packer, load_weights
from tests.distributed.stubs import START_S, Echo
from tests.stand_ins import drawn

SIDE = 512  # 1 MiB a layer: too large to travel inside Ray's own messages


def layers(value: float) -> torch.nn.Module:
    return torch.nn.ParameterList(torch.full((SIDE, SIDE), float(value)) for _ in range(4))


class SmallLearner:
    """Publishes weights whose every value is the version."""

    def __init__(self, config: object = None, name: str = "learner") -> None:
        self._pack, self.version = Packer(), 0

    def snapshot(self, send: Callable[[WeightSnapshot], object] | None = None) -> WeightSnapshot:
        self.version += 1
        return self._pack(layers(self.version).state_dict(), self.version, send=send)

    def pid(self) -> int:
        return os.getpid()


class SmallSampler:
    """Holds the weights it was last given. `config` names a file: the first sampler-0 dies in the
    middle of its load, and leaves the file."""

    def __init__(self, config: str = "", name: str = "sampler") -> None:
        self._module, self._config, self._name = layers(-1), config, name
        self._came: list[str] = []

    def load_weights(self, snapshot: WeightSnapshot, base: WeightSnapshot | None = None) -> int:
        if self._config and self._name == "sampler-0" and not Path(self._config).exists():
            Path(self._config).touch()
            half = dict(list(layers(7).state_dict().items())[:2])
            self._module.load_state_dict(half, strict=False)
            os.kill(os.getpid(), signal.SIGKILL)
        load_weights(self._module, snapshot)
        self._came.append(type(snapshot.buffer).__name__)
        return snapshot.version

    def pid(self) -> int:
        return os.getpid()

    def came(self) -> list[str]:
        """What held each of the weights it loaded: an ndarray of the object store, or a Tensor of a
        broadcast."""
        return self._came

    def write_in_place(self) -> None:
        with torch.no_grad():
            for parameter in self._module.parameters():
                parameter.add_(1)

    def values(self) -> list[float]:
        return sorted({float(value) for p in self._module.parameters() for value in p.unique()})

    def sample(self, requests: list[SampleRequest]) -> list[RolloutGroup]:
        (request,) = requests
        version = self.values()
        assert len(version) == 1
        return [drawn(request, int(version[0]))]

    def images(self, group: RolloutGroup) -> tuple[np.ndarray, Span]:
        return np.array([float(group.version)]), Span(self._name, "decode", 0.0, 0.0)


class Mortal(SmallSampler):
    """Dies in the middle of its second broadcast."""

    def __init__(self, config: str = "", name: str = "sampler") -> None:
        super().__init__(config, name)
        exchange, seen = Member._exchange, []

        def dying(member: Member, flat: torch.Tensor) -> None:
            seen.append(len(flat))
            if len(seen) == 3:  # the first one connects the group
                os.kill(os.getpid(), signal.SIGKILL)
            exchange(member, flat)

        Member._exchange = dying  # type: ignore[method-assign]


def small_plan(folder: Path) -> FleetPlan:
    def role(name: str, factory: type, config: object = "", count: int = 1) -> Role:
        resources = Resources(num_cpus=0.1)
        return Role(name=name, factory=factory, config=config, resources=resources, count=count)

    return FleetPlan(
        sampler=role("sampler", SmallSampler, str(folder / "died"), 2),
        reward_server=role("reward-server", Echo),
        moments_server=role("moments-server", Echo),
        learner=role("learner", SmallLearner),
        timeout_s=START_S,
        max_restarts=1,
    )

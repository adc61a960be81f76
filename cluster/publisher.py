"""The newest weights, and how a worker takes them up.

What an actor's method returns belongs to whoever called it: the snapshot is the driver's, lies in
the store of the learner's node, and outlives the learner. (With `ray.put` it would be the
learner's, and be lost with it.) It is put there once, and read from there once a node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray

from cluster.errors import TesseraError
from cluster.roles import FleetPlan
from cluster.runtime import RaySession
from cluster.transports import (
    DEVICE_TRANSPORTS,
    OBJECT_STORE,
    DeviceTransport,
    Surroundings,
    why_not,
)


class Publisher:
    """References to what the learner published last.

    Args:
        transport: one that can run here: "object-store", or a key of `DEVICE_TRANSPORTS`.
        adapters_alone: the learner trains adapters: the frozen weights travel once, and then the
            adapters of each version.
        timeout_s: longest wait for workers to form a group.
        say: told when a transport is given up.
    """

    def __init__(
        self,
        transport: str,
        *,
        adapters_alone: bool = False,
        timeout_s: float = 600.0,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._name, self._say, self._timeout_s = transport, say, timeout_s
        self._device: DeviceTransport | None = DEVICE_TRANSPORTS.get(transport)
        self._adapters_alone = adapters_alone
        self._learner: Any = None
        self._members: set[Any] = set()
        self._snapshot: ray.ObjectRef | None = None
        self._base: ray.ObjectRef | None = None
        self._on_device: ray.ObjectRef | None = None

    @property
    def published(self) -> bool:
        return self._learner is not None

    def actor_class(self, factory: Callable[..., Any]) -> Any:
        """Ray's actor class of a learner or sampler."""
        if self._device:  # an option of the class: `.options` leaves it out without a word
            return ray.remote(enable_tensor_transport=True)(factory)  # type: ignore[call-overload]
        return ray.remote(factory)

    def publish(self, learner: Any, samplers: Sequence[Any] = ()) -> None:
        """Ask the learner (an actor's handle) for its weights, without waiting for them.

        Args:
            samplers: that exist now, for transports that need a group.
        """
        self._learner, self._snapshot, self._on_device = learner, None, None
        if self._adapters_alone:
            self._base = self._base or learner.base_snapshot.remote()
            self._snapshot = learner.adapter_snapshot.remote()
        elif self._device and self._gathered(learner, samplers):
            call = learner.snapshot.options(tensor_transport=self._device.ray_name)
            self._on_device = call.remote(on_device=True)
        else:
            self._snapshot = learner.snapshot.remote()

    def load(self, sampler: Any) -> ray.ObjectRef:
        """Have a sampler (an actor's handle) take up what was published last, and its base where it
        builds upon one: whether the sampler is new makes no difference."""
        if self._on_device is not None:
            if not self._members or sampler in self._members:
                return sampler.load_weights.remote(self._on_device)
            self._give_up("a sampler came later, and the group cannot grow")
        if self._snapshot is None:
            self._snapshot = self._learner.snapshot.remote()
        if self._base is not None:
            return sampler.load_weights.remote(self._snapshot, self._base)
        return sampler.load_weights.remote(self._snapshot)

    def fall_back(self, error: TesseraError) -> bool:
        """After a failed load: go on with the object store, and say so. False if that is what
        failed."""
        if self._on_device is None:
            return False
        self._give_up(str(error).partition("\n")[0])
        return True

    def _give_up(self, reason: str) -> None:
        self._say(f"weights.transport {self._name} failed, going on with {OBJECT_STORE}: {reason}")
        self._device, self._on_device = None, None

    def _gathered(self, learner: Any, samplers: Sequence[Any]) -> bool:
        """Whether the group that the transport needs is there."""
        assert self._device is not None
        if not self._device.group or self._members:
            return True
        from ray.experimental.collective import create_collective_group

        pool = ThreadPoolExecutor(1)  # Ray's own wait has no bound
        forming = pool.submit(
            create_collective_group, [learner, *samplers], backend=self._device.ray_name
        )
        try:
            forming.result(timeout=self._timeout_s)
        except (TimeoutError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            self._give_up(f"no group: {type(error).__name__} {error}".partition("\n")[0])
            return False
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        self._members = set(samplers)
        return True


def publisher_of(plan: FleetPlan, session: RaySession, say: Callable[[str], None]) -> Publisher:
    """A publisher with the transport that the plan asks for, or the object store where that cannot
    run; says why."""
    transport = plan.transport
    here = Surroundings.of(plan.learner, plan.sampler, session.gpus, session.nodes)
    reason = why_not(transport, here, plan.adapters_alone)
    if reason:
        say(f"weights.transport {transport} cannot run, going on with {OBJECT_STORE}: {reason}")
        transport = OBJECT_STORE
    return Publisher(
        transport, adapters_alone=plan.adapters_alone, timeout_s=plan.timeout_s, say=say
    )

"""How a snapshot travels from the learner to a sampler.

The learner returns it from a method, so that the driver owns it and it outlives the learner (with
`ray.put` it would be lost with the learner). It is stored once on the learner's node, and copied
once to each other node.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray

from cluster.errors import TesseraError
from cluster.ray_backend.transports import OBJECT_STORE, Surroundings, why_not
from cluster.ray_session.private import form_device_group
from cluster.roles import FleetPlan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """References to one version of the weights."""

    snapshot: ray.ObjectRef | None
    """In the object store; None where they stay on the learner's device."""
    base: ray.ObjectRef | None = None
    """Full snapshot that `snapshot` builds upon."""
    on_device: ray.ObjectRef | None = None


class Publisher:
    """Has the learner publish its weights, and samplers load them.

    Args:
        transport: one that can run here: "object-store", or Ray's name of one between devices.
        adapters_alone: the learner trains adapters: the frozen weights travel once, and then the
            adapters of each version.
        timeout_s: longest wait for workers to form a group.
    """

    def __init__(
        self,
        transport: str,
        *,
        adapters_alone: bool = False,
        timeout_s: float = 600.0,
    ) -> None:
        self._name, self._timeout_s = transport, timeout_s
        self._device = "" if transport == OBJECT_STORE else transport
        self._adapters_alone = adapters_alone
        self._members: set[Any] = set()
        self._learners: Sequence[Any] = ()
        self._base: ray.ObjectRef | None = None

    @property
    def on_device(self) -> bool:
        """Whether weights stay on the learner's device until samplers take them."""
        return bool(self._device)

    def actor_class(self, factory: Callable[..., Any], groups: Mapping[str, int]) -> Any:
        """Ray's actor class of a learner or sampler.

        Args:
            groups: its concurrency groups, and the threads of each.
        """
        options: dict[str, Any] = {"concurrency_groups": dict(groups)}
        if self._device:  # an option of the class: `.options` ignores it
            options["enable_tensor_transport"] = True
        return ray.remote(**options)(factory)

    def forget(self) -> None:
        """The learner was replaced: drop its base and group."""
        self._base, self._members, self._learners = None, set(), ()

    def publish(self, learners: Sequence[Any], samplers: Sequence[Any] = ()) -> Published:
        """Request the learners' weights, without waiting.

        Args:
            learners: actor handles; the first one's answer is the snapshot.
            samplers: that exist now, for transports that need a group.
        """
        self._learners = learners
        if self._adapters_alone:
            self._base = self._base or self._asked("base_snapshot")
            return Published(self._asked("adapter_snapshot"), self._base)
        if self._device and self._gathered(learners[0], samplers):
            call = learners[0].snapshot.options(tensor_transport=self._device)
            return Published(None, on_device=call.remote(on_device=True))
        return Published(self._asked("snapshot"))

    def _asked(self, method: str) -> ray.ObjectRef:
        """Call all learners, since each may have a shard; the first returns the whole."""
        answers = [getattr(learner, method).remote() for learner in self._learners]
        return answers[0]

    def load(self, sampler: Any, weights: Published) -> ray.ObjectRef:
        """Have a sampler (an actor handle) load weights, with their base if there is one. A sampler
        outside the device group gets the learner's present weights through the object store: they
        are the same while the learner waits for rollouts (device transports need max_staleness 0).
        """
        if weights.on_device is not None and sampler in self._members:
            return sampler.load_weights.remote(weights.on_device)
        snapshot = weights.snapshot or self._asked("snapshot")
        base = [] if weights.base is None else [weights.base]
        return sampler.load_weights.remote(snapshot, *base)

    def fall_back(self, error: TesseraError) -> bool:
        """After a failed load: log it, and use the object store from now on. False if that is what
        failed."""
        if not self._device:
            return False
        self._give_up(str(error).partition("\n")[0])
        return True

    def _give_up(self, reason: str) -> None:
        logger.warning(
            "weights.transport %s failed, going on with %s: %s", self._name, OBJECT_STORE, reason
        )
        self._device = ""

    def _gathered(self, learner: Any, samplers: Sequence[Any]) -> bool:
        """Form the group of sender and receivers, which no worker can join later; false if it
        cannot be formed."""
        if self._members:
            return True
        pool = ThreadPoolExecutor(1)  # Ray's own wait has no bound
        members = [learner, *samplers]
        forming = pool.submit(form_device_group, members, self._device)
        try:
            forming.result(timeout=self._timeout_s)
        except (TimeoutError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            self._give_up(f"no group: {type(error).__name__} {error}".partition("\n")[0])
            return False
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        self._members = set(samplers)
        return True


def publisher_of(plan: FleetPlan) -> Publisher:
    """A publisher with the plan's transport, or the object store if that cannot run (logged)."""
    transport = plan.transport
    here = Surroundings.of(plan.learner, plan.sampler)
    reason = why_not(transport, here, plan.adapters_alone, plan.max_staleness)
    if reason:
        logger.warning(
            "weights.transport %s cannot run, going on with %s: %s", transport, OBJECT_STORE, reason
        )
        transport = OBJECT_STORE
    return Publisher(transport, adapters_alone=plan.adapters_alone, timeout_s=plan.timeout_s)

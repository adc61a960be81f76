"""The pipeline of iterations that are sampled and scored ahead of learning.

Iteration i is sampled with the weights of max(i - S, 0) updates, never others. S = 0 is on-policy;
with S = 1 samplers and reward servers work on the next iteration while the learner steps. The rule
does not depend on time, so results are a function of the seed on any fleet (on GPUs: if the run is
`reproducible`).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgpack

from cluster.errors import CheckpointError, FleetError
from cluster.fleet import Fleet
from cluster.io.checksum import UNREADABLE, add_checksum, verify_checksum
from cluster.messages import TRAIN, Condition, SampleRequest, ScoredGroup
from cluster.scheduling.in_flight import PendingBatch
from cluster.scheduling.slots import IterationSlots
from learner.config import RunConfig
from learner.data.conditions import ConditionStream
from learner.rollouts.codec import pack_group, unpack_group


def requests_for(
    config: RunConfig, conditions: Sequence[Condition], stream: str, iteration: int
) -> list[SampleRequest]:
    """One request a condition."""
    return [
        SampleRequest(
            stream=stream,
            iteration=iteration,
            group=group,
            condition=condition,
            num_rollouts=config.rollouts_per_group,
            seed=config.seed,
            spec=config.sampling,
        )
        for group, condition in enumerate(conditions)
    ]


class Pipeline:
    """Requests iterations from a fleet as slots become free, and returns them in order."""

    def __init__(self, config: RunConfig, fleet: Fleet) -> None:
        self._config, self._fleet = config, fleet
        self._stream = ConditionStream(
            config.conditions.conditions(), config.groups_per_iteration, config.seed
        )
        self._slots = self._empty(0)
        self._batches: dict[int, PendingBatch] = {}
        self._groups: dict[int, list[ScoredGroup]] = {}
        self._restored: list[tuple[int, int, list[bytes]]] = []

    def _empty(self, first: int) -> IterationSlots:
        return IterationSlots(self._config.groups_per_iteration, self._config.max_staleness, first)

    def begin(self, first: int) -> None:
        """Take over the groups of a restored checkpoint, and request further iterations.

        Raises:
            CheckpointError: the checkpoint's groups are not those of `first`.
        """
        self._slots = self._empty(first)
        for iteration, version, groups in self._restored:
            if self._slots.admit(version) != iteration:
                raise CheckpointError(
                    f"the checkpoint keeps groups of iteration {iteration}, but the run goes on "
                    f"with {first}"
                )
            asked = self._requests(iteration)
            self._put(iteration, [unpack_group(a, kept) for a, kept in zip(asked, groups)])
        self._restored = []
        self._ask()

    def take(self, iteration: int) -> list[ScoredGroup]:
        """The groups of an iteration; waits for all of them.

        Raises:
            StopRequestedError: a stop was requested meanwhile.
            FleetError: a group was sampled with other weights than the rule says.
        """
        self._collect(iteration, finish=False)
        self._slots.take(iteration)
        return self._groups.pop(iteration)

    def release(self, iteration: int) -> None:
        """The weights after an iteration are broadcast: request another one."""
        self._slots.release(iteration)
        self._ask()

    def state(self) -> bytes:
        """The groups requested with older weights, for a checkpoint; waits for them. Empty if there
        are none: groups of the newest weights can be sampled again."""
        older = [i for i in self._ahead() if self._slots.version_of(i) < self._slots.version]
        for iteration in older:
            self._collect(iteration, finish=True)
        kept = [
            (iteration, self._slots.version_of(iteration), self._packed(iteration))
            for iteration in older
        ]
        return add_checksum(msgpack.packb(kept)) if kept else b""

    def restore(self, state: bytes) -> None:
        """Inverse of `state`, before `begin`.

        Raises:
            CheckpointError: damaged.
        """
        try:
            kept = msgpack.unpackb(verify_checksum(state))
            self._restored = [(int(i), int(v), list(g)) for i, v, g in kept]
        except UNREADABLE as error:
            raise CheckpointError(f"the pending groups cannot be read: {error}") from error

    def _ahead(self) -> range:
        """Iterations that are requested and not consumed."""
        return range(self._slots.version, self._slots.next)

    def _packed(self, iteration: int) -> list[bytes]:
        return [pack_group(group) for group in self._groups[iteration]]

    def _ask(self) -> None:
        while self._slots.has_room and self._slots.next < self._config.iterations:
            iteration = self._slots.admit()
            self._batches[iteration] = self._fleet.submit(self._requests(iteration))

    def _collect(self, iteration: int, *, finish: bool) -> None:
        if iteration not in self._groups:
            groups = self._fleet.collect(self._batches[iteration], finish=finish)
            del self._batches[iteration]
            self._put(iteration, groups)

    def _put(self, iteration: int, groups: Sequence[ScoredGroup]) -> None:
        expected = self._slots.version_of(iteration)
        for group in groups:
            key, rollouts = group.rollouts.request.key, group.rollouts
            if (key.stream, key.iteration, rollouts.version) != (TRAIN, iteration, expected):
                raise FleetError(
                    f"{key} was drawn with the weights of {rollouts.version} updates, but "
                    f"iteration {iteration} is to be drawn with those of {expected}"
                )
        by_group = {group.rollouts.request.group: group for group in groups}
        if missing := set(range(self._slots.groups)) - by_group.keys():
            raise FleetError(f"iteration {iteration} lacks groups {sorted(missing)[:8]}")
        self._groups[iteration] = [by_group[number] for number in range(self._slots.groups)]

    def _requests(self, iteration: int) -> list[SampleRequest]:
        return requests_for(self._config, self._stream.draw(iteration), TRAIN, iteration)

"""The moments-server role: a history for every feature space of the rewards.

All spaces commit an iteration together, once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import msgpack
import numpy as np

from cluster.errors import CheckpointError, DataError
from cluster.io.checksum import UNREADABLE, add_checksum, verify_checksum
from cluster.messages import MAIN_SPACE
from rewards.distribution.config import MomentsConfig
from rewards.distribution.distribution_reward import DistributionReward
from rewards.distribution.moments import Moments
from rewards.distribution.reference import Reference
from rewards.servers.space_history import Prepared, SpaceHistory

SPACES = "spaces"


class MomentsServer:
    """Holds a `SpaceHistory` for each space.

    Args:
        terms: space -> settings of its history.
    """

    def __init__(self, terms: Mapping[str, MomentsConfig], name: str = "moments-server") -> None:
        self._histories = {space: SpaceHistory(term, name) for space, term in terms.items()}

    def set_references(
        self, references: Mapping[str, Reference], fingerprints: Mapping[str, str]
    ) -> None:
        """Set the real images' moments of every space, and say which network its features are of.

        Raises:
            DataError: as `SpaceHistory.set_reference`, with the name of a further space.
        """
        for space, history in self._histories.items():
            with _named(space):
                history.set_reference(references[space], fingerprints[space])

    def seed(self, starts: Mapping[str, np.ndarray | Moments]) -> dict[str, float]:
        """Start every history, see `SpaceHistory.seed`; returns the FID of each start."""
        found = {}
        for space, history in self._histories.items():
            with _named(space):
                found[space] = history.seed(starts[space])
        return found

    def commit(
        self,
        iteration: int,
        features: Mapping[str, np.ndarray],
        valid: np.ndarray,
        *,
        run: str = "",
        classes: np.ndarray | None = None,
    ) -> dict[str, DistributionReward]:
        """Compute the rewards of an iteration's images in every space, and add them to all
        histories, or, after an error, to none.

        Args:
            features: space -> (N, D) float32.
            valid: (N,) bool, of all spaces.

        Raises:
            DataError: as `SpaceHistory.prepare`, with the name of a further space.
        """
        prepared = {}
        for space, history in self._histories.items():
            with _named(space):
                prepared[space] = history.prepare(
                    iteration, features[space], valid, run=run, classes=classes
                )
        return self._accept(prepared)

    def _accept(self, prepared: Mapping[str, Prepared]) -> dict[str, DistributionReward]:
        return {space: self._histories[space].accept(each) for space, each in prepared.items()}

    def refresh(self) -> None:
        """Prepare every history for the next commit, see `SpaceHistory.refresh`."""
        for history in self._histories.values():
            history.refresh()

    def state(self) -> bytes:
        """State of all histories, for a checkpoint.

        Raises:
            DataError: there is no history yet.
        """
        states = {space: history.state() for space, history in self._histories.items()}
        return add_checksum(msgpack.packb({SPACES: states}))

    def restore(self, state: bytes) -> None:
        """Inverse of `state`; also reads a state of an earlier version, of the main space alone.

        Raises:
            CheckpointError: damaged, of other spaces, or of the other kind of history.
        """
        try:
            fields = msgpack.unpackb(verify_checksum(state), strict_map_key=False)
            states = dict(fields[SPACES]) if SPACES in fields else {MAIN_SPACE: state}
        except UNREADABLE as error:
            raise CheckpointError(f"this is no state of a moments server: {error}") from error
        if states.keys() != self._histories.keys():
            raise CheckpointError(
                f"the stored histories are of the feature spaces {', '.join(states)}, the "
                f"configuration has {', '.join(self._histories)}: go on with the same "
                "rewards.further"
            )
        for space, history in self._histories.items():
            with _named(space):
                history.restore(states[space])


@contextmanager
def _named(space: str) -> Iterator[None]:
    """Errors of a further space say which."""
    try:
        yield
    except (DataError, CheckpointError) as error:
        if space == MAIN_SPACE:
            raise
        raise type(error)(f"rewards.further.{space}: {error}") from error

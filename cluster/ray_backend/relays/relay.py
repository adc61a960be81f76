"""Inside the actors: cutting a snapshot, passing its pieces on, loading them as they arrive.

Ray fetches an object from any node that has all of it, and so every node would fetch a large one
from the learner's. Here each node fetches the copies that the node before it made. Pieces are
fetched in order, few at a time: Ray shares a link equally between all that are asked for, and then
the first ones arrive hardly before the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import ray
from ray.exceptions import RayError

from cluster.messages import WeightSnapshot
from cluster.snapshots.pieces import Pieces, cut

WINDOW = 2  # pieces that are fetched at a time
PIECE = 1 << 21  # bytes, at least
FIRST_PIECES = 32  # while the size of a snapshot is not known
MOST_PIECES = 64  # each is a call of every node that passes it on
LATE_S = 20.0  # longest wait for a copy of a piece, after the one before

_packed: WeakKeyDictionary[Any, list[np.ndarray]] = WeakKeyDictionary()
"""Of a learner of this process: the pieces that were not asked for yet."""


def pieces_of(nbytes: int) -> int:
    """In how many pieces a snapshot travels; 1: it is not worth the calls.

    Args:
        nbytes: its size; 0: not known.
    """
    if not nbytes:
        return FIRST_PIECES
    return max(min(nbytes // PIECE, MOST_PIECES), 1)


def pack(role: Any, count: int) -> tuple[WeightSnapshot, int]:
    """In the learner: pack a snapshot for `count` calls of `piece`; returns it without its buffer,
    and the buffer's bytes."""
    snapshot = role.snapshot()
    _packed[role] = cut(snapshot.buffer, count)
    return replace(snapshot, buffer=np.empty(0, np.uint8)), snapshot.nbytes


def piece(role: Any) -> np.ndarray:
    """In the learner: the next piece. Each is a call of its own, so that it can travel at once."""
    first, *_packed[role] = _packed[role]
    return first


def pass_on(role: Any, pieces: Sequence[ray.ObjectRef]) -> np.ndarray:
    """In a sampler: fetch the first of some pieces, whose copy is the answer. The others are
    fetched meanwhile."""
    return _fetched(pieces)


def load(
    role: Any,
    snapshot: Sequence[ray.ObjectRef],
    copies: Sequence[ray.ObjectRef],
    pieces: Sequence[ray.ObjectRef],
) -> Any:
    """In a sampler: load a snapshot, whose pieces are summed up while later ones arrive.

    Args:
        snapshot: without its buffer; in a list, so that Ray does not fetch it before the call.
        copies: of the pieces, by the node before this one; empty: there are none.
        pieces: the learner's, which are fetched instead if a node between is lost or hangs.
    """
    header, buffer = ray.get(snapshot[0]), Pieces()
    for piece in _arriving(copies, pieces):
        buffer.add(piece)
    content: Any = buffer
    return role.load_weights(replace(header, buffer=content))


def _arriving(
    copies: Sequence[ray.ObjectRef], pieces: Sequence[ray.ObjectRef]
) -> Iterator[np.ndarray]:
    lost = not copies
    for place in range(len(pieces)):
        if not lost:
            try:
                yield _fetched(copies[place : place + WINDOW], LATE_S)
                continue
            except RayError:
                lost = True
        yield _fetched(pieces[place : place + WINDOW])


def _fetched(refs: Sequence[ray.ObjectRef], wait_s: float | None = None) -> np.ndarray:
    """The first of some values; Ray is asked for the others, too."""
    first, *later = refs
    if later:
        ray.wait(later, num_returns=len(later), timeout=0)
    piece: np.ndarray = ray.get(first, timeout=wait_s)
    return piece

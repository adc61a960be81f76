"""Size of Ray's object store that a run needs, and messages for a full store or full memory.

The store holds the newest weights and images between samplers and reward servers. Ray spills to
disk what does not fit, which is slow; when the disk is full, too, calls fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import FleetError

SNAPSHOTS = 3  # newest, still being loaded, being written
GB = 1e9


class StoreFullError(FleetError):
    """The object store and the disk to which it spills are full."""


class MemoryFullError(FleetError):
    """Ray killed a worker because its machine ran out of memory."""


@dataclass(frozen=True, kw_only=True)
class StoreNeed:
    """Peak use of the object store by a run, bytes."""

    snapshot: int
    """Weights of one version; 0: none travel."""
    group: int
    """Images of the largest group (training, evaluation or gallery)."""
    groups: int
    """Groups in flight; of a run (S + 1) P."""
    batch: int = 0
    """Real images sent to a reward server at a time."""

    @property
    def total(self) -> int:
        return SNAPSHOTS * self.snapshot + self.groups * self.group + self.batch

    def __str__(self) -> str:
        parts = [
            f"{self.groups} groups in flight{', (S + 1) P,' if self.snapshot else ''} with "
            f"{format_bytes(self.group)} of images each"
        ]
        if self.batch:
            parts.append(f"{format_bytes(self.batch)} of real images")
        if self.snapshot:
            weights = format_bytes(self.snapshot)
            parts.append(f"{SNAPSHOTS} snapshots of weights of {weights}")
        *first, last = parts
        listed = f"{', '.join(first)} and {last}" if first else last
        return f"{listed}: {format_bytes(self.total)}"


CHANGES = (
    "give it more (--ray.object-store-memory, or `ray start --object-store-memory`), lower "
    "--groups-per-iteration, --rollouts-per-group or --max-staleness, or add reward servers, so "
    "that images wait less"
)


def format_bytes(number: float) -> str:
    """A number of bytes, for messages."""
    return f"{number / GB:.3g} GB" if number >= GB / 10 else f"{number / 1e6:.3g} MB"


def check_store(need: StoreNeed, store: int) -> str:
    """Compare the need of a run with the object store of a machine.

    Returns:
        A warning; empty if everything fits.

    Raises:
        FleetError: not even one version of the weights and the images of one group fit.
    """
    if need.snapshot + need.group > store:
        weights = f"one snapshot of the weights has {format_bytes(need.snapshot)} and "
        raise FleetError(
            f"the object store has {format_bytes(store)}, but {weights if need.snapshot else ''}"
            f"the images of one group {'' if need.snapshot else 'have '}"
            f"{format_bytes(need.group)}: {CHANGES}"
        )
    if need.total <= store:
        return ""
    return (
        f"the object store has {format_bytes(store)}, less than what may be in it at a time "
        f"({need}); Ray will write to disk what does not fit, which is slow: {CHANGES}"
    )


def store_on_disk(store: int, shared_memory: int, directory: Path) -> str:
    """A warning if a private Ray keeps its store in files, because shared memory is too small; else
    empty.

    Args:
        store, shared_memory: bytes; the latter free before Ray started.
        directory: of these files.
    """
    if store <= shared_memory:
        return ""
    return (
        f"/dev/shm has room for {format_bytes(shared_memory)}, less than Ray's object store of "
        f"{format_bytes(store)}, which is kept in files in {directory} instead: weights and images "
        "travel at the speed of that disk. Give a container more (`docker run --shm-size=8g`; "
        "Kubernetes: an emptyDir of medium Memory at /dev/shm), or lower --ray.object-store-memory"
    )


def store_full(what: str, error: BaseException) -> StoreFullError:
    """For Ray's ObjectStoreFullError or OutOfDiskError."""
    first = str(error).strip().splitlines()[-1 if "ray::" in str(error) else 0]
    return StoreFullError(
        f"{what}: no room for it in the object store, nor on the disk that takes what does "
        f"not fit ({first.strip()}). `ray memory` and `df` show who holds what; {CHANGES}, or make "
        "room on the disk of Ray's temporary directory"
    )


def memory_full(what: str, error: BaseException) -> MemoryFullError:
    """For Ray's OutOfMemoryError: its memory monitor killed the worker."""
    first = str(error).strip().partition("\n")[0]
    return MemoryFullError(
        f"{what} was ended by Ray because its machine ran out of memory ({first}). Start fewer "
        "workers (--num-samplers, --num-reward-servers), lower --learner.microbatch, "
        "--rollouts-per-group or --reward.max-batch, or use a machine with more; then go on with "
        "--resume"
    )


@contextmanager
def explain_store_full(need: StoreNeed, store: int) -> Iterator[None]:
    """Add the need of the run to a StoreFullError of the block."""
    try:
        yield
    except StoreFullError as error:
        raise StoreFullError(
            f"{error}. The store has {format_bytes(store)}; the run needs {need}"
        ) from error

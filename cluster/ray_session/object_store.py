"""Room in Ray's object store: what a run needs there, and what to say when it, or memory, is full.

The store holds images on their way from samplers to reward servers and the newest weights. What
does not fit is written to disk by Ray, which is slow; when the disk is full, too, calls fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import FleetError

SNAPSHOTS = 3  # the newest weights, those that somebody still loads, those that are being written
GB = 1e9


class StoreFullError(FleetError):
    """The object store is full, and so is the disk that takes what does not fit."""


class MemoryFullError(FleetError):
    """A worker was ended because its machine ran out of memory."""


@dataclass(frozen=True, kw_only=True)
class StoreNeed:
    """What a run may have in the object store at a time, bytes."""

    snapshot: int
    """Weights of one version."""
    group: int
    """Images of one group: of the largest, be it of training, an evaluation or a gallery."""
    groups: int
    """Groups on their way: (S + 1) P, whatever they are for."""
    batch: int = 0
    """Real images that a reward server is sent at a time."""

    @property
    def total(self) -> int:
        return SNAPSHOTS * self.snapshot + self.groups * self.group + self.batch

    def __str__(self) -> str:
        real = f"{format_bytes(self.batch)} of real images " if self.batch else ""
        return (
            f"{self.groups} groups in flight, (S + 1) P, with {format_bytes(self.group)} of images "
            f"each, {real}and {SNAPSHOTS} snapshots of weights of {format_bytes(self.snapshot)}: "
            f"{format_bytes(self.total)}"
        )


CHANGES = (
    "give it more (--ray.object-store-memory, or `ray start --object-store-memory`), lower "
    "--groups-per-iteration, --rollouts-per-group or --max-staleness, or add reward servers, so "
    "that images wait less"
)


def format_bytes(number: float) -> str:
    """Bytes for people."""
    return f"{number / GB:.3g} GB" if number >= GB / 10 else f"{number / 1e6:.3g} MB"


def check_store(need: StoreNeed, store: int) -> str:
    """Compare what a run needs with the store of a machine, before anything starts.

    Returns:
        What to say; nothing if all fits.

    Raises:
        FleetError: not even one version of the weights and the images of one group fit.
    """
    if need.snapshot + need.group > store:
        raise FleetError(
            f"the object store has {format_bytes(store)}, but one snapshot of the weights has "
            f"{format_bytes(need.snapshot)} and the images of one group "
            f"{format_bytes(need.group)}: {CHANGES}"
        )
    if need.total <= store:
        return ""
    return (
        f"the object store has {format_bytes(store)}, less than what may be in it at a time "
        f"({need}); Ray will write to disk what does not fit, which is slow: {CHANGES}"
    )


def store_on_disk(store: int, shared_memory: int, directory: Path) -> str:
    """What to say of a private Ray that keeps its store in files, for want of shared memory;
    nothing if it does not.

    Args:
        store, shared_memory: bytes; the latter as they were free before it started.
        directory: where Ray keeps the files then.
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
    """Of Ray's ObjectStoreFullError or OutOfDiskError."""
    first = str(error).strip().splitlines()[-1 if "ray::" in str(error) else 0]
    return StoreFullError(
        f"{what}: no room for it in the object store, nor on the disk that takes what does "
        f"not fit ({first.strip()}). `ray memory` and `df` show who holds what; {CHANGES}, or make "
        "room on the disk of Ray's temporary directory"
    )


def memory_full(what: str, error: BaseException) -> MemoryFullError:
    """Of Ray's OutOfMemoryError: its memory monitor ended the worker."""
    first = str(error).strip().partition("\n")[0]
    return MemoryFullError(
        f"{what} was ended by Ray because its machine ran out of memory ({first}). Start fewer "
        "workers (--num-samplers, --num-reward-servers), lower --learner.microbatch, "
        "--rollouts-per-group or --reward.max-batch, or use a machine with more; then go on with "
        "--resume"
    )


@contextmanager
def explain_store_full(need: StoreNeed, store: int) -> Iterator[None]:
    """While the block runs, an error of a full store also says what the run needs there."""
    try:
        yield
    except StoreFullError as error:
        raise StoreFullError(
            f"{error}. The store has {format_bytes(store)}; the run needs {need}"
        ) from error

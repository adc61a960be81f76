"""A process's part of a GPU's memory, where several share the GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

CONTEXT = 0.5e9
"""Bytes that CUDA and its libraries take for each process, beside PyTorch's allocator. An estimate:
0.3 to 0.6 GB, by card and driver."""


def memory_fraction(share: float, total: float) -> float:
    """The part of a GPU's memory that PyTorch's allocator may take in a process with `share` of a
    GPU of `total` bytes: its share, less its context.

    Raises:
        MemoryError: nothing is left.
    """
    left = share - CONTEXT / total
    if left <= 0:
        raise MemoryError(
            f"a share of {share:g} of a GPU of {total / 1e9:.3g} GB is less than a CUDA context "
            f"takes ({CONTEXT / 1e9:g} GB): raise num_gpus"
        )
    return left


def limited_to_share(factory: Callable[..., Any], num_gpus: float) -> Callable[..., Any]:
    """A role class whose process takes at most its share of a GPU's memory, so that one that needs
    more fails itself instead of a neighbour. A whole GPU is not limited."""
    if not 0 < num_gpus < 1:
        return factory

    class Limited(factory):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            limit_memory(num_gpus)
            super().__init__(*args, **kwargs)

    Limited.__name__ = Limited.__qualname__ = getattr(factory, "__name__", "Limited")
    return Limited


def limit_memory(share: float) -> None:
    """Bound PyTorch's allocator of this process; before it allocates. The GPU is the first that the
    process sees: Ray shows it its own alone."""
    import torch

    if torch.cuda.is_available():  # else the role says what it lacks
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(memory_fraction(share, total), 0)

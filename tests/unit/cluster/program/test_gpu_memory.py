from __future__ import annotations

import pytest
import torch

from cluster.program import gpu_memory
from cluster.program.gpu_memory import CONTEXT, limit_memory, limited_to_share, memory_fraction


class Role:
    """The whole role."""

    def __init__(self, config: object, name: str) -> None:
        self.name = name


def test_the_share_is_less_the_context() -> None:
    assert memory_fraction(0.5, 80e9) * 80e9 == pytest.approx(40e9 - CONTEXT)
    # processes whose shares add up to a GPU fit it with their contexts
    assert sum(memory_fraction(0.25, 80e9) * 80e9 + CONTEXT for _ in range(4)) <= 80e9
    with pytest.raises(MemoryError, match=r"a share of 0\.01 of a GPU of 24 GB .* raise num_gpus"):
        memory_fraction(0.01, 24e9)


@pytest.mark.parametrize("whole", [0.0, 1.0, 2.0])
def test_only_processes_that_share_a_gpu_are_limited(whole: float) -> None:
    assert limited_to_share(Role, whole) is Role


def test_the_limit_is_set_before_the_role_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[float] = []
    monkeypatch.setattr(gpu_memory, "limit_memory", found.append)
    limited = limited_to_share(Role, 0.25)
    assert limited.__name__ == "Role"
    assert found == []
    assert limited(None, name="a").name == "a"
    assert found == [0.25]


def test_without_a_gpu_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    limit_memory(0.5)


@pytest.mark.gpu
def test_an_allocation_beyond_the_share_fails() -> None:
    """Not run on a GPU yet."""
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        limit_memory(0.1)
        torch.empty(int(0.05 * total), dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(int(0.11 * total), dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
        torch.cuda.empty_cache()

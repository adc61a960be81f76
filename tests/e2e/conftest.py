"""Settings of whole runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from threadpoolctl import threadpool_limits


@pytest.fixture(scope="package", autouse=True)
def _one_thread_of_linear_algebra() -> Iterator[None]:
    """Here and in programs that the tests start. More are slower, since other tests run beside."""
    with pytest.MonkeyPatch.context() as patch, threadpool_limits(1, "blas"):
        patch.setenv("OPENBLAS_NUM_THREADS", "1")
        yield

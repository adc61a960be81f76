"""One Ray for all tests of this folder. Tests stop what they started, by its own handle."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cluster.ray_session.session import RayConfig, RaySession


@pytest.fixture(scope="session")
def ray_session() -> Iterator[RaySession]:
    with RaySession(RayConfig(num_cpus=2)) as session:
        yield session

"""Three hosts for the tests of a module, skipped by name where the machine permits none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.hosts.network import Network, why_not


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    if reason := why_not():
        pytest.skip(f"several hosts: {reason}")
    with Network() as network:
        yield network

"""A fleet whose samplers answer with more than the object store holds; prints how that ends.

A program of its own, since Ray reads its limits from the environment when it starts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from cluster.errors import TesseraError
from cluster.messages import RolloutGroup, SampleRequest
from cluster.ray_backend.fleet import RayFleet
from cluster.ray_session.object_store import StoreNeed, explained
from cluster.ray_session.session import RayConfig, RaySession
from cluster.roles import FleetPlan, Resources, Role
from cluster.spans import Span
from tests.distributed.test_ray_fleet import requests
from tests.stand_ins import drawn

IMAGES = 120_000_000  # bytes; the store has 80 MB


class Large:
    """Stands in for every role."""

    def __init__(self, config: str, name: str) -> None:
        self.name = name

    def sample(self, requests: Sequence[SampleRequest]) -> list[RolloutGroup]:
        return [drawn(request) for request in requests]

    def images(self, group: RolloutGroup) -> tuple[np.ndarray, Span]:
        return np.zeros(IMAGES, np.uint8), Span(self.name, "decode", 0.0, 0.0)


def main() -> None:
    def role(name: str) -> Role:
        return Role(name=name, factory=Large, config="", resources=Resources(num_cpus=0.1))

    plan = FleetPlan(
        sampler=role("sampler"),
        reward_server=role("reward-server"),
        moments_server=role("moments-server"),
        learner=role("learner"),
        timeout_s=60,
    )
    need = StoreNeed(snapshot=1_000_000, group=IMAGES, groups=2)
    try:
        with (
            RaySession(RayConfig(num_cpus=1, object_store_memory=0.08)) as session,
            explained(need, session.object_store),
            RayFleet(plan, session) as fleet,
        ):
            fleet.sample_images(requests(2))
        print("no error")
    except TesseraError as error:
        print(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    # Imported under its own name, so that workers find its classes.
    from tests.distributed.full_store import main as imported_main

    imported_main()
    sys.exit(0)

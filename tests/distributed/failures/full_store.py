"""A fleet whose samplers answer with more than the object store holds; prints how that ends.

A program of its own, since Ray reads its limits from the environment when it starts.
"""

from __future__ import annotations

import sys

from cluster.errors import TesseraError
from cluster.ray_backend.fleet import RayFleet
from cluster.ray_session.object_store import StoreNeed, explain_store_full
from cluster.ray_session.session import RayConfig, RaySession
from cluster.roles import FleetPlan, Resources, Role
from tests.distributed.stubs import IMAGES, Large, requests


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
            explain_store_full(need, session.object_store),
            RayFleet(plan, session) as fleet,
        ):
            fleet.sample_images(requests(2))
        print("no error")
    except TesseraError as error:
        print(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    # Imported under its own name, so that workers find its classes.
    from tests.distributed.failures.full_store import main as imported_main

    imported_main()
    sys.exit(0)

"""A fleet whose samplers answer with more than the object store holds; prints how that ends.

A program of its own, since Ray reads its limits from the environment when it starts.
"""

from __future__ import annotations

import logging
import sys

import numpy as np
import ray

from cluster.errors import TesseraError
from cluster.ray_backend.fleet import RayFleet
from cluster.ray_session.object_store import StoreNeed, explain_store_full
from cluster.ray_session.session import RayConfig, RaySession
from cluster.roles import FleetPlan, Resources, Role
from tests.distributed.stubs import IMAGES, Large, requests

BYTES = 70_000_000


@ray.remote(num_cpus=1)
def total(array: np.ndarray) -> int:
    return int(array.sum(dtype=np.int64))


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
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    try:
        with (
            RaySession(RayConfig(num_cpus=1, object_store_memory=0.08)) as session,
            explain_store_full(need, session.object_store),
        ):
            if "sum" in sys.argv:  # 70 MB: the store has room for them, a /dev/shm of 64 MB has not
                array = ray.put(np.ones(BYTES, np.uint8))
                print("sum", ray.get(total.remote(array), timeout=300))
                del array
            with RayFleet(plan, session) as fleet:
                fleet.sample_images(requests(2))
        print("no error")
    except TesseraError as error:
        print(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    # Imported under its own name, so that workers find its classes.
    from tests.distributed.failures.full_store import main as imported_main

    imported_main()
    sys.exit(0)

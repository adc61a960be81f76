"""A private Ray where /dev/shm has 64 MB, as containers have it: run by test_small_shm."""

from __future__ import annotations

import logging
import sys

import numpy as np
import ray

from cluster.ray_session.session import RayConfig, RaySession

BYTES = 150_000_000


@ray.remote(num_cpus=1)
def total(array: np.ndarray) -> int:
    return int(array.sum(dtype=np.int64))


def main() -> int:
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    with RaySession(RayConfig(num_cpus=1)):
        print("sum", ray.get(total.remote(ray.put(np.ones(BYTES, np.uint8))), timeout=300))
    return 0


if __name__ == "__main__":
    from tests.distributed.failures.small_shm import main as imported_main

    sys.exit(imported_main())

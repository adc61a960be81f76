"""Starting Ray, or joining the cluster that is already there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from cluster.errors import FleetError


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """How this program meets Ray."""

    address: str = ""
    """Cluster to join, e.g. "auto". Empty: $RAY_ADDRESS where it is set (inside a Ray job, say),
    else a private Ray on this machine that ends with the program."""
    num_cpus: int = 0
    """CPUs of a private Ray; 0 is all of them."""
    log_to_driver: bool = False
    """Show the workers' output on this console."""


def local_resources() -> tuple[float, float]:
    """CPUs and GPUs of this machine, without starting anything."""
    import torch

    return float(len(os.sched_getaffinity(0))), float(torch.cuda.device_count())


class RaySession:
    """A connection to Ray; a private Ray is shut down with it."""

    def __init__(self, config: RayConfig) -> None:
        # Ray turns token authentication on by itself for a private Ray, and makes the token; naming
        # the mode here would demand a token that a fresh machine does not have.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # its warning is no news
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        address = config.address or os.environ.get("RAY_ADDRESS", "")
        quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": config.log_to_driver}
        try:
            if address:
                ray.init(address=address, **quiet)
            else:
                # without "local", Ray joins whatever was last started on this machine
                cpus = config.num_cpus or None
                ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            where = f"the Ray cluster at {address!r}" if address else "a private Ray"
            raise FleetError(f"cannot reach {where}: {error}") from error
        self.joined = bool(address)

    @property
    def address(self) -> str:
        """Where other processes reach this cluster, host:port."""
        import ray

        return str(ray.get_runtime_context().gcs_address)

    @property
    def cpus(self) -> float:
        return self._available("CPU")

    @property
    def gpus(self) -> float:
        return self._available("GPU")

    @property
    def nodes(self) -> int:
        """Machines of the cluster."""
        import ray

        return sum(node["Alive"] for node in ray.nodes())

    @property
    def free_cpus(self) -> float:
        """What nobody has reserved at this moment."""
        import ray

        return float(ray.available_resources().get("CPU", 0.0))

    def _available(self, kind: str) -> float:
        """On a cluster, what others have left; a private Ray is all ours."""
        import ray

        resources = ray.available_resources() if self.joined else ray.cluster_resources()
        return float(resources.get(kind, 0.0))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        import ray

        ray.shutdown()

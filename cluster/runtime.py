"""Starting Ray, or joining the cluster that is already there."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from cluster.errors import FleetError
from cluster.ray_private import loopback, shows_token
from cluster.whereabouts import PROBE_S, is_loopback

LEAST_STORE_GB = 0.08  # Ray's own least, rounded up


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """How this program meets Ray."""

    address: str = ""
    """Cluster to join, e.g. "auto". Empty: $RAY_ADDRESS where it is set (inside a Ray job, say),
    else a private Ray on this machine that ends with the program."""
    num_cpus: int = 0
    """CPUs of a private Ray; 0 is all of them."""
    object_store_memory: float = 0.0
    """Object store of a private Ray, GB (10^9 bytes), at least 0.08; 0 is Ray's choice, about 30 %
    of the memory. It holds weights and images on their way."""
    dashboard_host: str = ""
    """Address on which a private Ray shows its dashboard, e.g. "127.0.0.1"; empty: none. Who can
    reach it can run code here, but for the token that it asks for."""
    log_to_driver: bool = False
    """Show the workers' output on this console."""

    def __post_init__(self) -> None:
        if self.num_cpus < 0:
            raise ValueError(f"num_cpus must be >= 0, found {self.num_cpus}")
        if self.object_store_memory and not LEAST_STORE_GB <= self.object_store_memory < 1e6:
            raise ValueError(
                f"object_store_memory is in GB, 0 or at least {LEAST_STORE_GB}, found "
                f"{self.object_store_memory:g}"
            )


def local_resources() -> tuple[float, float]:
    """CPUs and GPUs of this machine, without starting anything."""
    import torch

    return float(len(os.sched_getaffinity(0))), float(torch.cuda.device_count())


def _private(config: RayConfig) -> dict[str, Any]:
    """How a Ray of this program's own is started."""
    options: dict[str, Any] = {
        "num_cpus": config.num_cpus or None,
        "include_dashboard": bool(config.dashboard_host),
    }
    if config.dashboard_host:
        options["dashboard_host"] = config.dashboard_host
    if config.object_store_memory:
        options["object_store_memory"] = int(config.object_store_memory * 1e9)
    return options


def _on_loopback_alone(address: str) -> bool:
    """Whether a cluster at a loopback address was started so as `loopback` does. Ray looks for all
    others at this machine's outer address, whatever it is told."""
    from ray.util import get_node_ip_address

    host, _, port = address.rpartition(":")
    if not (is_loopback(host) and port.isdigit()):
        return False
    try:
        outer = get_node_ip_address()
        socket.create_connection((outer, int(port)), timeout=PROBE_S).close()
    except OSError:
        return True
    return is_loopback(outer)


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
                with loopback() if _on_loopback_alone(address) else contextlib.nullcontext():
                    ray.init(address=address, **quiet)
            else:
                # without "local", Ray joins whatever was last started on this machine
                with loopback():
                    ray.init(address="local", **_private(config), **quiet)
        except Exception as error:  # Ray raises bare ones, too, on a machine that is too busy
            if address:
                raise FleetError(f"cannot reach the Ray cluster at {address!r}: {error}") from error
            raise FleetError(
                f"cannot start a private Ray: {error}. On a machine that is very busy it helps to "
                "try again"
            ) from error
        self.joined = bool(address)

    @property
    def guarded(self) -> bool:
        """Whether this program shows a token: a cluster that asks for one lets in nobody else."""
        return shows_token()

    @property
    def object_store(self) -> int:
        """Bytes of the object store, of the machine that has the smallest."""
        import ray

        alive = (node["Resources"] for node in ray.nodes() if node["Alive"])
        return int(min(resources.get("object_store_memory", 0) for resources in alive))

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

"""What is simulated: machines and links, the costs of the driver, and what goes wrong when."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum


@dataclass(frozen=True, kw_only=True)
class Host:
    """A machine of the cluster."""

    cpus: float
    gpus: int = 0

    def __post_init__(self) -> None:
        if not (0 < self.cpus < math.inf and self.gpus >= 0):
            raise ValueError(f"a host has cpus > 0 and gpus >= 0, found {self.cpus}, {self.gpus}")


@dataclass(frozen=True, kw_only=True)
class DriverCosts:
    """CPU seconds of the driver."""

    group_s: float = 0.0
    """Of each group, all in all."""
    measured: bool = False
    """Count the CPU time that the fleet's code takes here, too. Then two simulations differ."""
    remote_s: float = 0.0
    """Of a call."""
    get_s: float = 0.0
    """Of an answer."""
    wait_s: float = 0.0
    """Of a wait, ..."""
    wait_ref_s: float = 0.0
    """... and each reference in it."""
    byte_s: float = 0.0
    """Of each byte of a value that is sent or read."""


RAY_CLIENT = DriverCosts(
    measured=True,
    remote_s=4.5e-4,
    get_s=3e-5,
    wait_s=2e-5,
    wait_ref_s=5e-7,
    byte_s=2.7e-9,
)
"""Ray 2.60, its threads included, with what the fleet's code takes here: so that
`tests.bench.driver` comes out as on Ray."""


@dataclass(frozen=True, kw_only=True)
class SimulatedCluster:
    """The machines of a simulation. The driver runs on the first one."""

    hosts: tuple[Host, ...]
    link_bytes_per_s: float = 1.25e9
    """Of each host, in each direction: what transfers reach, not what the link is sold as."""
    latency_s: float = 2e-4
    """Of a message."""
    start_s: float = 10.0
    """From the start of a worker's process until it serves."""
    process_loss_s: float = 1.0
    """Until the end of a process is noticed, ..."""
    host_loss_s: float = 15.0
    """... and that of a host."""
    driver: DriverCosts = field(default_factory=DriverCosts)

    def __post_init__(self) -> None:
        if not self.hosts:
            raise ValueError("a cluster has at least one host")
        if not 0 < self.link_bytes_per_s < math.inf:
            raise ValueError(f"link_bytes_per_s must be > 0, found {self.link_bytes_per_s}")
        for name in ("latency_s", "start_s", "process_loss_s", "host_loss_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be >= 0 seconds, found {getattr(self, name)}")


class Fault(Enum):
    """What may happen to a worker or a host."""

    KILLED = "its process ends"
    HANGS = "it answers nothing any more"
    SLOW = "it works slower"
    HOST_LOST = "the host is gone, with its workers and what they stored"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A fault at a time."""

    at_s: float
    fault: Fault
    worker: str = ""
    """Name of the worker, as in the status; of `HOST_LOST` empty."""
    host: int = -1
    """Number of the host, of `HOST_LOST`. The first one has the driver."""
    until_s: float = math.inf
    """Of `SLOW` and `HOST_LOST`: when it is over."""
    factor: float = 1.0
    """Of `SLOW`: times as long."""

    def __post_init__(self) -> None:
        if not 0 <= self.at_s <= self.until_s or math.isinf(self.at_s):
            raise ValueError(f"expected 0 <= at_s <= until_s, found {self.at_s}, {self.until_s}")
        if self.fault is Fault.HOST_LOST:
            if self.worker or self.host < 1:
                raise ValueError("host_lost names a host from 1 on, since 0 has the driver")
        elif not self.worker or self.host != -1:
            raise ValueError(f"{self.fault.name} names a worker, and no host")
        if self.fault is Fault.SLOW and not 0 < self.factor < math.inf:
            raise ValueError(f"the factor of a slow worker must be > 0, found {self.factor}")

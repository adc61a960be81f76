"""Starting a private Ray, or joining a cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from types import TracebackType
from typing import Any, Self

from cluster.errors import FleetError
from cluster.placement.nodes import Node
from cluster.program.console import time_limit
from cluster.program.invocation import current
from cluster.program.signals import deferred_signals
from cluster.ray_session import private
from cluster.ray_session.address import (
    AUTO,
    OPTION,
    PORT,
    PROBE_S,
    Address,
    check_answer,
    current_cluster,
    is_loopback,
    no_node_here,
    not_your_node,
    parse_address,
    probe,
    temp_root,
    user_name,
    why_not_joined,
    written_address,
)
from cluster.ray_session.machine import check_machine, shared_memory, why_not_started
from cluster.ray_session.object_store import store_on_disk
from cluster.ray_session.private import clusters_here, loopback, worker_paths
from cluster.ray_session.proxies import check_proxy
from cluster.ray_session.token import (
    AUTH_MODE,
    check_token,
    ensure_token,
    find_token,
    no_token,
    shows_token,
    token,
    token_in_environment,
)

logger = logging.getLogger(__name__)

LEAST_STORE_GB = 0.08  # Ray's own least, rounded up
ANSWER_S = 10.0  # timeout of a cluster's control service, which may be busy
CONNECT_S = 90.0  # timeout of joining a cluster that has answered


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """Options of Ray."""

    address: str = ""
    """Cluster to join, e.g. "auto". Empty: $RAY_ADDRESS where it is set (inside a Ray job, say),
    else a private Ray on this machine that ends with the program."""
    num_cpus: int = 0
    """CPUs of a private Ray; 0 is all of them."""
    object_store_memory: float = 0.0
    """Object store of a private Ray, GB (10^9 bytes), at least 0.08; 0 is Ray's choice, about 30 %
    of the memory. The store holds weights and images in transit."""
    dashboard_host: str = ""
    """Address on which a private Ray shows its dashboard, e.g. "127.0.0.1"; empty: none. Who can
    reach it can run code here, but for the token that it asks for."""
    temp_dir: str = ""
    """Directory of a private Ray's sockets and logs, absolute and short: a path of a socket in it
    must stay within 107 bytes. Empty: $RAY_TMPDIR/ray, $TMPDIR/ray or /tmp/ray."""
    log_to_driver: bool = False
    """Show the workers' output on this console."""

    def __post_init__(self) -> None:
        if self.temp_dir and not Path(self.temp_dir).is_absolute():
            raise ValueError(f"temp_dir must be an absolute path, found {self.temp_dir!r}")
        if self.num_cpus < 0:
            raise ValueError(f"num_cpus must be >= 0, found {self.num_cpus}")
        if self.object_store_memory and not LEAST_STORE_GB <= self.object_store_memory < 1e6:
            raise ValueError(
                f"object_store_memory is in GB, 0 or at least {LEAST_STORE_GB}, found "
                f"{self.object_store_memory:g}"
            )


def local_node() -> Node:
    """CPUs and GPUs of this machine, without starting anything."""
    import torch

    cpus, gpus = len(os.sched_getaffinity(0)), torch.cuda.device_count()
    return Node("this machine", float(cpus), float(gpus))


def free_nodes(config: RayConfig) -> list[Node]:
    """Where a run would place its workers: the nodes of the cluster that it would join, with what
    is free, or this machine. Joins and starts nothing.

    Raises:
        ConfigError, FleetError: the cluster does not answer.
    """
    cluster = find_cluster(config)
    if cluster is None:
        return [local_node()]
    shown = token(os.environ) if shows_token(os.environ) else ""
    return private.ask_free(str(cluster), shown, ANSWER_S)


def _private(config: RayConfig) -> dict[str, Any]:
    """Options of `ray.init` for a private Ray."""
    options: dict[str, Any] = {
        "num_cpus": config.num_cpus or None,
        "include_dashboard": bool(config.dashboard_host),
        **private.in_directory(config.temp_dir),
    }
    if config.dashboard_host:
        options["dashboard_host"] = config.dashboard_host
    if config.object_store_memory:
        options["object_store_memory"] = int(config.object_store_memory * 1e9)
    return options


def find_cluster(config: RayConfig, source: str = OPTION) -> Address | None:
    """The cluster that the user names, after it has answered; None: use a private Ray.

    Args:
        source: option of the address, for messages.

    Raises:
        ConfigError: it is not an address.
        FleetError: no cluster answers, or it does not accept this program; within seconds.
    """
    text, source = written_address(config.address, source)
    if not text:
        return None
    if text != AUTO:
        return check_cluster(parse_address(text, source))
    return check_cluster(_found_here(config.temp_dir, source), ours=True)


def check_ray(config: RayConfig) -> None:
    """Check, before a run starts, that its cluster answers or that a private Ray can start here.

    Raises:
        ConfigError, FleetError: it does not; says why.
    """
    cluster = find_cluster(config)
    if cluster is None:
        check_proxy("127.0.0.1", os.environ)
        check_machine(config.temp_dir)
        check_token(os.environ)
    else:
        check_proxy(cluster.host, os.environ)
        check_node(cluster)


def _found_here(temp_dir: str, source: str) -> Address:
    """The cluster of "auto": the last one of `ray start` on this machine, else the only one with a
    node here, private ones aside.

    Raises:
        FleetError: there is none, or more than one.
    """
    left, found = current_cluster(temp_dir), clusters_here()
    # Where that cluster has ended, another user's may have its address by now.
    if left and left.user == os.getuid() == found.get(str(left), os.getuid()):
        return left
    others = []
    if left and left.user is not None:
        others.append(f"{left}, of {user_name(found.get(str(left), left.user))}")
    running = []
    for text, user in sorted(found.items()):
        address = parse_address(text, f"{source} auto")
        if address.loopback:
            continue
        if user == os.getuid():
            running.append(address)
        else:
            others.append(f"{address}, of {user_name(user)}")
    if len(running) == 1:
        return running[0]
    if running:
        raise FleetError(
            f"{source} is auto, and several Ray clusters have a node on this machine: name one, "
            + " or ".join(map(str, running))
        )
    without = (
        "to have the run looked for" if source == "--address" else "for a Ray of the run's own"
    )
    if others:
        raise FleetError(
            f"{source} is auto, and the Ray on this machine belongs to others ("
            f"{'; '.join(dict.fromkeys(others))}): name a cluster that you may use by its address, "
            f"or leave out {source} {without}"
        )
    raise FleetError(
        f"{source} is auto, but no Ray cluster runs on this machine: start one by `ray start "
        f"--head` (or join one by `ray start --address=HOST:{PORT}`), or leave out {source} "
        f"{without}"
    )


def check_cluster(address: Address, *, ours: bool = False) -> Address:
    """Check that a cluster answers, accepts this program, and runs the same versions.

    Args:
        ours: found on this machine: the user's token is sent if it asks.

    Raises:
        FleetError: it does not; within seconds.
    """
    probe(address)
    shown = token(os.environ) if shows_token(os.environ) else ""
    answer = private.ask_gcs(str(address), shown, ANSWER_S)
    unset = AUTH_MODE not in os.environ
    if answer.code == "UNAUTHENTICATED" and ours and unset and find_token():
        private.show_token()
        answer = private.ask_gcs(str(address), token(os.environ), ANSWER_S)
    check_answer(answer, address, (version("ray"), python_version()), ANSWER_S)
    if shows_token(os.environ) and not find_token():
        raise FleetError(no_token(os.environ))
    return address


def check_node(cluster: Address) -> None:
    """Check that this program can join a cluster by a node on this machine. (With the node of
    another user, Ray ends the process instead of raising an error.)

    Raises:
        FleetError: no node is here, or it is another user's.
    """
    shown = token(os.environ) if shows_token(os.environ) else ""
    nodes = private.ask_nodes(str(cluster), shown, ANSWER_S)
    sockets = [Path(nodes[node].socket) for node in private.nodes_here() if node in nodes]
    if not sockets:
        raise FleetError(no_node_here(cluster))
    if any(os.access(socket, os.W_OK) for socket in sockets):
        return
    raise FleetError(not_your_node(cluster, sockets[0]))


def _on_loopback_alone(address: Address) -> bool:
    """Whether a cluster at a loopback address listens there only, as `loopback` starts it. (Ray
    looks for all others at this machine's outer address.)"""
    from ray.util import get_node_ip_address

    if not address.loopback:
        return False
    try:
        outer = get_node_ip_address()
        socket.create_connection((outer, address.port), timeout=PROBE_S).close()
    except OSError:
        return True
    return is_loopback(outer)


def _join(cluster: Address, quiet: dict[str, Any]) -> None:
    import ray

    check_node(cluster)
    late = (
        f"the Ray cluster at {cluster} ({cluster.source}) answered, but did not let this program "
        f"in within {CONNECT_S:g} s: it hangs or is overloaded (gcs_server.out and raylet.out in "
        "its logs say more)"
    )
    with time_limit(CONNECT_S, late), private.one_attempt():
        try:
            with loopback() if _on_loopback_alone(cluster) else contextlib.nullcontext():
                ray.init(address=str(cluster), **quiet)
        except Exception as error:  # Ray raises bare ones, too
            raise FleetError(why_not_joined(error, cluster)) from error


def _start(config: RayConfig, quiet: dict[str, Any]) -> None:
    import ray

    # Ray turns token authentication on by itself for a private Ray; naming the mode here would
    # reach the clusters that this process may join later.
    check_machine(config.temp_dir)
    ensure_token()
    room = shared_memory()
    try:
        # without "local", Ray joins whatever was last started on this machine
        with loopback(), token_in_environment():
            ray.init(address="local", **_private(config), **quiet)
    except Exception as error:  # Ray raises bare ones, too
        raise FleetError(why_not_started(error, temp_root(config.temp_dir))) from error
    if note := store_on_disk(_smallest_store(), room, temp_root(config.temp_dir)):
        logger.warning(f"note: {note}")


def _smallest_store() -> int:
    """Bytes of the smallest object store of a machine."""
    import ray

    alive = (node["Resources"] for node in ray.nodes() if node["Alive"])
    return int(min(resources.get("object_store_memory", 0) for resources in alive))


def cluster_nodes(*, free: bool = True) -> list[Node]:
    """Live nodes of the cluster that this process has joined.

    Args:
        free: with what is free of them now; else with all that they have.
    """
    import ray

    left = private.free_per_node() if free else {}
    return [
        Node.of(
            node["NodeManagerAddress"],
            left.get(node["NodeID"], node["Resources"]),
            node["Labels"],
            node["NodeID"],
            node["Resources"],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


class RaySession:
    """A connection to Ray; a private Ray is shut down with it.

    Args:
        cluster: one that has answered (`check_cluster`); None: from `config`.

    Raises:
        ConfigError: the address is malformed.
        FleetError: Ray cannot be started, or the cluster cannot be joined.
    """

    def __init__(self, config: RayConfig, cluster: Address | None = None) -> None:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        cluster = cluster or find_cluster(config)
        quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": config.log_to_driver}
        quiet |= worker_paths(current())
        check_proxy(cluster.host if cluster else "127.0.0.1", os.environ)
        with deferred_signals():  # Ray installs handlers, one of which crashes at SIGTERM
            if cluster:
                _join(cluster, quiet)
            else:
                _start(config, quiet)
        self.joined = cluster is not None

    @property
    def guarded(self) -> bool:
        """Whether this program sends a token, without which the cluster refuses access."""
        return private.shows_token()

    @property
    def object_store(self) -> int:
        """Bytes of the smallest object store of a machine."""
        return _smallest_store()

    @property
    def address(self) -> str:
        """Address of the cluster for other processes, host:port."""
        import ray

        return str(ray.get_runtime_context().gcs_address)

    @property
    def nodes(self) -> list[Node]:
        """Live nodes with the free resources of a cluster, or all resources of a private Ray."""
        return cluster_nodes(free=self.joined)

    @property
    def free_cpus(self) -> float:
        """CPUs that are not reserved."""
        import ray

        return float(ray.available_resources().get("CPU", 0.0))

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

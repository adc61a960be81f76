"""Uses of Ray's private, undocumented and alpha names. No other file may use such names (tested);
`tests/distributed/test_ray_private.py` tests each function here with the versions of Ray that
pyproject.toml allows.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cluster.errors import FleetError
from cluster.io.processes import in_environment
from cluster.placement.nodes import Node
from cluster.program.invocation import Invocation
from cluster.ray_session.address import GcsAnswer
from cluster.ray_session.token import AUTH_MODE, TOKEN_MODE

GCS_FLAG = "--gcs-address="
STATUS_S = 10.0  # longest wait for what the control service knows of the autoscaler
LOOKS_ON = "node_"
"""Prefix of the types of nodes of an autoscaler that starts none: each node is its own type."""
ONE_MACHINE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's variable; 0: everything that it starts listens on loopback only."""


@contextmanager
def loopback() -> Iterator[None]:
    """Have Ray's processes that start in the block listen on 127.0.0.1 only. (`ray.init` ignores a
    loopback address.)"""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with in_environment(ONE_MACHINE, "0"):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def loopback_address() -> str:
    """On which Ray's processes listen that serve one machine: ::1 where all other addresses of the
    machine are IPv6, else 127.0.0.1."""
    from ray._private import services

    return str(services.get_localhost_ip())


def shows_token() -> bool:
    """Whether this process sends a token to Ray."""
    from ray import _raylet

    mode = getattr(_raylet, "get_authentication_mode")()  # noqa: B009  (compiled: no stubs)
    return bool(mode == getattr(_raylet, "AuthenticationMode").TOKEN)  # noqa: B009


def show_token() -> None:
    """Send the user's token from now on; Ray does so by itself only for clusters that it starts or
    finds on this machine."""
    from ray import _raylet

    os.environ[AUTH_MODE] = TOKEN_MODE
    getattr(_raylet, "Config").initialize("")  # noqa: B009  (read anew: Ray may be loaded already)


def ask_gcs(address: str, token: str, wait_s: float) -> GcsAnswer:
    """Ask a cluster's control service for its versions, without joining it.

    Args:
        token: sent with the request; empty: none.
        wait_s: bound on each of two calls, seconds.
    """
    import grpc

    with _control_service(address, token, wait_s) as call:
        try:
            alive = call("NodeInfoGcsService", "CheckAlive")
            found = call(
                "InternalKVGcsService",
                "InternalKVGet",
                key=b"CLUSTER_METADATA",
                namespace=b"cluster",
            )
        except grpc.RpcError as error:
            return GcsAnswer(error.code().name, str(error.details()))
    about = json.loads(found.value) if found.value else {}
    return GcsAnswer(
        "OK",
        ray=str(alive.ray_version),
        python=str(about.get("python_version", "")),
        private=bool(about.get("ray_init_cluster")),
    )


def ask_free(address: str, token: str, wait_s: float) -> list[Node]:
    """A cluster's live nodes with what is free of each, asked for without joining it.

    Raises:
        FleetError: no answer.
    """
    import grpc

    with _control_service(address, token, wait_s) as call:
        try:
            nodes = call("NodeInfoGcsService", "GetAllNodeInfo").node_info_list
            free = call("NodeResourceInfoGcsService", "GetAllAvailableResources").resources_list
        except grpc.RpcError as error:
            raise FleetError(f"the nodes of {address} are not told: {error.details()}") from None
    known = {node.node_id: node for node in nodes}
    return [
        Node.of(
            node.node_manager_address,
            dict(has.resources_available),
            dict(node.labels),
            node.node_id.hex(),
            dict(node.resources_total),
        )
        for has in free
        if (node := known.get(has.node_id)) is not None
    ]


def _in_another_network(process: int) -> bool:
    """Whether a process is in a container with a network of its own, as far as this user can
    tell."""
    try:
        theirs, ours = (os.stat(f"/proc/{which}/ns/net") for which in (process, "self"))
    except OSError:
        return False
    return theirs.st_ino != ours.st_ino


@dataclass(frozen=True)
class NodeHere:
    """A live node of a cluster."""

    address: str
    """IP address."""
    socket: str
    """Path of the Unix socket by which drivers on its machine reach it."""


def ask_nodes(address: str, token: str, wait_s: float) -> dict[str, NodeHere]:
    """Node id -> live node of a cluster, asked for without joining it.

    Raises:
        FleetError: no answer.
    """
    import grpc

    with _control_service(address, token, wait_s) as call:
        try:
            nodes = call("NodeInfoGcsService", "GetAllNodeInfo").node_info_list
        except grpc.RpcError as error:
            raise FleetError(f"the nodes of {address} are not told: {error.details()}") from None
    return {
        node.node_id.hex(): NodeHere(node.node_manager_address, node.raylet_socket_name)
        for node in nodes
        if node.state == node.ALIVE
    }


@contextmanager
def _control_service(address: str, token: str, wait_s: float) -> Iterator[Callable[..., Any]]:
    """Calls of a cluster's control service: (service, method, fields of the request) -> reply."""
    import grpc

    messages: Any = importlib.import_module("ray.core.generated.gcs_service_pb2")

    def call(service: str, method: str, **fields: Any) -> Any:
        request = getattr(messages, f"{method}Request")(**fields)
        ask = channel.unary_unary(
            f"/ray.rpc.{service}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=getattr(messages, f"{method}Reply").FromString,
        )
        shown = [("authorization", f"Bearer {token}")] if token else None
        return ask(request, timeout=wait_s, metadata=shown)

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        yield call


def nodes_here() -> frozenset[str]:
    """Ids of the nodes of any cluster on this machine. A driver needs one."""
    from ray._private import services

    return frozenset(services.find_node_ids())


def clusters_here() -> dict[str, int]:
    """Addresses of the clusters that have a node on this machine, host:port -> id of the user whose
    process it is."""
    from ray._private import services

    found: dict[str, int] = {}
    for process in services.psutil.process_iter(["cmdline", "uids"]):
        line, users = process.info["cmdline"] or [], process.info["uids"]
        raylet = line and os.path.basename(line[0]) == "raylet"
        if users is None or not raylet or _in_another_network(process.pid):
            continue
        for argument in line:
            if argument.startswith(GCS_FLAG):
                found.setdefault(argument.removeprefix(GCS_FLAG), users.effective)
    return found


@contextmanager
def one_attempt() -> Iterator[None]:
    """Have Ray try once, for 41 s, to reach a cluster in the block, instead of twenty times."""
    name = "RAY_gcs_server_port_wait_time_s"
    with in_environment(name, os.environ.get(name) or "1"):
        yield


def in_directory(path: str) -> dict[str, Any]:
    """Options of `ray.init` for the directory of sessions, logs and sockets."""
    return {"_temp_dir": path} if path else {}


def living_actors() -> dict[str, dict[str, Any]]:
    """Actor id -> node (IP address) and pid of all live actors of the cluster. (The public API
    needs the dashboard, which a private Ray lacks.)"""
    from ray._private.state import actors

    found = actors(actor_state_name="ALIVE")
    return {
        actor: {"node": entry["Address"]["IPAddress"], "pid": entry["Pid"]}
        for actor, entry in found.items()
    }


def free_per_node() -> dict[str, dict[str, float]]:
    """Node id -> free resources of all live nodes. (The public API has their sum.)"""
    from ray._private.state import available_resources_per_node

    found: dict[str, dict[str, float]] = available_resources_per_node()
    return found


def place_on_one_node(
    bundles: list[dict[str, float]], selectors: list[dict[str, str]], node: str
) -> Any:
    """A placement group whose bundles are on one node. (Ray's strategies say nothing of which.)

    Args:
        selectors: labels of the node, of each bundle.
        node: id of the one to take if it has room; empty: any.
    """
    from ray.util import placement_group

    return placement_group(
        bundles,
        strategy="STRICT_PACK",
        bundle_label_selector=selectors,
        _soft_target_node_id=node or None,
    )


@dataclass(frozen=True)
class NodeAutoscaler:
    """What a cluster says of its autoscaler."""

    found: bool
    """Whether there is one that starts nodes."""
    infeasible: bool = False
    """It says that it has no type of node for what was asked for."""


def autoscaler() -> NodeAutoscaler:
    """Ray's autoscaler of this process's cluster: its second version reports to the control
    service, its first one writes a status there, also where it only looks on."""
    from ray.experimental.internal_kv import internal_kv_get_gcs_client

    messages: Any = importlib.import_module("ray.core.generated.autoscaler_pb2")
    client: Any = internal_kv_get_gcs_client()
    reply = messages.GetClusterStatusReply()
    reply.ParseFromString(client.get_cluster_status(timeout_s=STATUS_S))
    state = reply.autoscaling_state
    if state.autoscaler_state_version:
        return NodeAutoscaler(True, bool(state.infeasible_cluster_resource_constraints))
    written = client.internal_kv_get(b"__autoscaling_status", None, timeout=STATUS_S)
    report = (json.loads(written) if written else {}).get("autoscaler_report") or {}
    kinds = {*(report.get("active_nodes") or ()), *(report.get("pending_launches") or ())}
    kinds |= set((report.get("node_type_mapping") or {}).values())
    return NodeAutoscaler(any(not each.startswith(LOOKS_ON) for each in kinds))


def request_nodes(bundles: list[dict[str, float]], selectors: list[dict[str, str]]) -> None:
    """Have the cluster's autoscaler keep it large enough for some bundles, in the place of what was
    asked for before; none: for no more than what runs.

    Args:
        selectors: labels of the node of each bundle, which the first version does not regard.
    """
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=bundles, bundle_label_selectors=selectors)


def actor_id(handle: Any) -> str:
    """The id of an actor, hexadecimal."""
    return str(handle._actor_id.hex())


def started(handle: Any) -> Any:
    """A reference that is ready when the actor's constructor has returned; getting it raises the
    constructor's error."""
    return handle.__ray_ready__.remote()


def call_inside(
    handle: Any,
    function: Callable[..., Any],
    *arguments: Any,
    group: str = "",
    num_returns: int = 1,
) -> Any:
    """Call a function with an actor's instance, in the actor's process.

    Args:
        arguments: after the instance; references are replaced by their values.
        group: concurrency group whose thread runs it; empty: the default one.
        num_returns: how many values it returns, each with a reference of its own.

    Returns:
        A reference to the result, or several.
    """
    options: dict[str, Any] = {"concurrency_group": group} if group else {}
    method = handle.__ray_call__.options(num_returns=num_returns, **options)
    return method.remote(function, *arguments)


def worker_paths(started: Invocation) -> dict[str, Any]:
    """Options of `ray.init` by which workers import what the driver imports.

    Ray's workers search the driver's working directory and script directory first; the command
    `tessera` does not. A job's `working_dir` comes before installed packages, by PYTHONPATH, and
    may have files with our packages' names."""
    if not started.by_name:
        return {}
    from ray.job_config import JobConfig

    class WithoutPaths(JobConfig):
        def _get_proto_job_config(self) -> Any:
            self._py_driver_sys_path.clear()
            return super()._get_proto_job_config()

    options: dict[str, Any] = {"job_config": WithoutPaths()}
    if started.hidden:  # not always: workers of a runtime environment start a second later
        options["runtime_env"] = {"worker_process_setup_hook": "tessera_rl.import_own_packages"}
    return options

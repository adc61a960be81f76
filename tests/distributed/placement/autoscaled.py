"""A cluster whose autoscaler starts nodes on this machine, and a fleet that needs one of them.

`python -m tests.distributed.placement.autoscaled` prints what happened as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the nodes that the autoscaler starts ask for no token, either
    os.environ["RAY_AUTH_MODE"] = "disabled"

import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.experimental.internal_kv import internal_kv_get_gcs_client

from cluster.errors import FleetError
from cluster.placement.config import PlacementConfig
from cluster.placement.refusal import NoRoomError
from cluster.ray_backend.fleet import RayFleet
from cluster.ray_session import private
from cluster.ray_session.session import RayConfig, RaySession
from cluster.roles import FleetPlan, Resources, Role
from tests.distributed.stubs import START_S, Slow
from tests.logged import messages

WAIT_S = 150.0
LABELS = {"tessera-role": "sampler"}


def configuration(folder: Path, address: str) -> Path:
    """A head of one CPU, and a type of node with a GPU, of which two may be started."""
    lists = (
        "initialization_commands", "setup_commands", "head_setup_commands", "rsync_filter",
        "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands",
        "cluster_synced_files", "rsync_exclude",
    )  # fmt: skip
    config: dict[str, Any] = {
        "cluster_name": "fake",
        "max_workers": 2,
        "upscaling_speed": 20.0,
        "idle_timeout_minutes": 60,
        "provider": {
            "type": "fake_multinode",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": address,  # which its nodes join
        },
        "auth": {},
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "gpu": {
                "resources": {"CPU": 2, "GPU": 1},
                "labels": LABELS,
                "node_config": {},
                "min_workers": 0,
                "max_workers": 2,
            },
        },
        "head_node_type": "ray.head.default",
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "docker": {},
        **{name: [] for name in lists},
    }
    path = folder / "autoscaler.json"
    path.write_text(json.dumps(config))
    return path


@contextmanager
def autoscaling_cluster(folder: Path) -> Iterator[str]:
    """Address of the cluster; its processes end with the block."""
    changed = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "RAY_raylet_start_wait_time_s": "120",
    }
    with socket.socket() as chosen:
        chosen.bind(("", 0))
        port = chosen.getsockname()[1]
    address = f"{ray.util.get_node_ip_address()}:{port}"
    command = [
        "ray", "start", "--head", "--block", f"--port={port}", "--num-cpus=1",
        f"--autoscaling-config={configuration(folder, address)}", f"--temp-dir={folder / 'r'}",
        "--include-dashboard=false", "--object-store-memory=100000000",
        "--disable-usage-stats",
    ]  # fmt: skip
    head = subprocess.Popen(
        command,
        env={**os.environ, **changed},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        until(lambda: has_node(address), "the head starts")
        yield address
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            os.killpg(head.pid, number)
            time.sleep(2)
        head.wait()


def has_node(address: str) -> bool:
    try:
        return bool(private.ask_nodes(address, "", 5.0))
    except FleetError:
        return False


def requested() -> list[Any]:
    """What the first version of Ray's autoscaler is asked for by `request_resources`."""
    written = internal_kv_get_gcs_client().internal_kv_get(b"autoscaler_resource_request", None)
    return json.loads(written or "[]")


def until(done: Callable[[], bool], what: str) -> float:
    """Seconds that it took."""
    began = time.monotonic()
    while not done():
        assert time.monotonic() - began < WAIT_S, f"not within {WAIT_S:g} s: {what}"
        time.sleep(0.5)
    return time.monotonic() - began


def plan(samplers: int, wait_s: float = WAIT_S) -> FleetPlan:
    def role(name: str, resources: Resources, count: int = 1) -> Role:
        config = (0.0,) * count
        return Role(name=name, factory=Slow, config=config, resources=resources, count=count)

    small = Resources(num_cpus=0.1)
    return FleetPlan(
        sampler=role("sampler", Resources(num_cpus=1, num_gpus=1, labels=LABELS), samplers),
        reward_server=role("reward-server", small),
        moments_server=role("moments-server", small),
        learner=role("learner", small),
        timeout_s=START_S,
        placement=PlacementConfig(autoscale_wait_s=wait_s),
    )


def main(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with autoscaling_cluster(folder) as address, RaySession(RayConfig(address=address)) as session:
        until(lambda: private.autoscaler().found, "the autoscaler reports")
        found["nodes"] = [len(session.nodes)]
        with messages() as said, RayFleet(plan(1), session):
            found["nodes"].append(len(session.nodes))
            found["held"] = requested()
            found["asked"] = any("asking the cluster's autoscaler" in line for line in said)
        found["withdrawn"] = [requested()]
        try:
            with RayFleet(plan(5, wait_s=10.0), session):
                pass
        except NoRoomError as error:
            found["refused"] = str(error)
        found["withdrawn"].append(requested())
    return found


if __name__ == "__main__":
    from tests.distributed.placement import autoscaled

    with tempfile.TemporaryDirectory(prefix="as", dir="/tmp", ignore_cleanup_errors=True) as root:
        print(json.dumps(autoscaled.main(Path(root))))

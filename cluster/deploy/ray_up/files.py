"""Files for `ray up`: the cluster's YAML, and a script that submits the run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

import yaml

from cluster.deploy.checks import check_image, check_least, check_path
from cluster.deploy.groups import store_of
from cluster.deploy.plan_document import PlanDocument
from cluster.deploy.ray_up.machines import CPU_MACHINE, NodeType, node_types
from cluster.deploy.run_command import ROLE_LABEL, for_job_submit, run_arguments
from cluster.deploy.target import DeployOptions, Several, Target

CLUSTER, SUBMIT = "cluster.yaml", "submit"
HEAD = "head"
TOKEN = "~/.ray/auth_token"
PRESET = "/tmp/tessera/preset.yaml"
"""Of the cluster's machines: the preset, where it is a file."""
START = "export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0; ulimit -n 65536;"
GCS_PORT = 6379


@dataclass(frozen=True, kw_only=True)
class RayUpOptions(DeployOptions):
    """Write a cluster for `ray up`: on AWS, or on machines that are there (--head-ip)."""

    image: str = ""
    """Container image with Tessera, in which Ray runs; empty: on the machine itself."""
    setup: Several = ()
    """Commands that prepare a machine without an image, each with its own --setup: those that
    install Python and Tessera, or "echo . /shared/venv/bin/activate >> ~/.bashrc"."""
    region: str = "us-west-2"
    """Region of AWS."""
    ssh_user: str = "ubuntu"
    """User on the machines."""
    ssh_key: str = ""
    """Private key for --head-ip; on AWS Ray makes one."""
    idle_minutes: int = 10
    """Minutes after which an idle machine is given back."""
    disk_gb: int = 500
    """Disk of a machine on AWS."""
    head_ip: str = ""
    """Machine of yours that becomes the head, in place of AWS's."""
    worker_ip: Several = ()
    """Machines of yours beside it, each with its own --worker-ip."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image:
            check_image("--image", self.image)
        if self.ssh_key:
            check_path("--ssh-key", self.ssh_key)
        check_least(self, idle_minutes=1, disk_gb=50)
        _check_address("--head-ip", self.head_ip)
        for address in self.worker_ip:
            _check_address("--worker-ip", address)
        if self.worker_ip and not self.head_ip:
            raise ValueError("--worker-ip needs --head-ip")
        if len({self.head_ip, *self.worker_ip}) <= len(self.worker_ip):
            raise ValueError("--head-ip and --worker-ip must name each machine once")
        if self.image and self.setup:
            raise ValueError("--setup prepares machines without --image: give one of them")
        if not self.own_machines and not self.image and not self.setup:
            raise ValueError(
                "machines of AWS come without Tessera: give --image (cluster/deploy/docker, say) "
                "or commands that install it, --setup"
            )
        if not self.own_machines and not self.checkpoint_url and not self.run_dir:
            raise ValueError(
                "machines of AWS share no storage: give --checkpoint-url s3://bucket/run, or "
                "--run-dir on one that they mount"
            )

    @property
    def own_machines(self) -> bool:
        return bool(self.head_ip)

    @property
    def run_directory(self) -> str:
        return self.run_dir or f"/tmp/tessera/runs/{self.name}"


def _check_address(field: str, text: str) -> None:
    try:
        if text:
            ip_address(text)
    except ValueError:
        raise ValueError(f"{field} must be an IP address, found {text!r}") from None


def files(plan: PlanDocument, options: RayUpOptions) -> Mapping[str, str]:
    """The cluster, and the run's submission, by name."""
    types = [] if options.own_machines else node_types(plan)
    labels = {role: each.name for each in types for role in each.roles}
    return {
        CLUSTER: yaml.safe_dump(cluster(plan, options, types), sort_keys=False, width=96),
        SUBMIT: submission(plan, options, labels),
    }


def cluster(plan: PlanDocument, options: RayUpOptions, types: list[NodeType]) -> dict[str, Any]:
    """The document that `ray up` reads."""
    store = f" --object-store-memory={store_of(plan)}" if plan.object_store_bytes else ""
    head = (
        f"{START} ray start --head --port={GCS_PORT}{store} "
        "--autoscaling-config=~/ray_bootstrap_config.yaml"
    )
    worker = f"{START} ray start --address=$RAY_HEAD_IP:{GCS_PORT}{store}"
    preset = {PRESET: options.preset_path} if options.preset_path else {}
    document: dict[str, Any] = {
        "cluster_name": options.name,
        **(_own(options) if options.own_machines else _aws(options, types)),
        "idle_timeout_minutes": options.idle_minutes,
        # Ray's token, with which code can be run on the cluster. `ray get-auth-token --generate`
        # makes it here, and rsync keeps its mode 0600.
        "file_mounts": {TOKEN: TOKEN, **preset},
        "setup_commands": list(options.setup),
        "head_start_ray_commands": ["ray stop", head],
        "worker_start_ray_commands": ["ray stop", worker],
    }
    if options.image:
        document["docker"] = {
            "image": options.image,
            "container_name": "tessera",
            "pull_before_run": True,
            "run_options": ["--ulimit nofile=65536:65536"],
        }
    return document


def _own(options: RayUpOptions) -> dict[str, Any]:
    auth: dict[str, Any] = {"ssh_user": options.ssh_user}
    if options.ssh_key:
        auth["ssh_private_key"] = options.ssh_key
    return {
        "provider": {
            "type": "local",
            "head_ip": options.head_ip,
            "worker_ips": list(options.worker_ip),
        },
        "auth": auth,
        "min_workers": len(options.worker_ip),
        "max_workers": len(options.worker_ip),
    }


def _aws(options: RayUpOptions, types: list[NodeType]) -> dict[str, Any]:
    disk = {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": options.disk_gb, "VolumeType": "gp3"}}

    def machine(name: str) -> dict[str, Any]:
        return {"InstanceType": name, "BlockDeviceMappings": [disk]}

    available = {
        HEAD: {
            # No CPUs for workers: the driver and Ray's services have the machine, and the moments
            # server the two.
            "resources": {"CPU": 2},
            "labels": {ROLE_LABEL: HEAD},
            "node_config": machine(CPU_MACHINE.name),
            "min_workers": 0,
            "max_workers": 0,
        }
    }
    for each in types:
        gpus = {"GPU": each.machine.gpus} if each.machine.gpus else {}
        available[each.name] = {
            "resources": {"CPU": each.machine.cpus, **gpus},
            "labels": {ROLE_LABEL: each.name},
            "node_config": machine(each.machine.name),
            "min_workers": each.minimum,
            "max_workers": each.maximum,
        }
    return {
        "provider": {"type": "aws", "region": options.region, "cache_stopped_nodes": False},
        "auth": {"ssh_user": options.ssh_user},
        "max_workers": sum(each.maximum for each in types),
        "available_node_types": available,
        "head_node_type": HEAD,
    }


def submission(plan: PlanDocument, options: RayUpOptions, labels: Mapping[str, str]) -> str:
    """The script that submits the run; the same again resumes it."""
    preset = PRESET if options.preset_path else ""
    arguments = run_arguments(plan, options, options.run_directory, labels, preset)
    command = for_job_submit(["python", "-m", "learner.run", *arguments])
    return f"""\
#!/usr/bin/env bash
# Submit the run, or resume it, from this machine: `ray dashboard` holds a tunnel to the cluster.
set -euo pipefail
cd "$(dirname "$0")"
export RAY_AUTH_MODE=token RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265
ray dashboard {CLUSTER} &
tunnel=$!
trap 'kill "$tunnel"' EXIT
for _ in $(seq 60); do ray job list >/dev/null 2>&1 && break; sleep 1; done
ray job submit --no-wait -- \\
    {command}
"""


def next_steps(plan: PlanDocument, options: RayUpOptions) -> str:
    """What to do with the files."""
    place = shlex.quote(str(options.out))
    return (
        "token     ray get-auth-token --generate > /dev/null    (once on this machine)\n"
        f"start     ray up {place}/{CLUSTER}\n"
        f"submit    {place}/{SUBMIT}    (again: resumes)\n"
        f"watch     ray exec {place}/{CLUSTER} 'RAY_AUTH_MODE=token python -m cluster.status'\n"
        f"end       ray down {place}/{CLUSTER}"
    )


RAY_UP = Target(
    name="ray-up",
    about="a cluster for Ray's launcher: machines of AWS, or your own",
    options=RayUpOptions,
    files=files,
    checked="Valid by Ray's own schema and preparation; not run: no machine was started with it.",
    next_steps=next_steps,
)

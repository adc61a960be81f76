"""The RayJob of the KubeRay target, without Kubernetes: one host stands for each pod, its Ray node
is started with the group's parameters and labels, and the entrypoint goes through the submitter's
shell. A job that was stopped is submitted again on a new cluster, as a retry is."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.deploy.command import parse
from cluster.deploy.kuberay.files import files
from cluster.deploy.plan_document import read_plan
from cluster.io.run_layout import CHECKPOINTS, steps_in
from learner import plan as planner
from learner.monitoring.metrics import read_metrics
from tests.distributed.hosts.cluster import BIN, STORE_BYTES, HostCluster
from tests.distributed.hosts.network import Host, Network, why_not
from tests.distributed.hosts.runs import ROLES
from tests.small_run import OPTIONS, flags

ITERATIONS = 8
GIVEN = ["--preset", "miniature", *flags(OPTIONS | {"iterations": ITERATIONS, "num_samplers": 1})]
LONGEST_S = 600.0
PATIENT = {"RAY_health_check_timeout_ms": "30000", "RAY_health_check_failure_threshold": "20"}
"""No node is lost here: one that a busy machine holds up must not be taken for lost."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def job_of(shared: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """`spec` of the RayJob that the command writes for this run."""
    assert planner.main(["--json", *GIVEN]) == 0
    plan = read_plan(capsys.readouterr().out, "learner.plan")
    given = ["kuberay", "--preset", "miniature", "--gpus", "0", "--image", "a.b/c:1"]
    _, options = parse([*given, "--mount-path", str(shared)])
    found = files(plan, options)
    spec: dict[str, Any] = yaml.safe_load(found["overlays/job-0-gpus/rayjob.yaml"])["spec"]
    return spec


def pods_of(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The group of each pod, the head's first."""
    cluster = spec["rayClusterSpec"]
    return [cluster["headGroupSpec"]] + [
        group for group in cluster["workerGroupSpecs"] for _ in range(group["replicas"])
    ]


def ray_options(group: dict[str, Any]) -> dict[str, Any]:
    """Options of `ray start` as KubeRay writes them for a pod of a group."""
    given = {name.replace("-", "_"): value for name, value in group["rayStartParams"].items()}
    given["object_store_memory"] = STORE_BYTES  # this machine holds all
    (container,) = group["template"]["spec"]["containers"]
    env = {each["name"]: each["value"] for each in container["env"]} | PATIENT
    labels = ",".join(f"{key}={value}" for key, value in group["labels"].items())
    return {
        **given,
        "labels": labels,
        "env": {k: v for k, v in env.items() if k.startswith("RAY_")},
    }


@contextmanager
def ray_cluster(network: Network, spec: dict[str, Any]) -> Iterator[HostCluster]:
    """What KubeRay makes of `rayClusterSpec`."""
    head, *others = pods_of(spec)
    with HostCluster(network) as cluster:
        cluster.start_head(**ray_options(head))
        for host, group in zip(network.hosts[1:], others, strict=True):
            cluster.join(host, **ray_options(group))
        yield cluster


def submit(cluster: HostCluster, spec: dict[str, Any], name: str) -> None:
    """As the submitter's pod does: the entrypoint is a part of a shell script."""
    line = f"ray job submit --address {cluster.dashboard} --submission-id {name} --no-wait -- "
    ended = cluster.network.outside.run(
        ["bash", "-ce", line + spec["entrypoint"] + " ;"], cluster.environment
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def ray_job(cluster: HostCluster, *words: str) -> str:
    verb, *rest = words
    line = ["ray", "job", verb, f"--address={cluster.dashboard}", *rest]
    ended = cluster.network.outside.run(line, cluster.environment, timeout=LONGEST_S)
    return ended.stdout + ended.stderr


def until(what: Callable[[], bool], told: Callable[[], str]) -> None:
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < LONGEST_S, told()
        time.sleep(1)


def probe(host: Host) -> str:
    """What a node answers to KubeRay's probe, which sends no token."""
    program = (
        "import urllib.request as web\n"
        "print(web.urlopen('http://localhost:52365/api/healthz', timeout=30).status)"
    )
    done = host.run([str(BIN / "python"), "-c", program], {})
    return done.stdout.strip() or done.stderr


def homes(cluster: HostCluster) -> dict[str, set[str]]:
    """Class of every role's actor that there was -> labels `tessera-role` of its nodes."""
    program = (
        "import json; from ray.util.state import list_actors, list_nodes\n"
        f"where = dict(address='{cluster.dashboard}', detail=True, limit=1000)\n"
        "labels = {n.node_id: n.labels.get('tessera-role') for n in list_nodes(**where)}\n"
        "actors = [a for a in list_actors(**where) if a.node_id]\n"
        "print(json.dumps([[a.class_name, labels[a.node_id]] for a in actors]))"
    )
    done = cluster.network.outside.run([str(BIN / "python"), "-c", program], cluster.environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, set[str]] = {}
    for name, label in json.loads(done.stdout.splitlines()[-1]):
        if name in ROLES:
            found.setdefault(name, set()).add(label)
    return found


def test_a_job_runs_where_it_must_and_its_retry_resumes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    if reason := why_not():
        pytest.skip(f"several hosts: {reason}")
    with Network(count=4) as network:
        spec = job_of(network.shared, capsys)
        assert len(pods_of(spec)) == len(network.hosts)
        directory = network.shared / "runs" / "tessera"
        metrics = directory / "metrics.jsonl"
        with ray_cluster(network, spec) as cluster:
            assert [probe(host) for host in network.hosts] == ["200"] * len(network.hosts)
            submit(cluster, spec, "first")
            until(
                lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 1,
                lambda: ray_job(cluster, "logs", "first"),
            )
            ray_job(cluster, "stop", "first")  # SIGTERM, and the time that the head allows
            done = len(read_metrics(metrics))
            assert "was stopped" in ray_job(cluster, "status", "first")
            assert 0 < done < ITERATIONS
            assert steps_in(directory / CHECKPOINTS)[-1] == done  # not only every second one
        with ray_cluster(network, spec) as cluster:
            submit(cluster, spec, "second")
            until(
                lambda: "succeeded" in ray_job(cluster, "status", "second"),
                lambda: ray_job(cluster, "logs", "second"),
            )
            assert "resum" in ray_job(cluster, "logs", "second")
            assert homes(cluster) == {
                "Learner": {"learner"},
                "MomentsServer": {"head"},
                "Sampler": {"sampler"},
                "RewardServer": {"reward-server"},
            }
        found = read_metrics(metrics)
        assert [each["iteration"] for each in found] == list(range(1, ITERATIONS + 1))
        assert all(math.isfinite(each["reward/mean"]) for each in found if "reward/mean" in each)

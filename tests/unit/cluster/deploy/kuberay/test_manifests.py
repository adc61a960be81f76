"""Manifests of KubeRay: what is asked of Kubernetes adds up, and each option arrives."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from cluster.deploy.command import parse
from cluster.deploy.kuberay.files import files
from cluster.deploy.plan_document import read_plan
from cluster.errors import ConfigError
from tests.unit.cluster.deploy.kuberay.manifests import (
    IMAGE,
    PLANS,
    labelled,
    made,
    manifests,
    of_kind,
    options_of,
    ray_job,
    templates,
)
from tests.unit.cluster.deploy.plans import eight_gpus, many_gpus, text
from tests.unit.cluster.deploy.test_run_command import through_job_submit

ALL = pytest.mark.parametrize("gpus", PLANS)
UNITS = {"Mi": 1 << 20, "Gi": 1 << 30}


def bytes_of(quantity: str) -> int:
    return int(quantity[:-2]) * UNITS[quantity[-2:]]


@ALL
def test_gpus_and_cpus_of_ray_are_those_of_kubernetes(gpus: int) -> None:
    cluster = ray_job(gpus)["rayClusterSpec"]
    total = 0
    for group in cluster["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        asked = container["resources"]["limits"]
        assert container["resources"]["requests"] == asked
        assert group["rayStartParams"]["num-cpus"] == asked["cpu"]
        assert group["rayStartParams"]["num-gpus"] == asked.get("nvidia.com/gpu", "0")
        total += group["replicas"] * int(asked.get("nvidia.com/gpu", 0))
    assert total == gpus
    head = templates(cluster)["head"]["spec"]["containers"][0]
    assert "nvidia.com/gpu" not in head["resources"]["limits"]
    assert int(head["resources"]["limits"]["cpu"]) > int(
        cluster["headGroupSpec"]["rayStartParams"]["num-cpus"]
    )


@ALL
def test_the_object_store_is_in_shared_memory_and_in_the_limit(gpus: int) -> None:
    cluster = ray_job(gpus)["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        spec = group["template"]["spec"]
        store = int(group["rayStartParams"]["object-store-memory"])
        (memory,) = (each for each in spec["volumes"] if each["name"] == "shared-memory")
        assert memory["emptyDir"]["medium"] == "Memory"
        assert bytes_of(memory["emptyDir"]["sizeLimit"]) > store
        limit = bytes_of(spec["containers"][0]["resources"]["limits"]["memory"])
        assert limit > bytes_of(memory["emptyDir"]["sizeLimit"])
        assert {"name": "shared-memory", "mountPath": "/dev/shm"} in spec["containers"][0][
            "volumeMounts"
        ]


@ALL
def test_roles_select_the_nodes_of_their_groups(gpus: int) -> None:
    spec = ray_job(gpus)
    groups = spec["rayClusterSpec"]["workerGroupSpecs"]
    there = {group["labels"]["tessera-role"] for group in groups}
    asked = re.findall(r"--(\w+)\.labels tessera-role=([\w-]+)", spec["entrypoint"])
    assert {role for role, _ in asked} == {"learner", "sampler", "reward"}
    pools = {name for name in there if name.startswith("reward-") and name != "reward-server"}
    assert {label for _, label in asked} | pools == there
    for group in groups:  # KubeRay refuses labels and resources in both places
        assert group["labels"]["tessera-role"] == group["groupName"]
        assert "labels" not in group["rayStartParams"]
        assert "resources" not in group


def test_only_what_scales_has_the_autoscaler() -> None:
    scaling = ray_job(8)["rayClusterSpec"]
    assert scaling["enableInTreeAutoscaling"] is True
    assert scaling["autoscalerOptions"]["version"] == "v2"
    bounds = {
        each["groupName"]: (each["minReplicas"], each["replicas"], each["maxReplicas"])
        for each in scaling["workerGroupSpecs"]
    }
    assert bounds == {"learner": (1, 1, 1), "sampler": (1, 1, 1), "reward-server": (1, 2, 4)}
    fixed = ray_job(1)["rayClusterSpec"]
    assert fixed["enableInTreeAutoscaling"] is False
    assert "autoscalerOptions" not in fixed


def test_the_entrypoint_resumes() -> None:
    spec = ray_job(8, "--retries", "7", "--checkpoint-url", "s3://bucket/run", "--claim", "runs")
    assert spec["backoffLimit"] == 7
    arguments = through_job_submit(spec["entrypoint"])
    assert arguments[:3] == ["python", "-m", "learner.run"]
    assert "--auto-resume" in arguments
    assert arguments[arguments.index("--run-dir") + 1] == "/shared/runs/tessera"
    assert arguments[arguments.index("--output.checkpoint-url") + 1] == "s3://bucket/run"
    assert spec["shutdownAfterJobFinishes"] is True  # the time to live needs it


def test_sigterm_has_time_for_a_checkpoint() -> None:
    def head(gpus: int, **plan: Any) -> tuple[int, int, str]:
        values = PLANS[gpus]() | plan
        job = made(gpus, plan=values)[f"overlays/job-{gpus}-gpus/rayjob.yaml"]
        spec = templates(yaml.safe_load(job)["spec"]["rayClusterSpec"])["head"]["spec"]
        env = {each["name"]: each.get("value") for each in spec["containers"][0]["env"]}
        stop = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
        return spec["terminationGracePeriodSeconds"], int(env["RAY_JOB_STOP_WAIT_TIME_S"]), stop

    grace, wait, stop = head(8)
    assert (grace, wait) == (360, 300)
    assert "cluster.stop --run /shared/runs/tessera --checkpoint --timeout-s 300" in stop
    grace, wait, _ = head(8, iteration_s=400.0, checkpoint_bytes=20_000_000_000)
    assert wait >= 3 * 400 + 200
    assert grace > wait
    assert "lifecycle" not in str(next(of_kind(manifests(8), "RayCluster")))  # of no one run


@pytest.mark.parametrize(("gpus", "learning"), [(8, "learner"), (1, "shared"), (0, "learner")])
def test_learners_outlive_the_heads_checkpoint(gpus: int, learning: str) -> None:
    """When a cluster is deleted, all of its pods are told to end at once."""
    pods = templates(ray_job(gpus)["rayClusterSpec"])
    head = pods["head"]["spec"]["terminationGracePeriodSeconds"]
    assert pods[learning]["spec"]["terminationGracePeriodSeconds"] >= head
    ends = {name: pod["spec"]["containers"][0].get("lifecycle") for name, pod in pods.items()}
    assert {name for name, hook in ends.items() if hook} == {"head", learning}
    assert ends[learning]["preStop"]["exec"]["command"][-1] == "sleep 300"


@ALL
def test_nothing_runs_as_root_and_the_probes_are_kuberays(gpus: int) -> None:
    spec = ray_job(gpus)
    pods = [*templates(spec["rayClusterSpec"]).values(), spec["submitterPodTemplate"]]
    for pod in pods:
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["runAsUser"] == 1000
        for container in pod["spec"]["containers"]:
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["image"] == IMAGE
            assert not {"livenessProbe", "readinessProbe", "startupProbe"} & container.keys()
            assert "command" not in container  # KubeRay writes `ray start`
        assert pod["metadata"]["labels"]["tessera-run"] == "tessera"
    mounted = {name: pod["spec"]["automountServiceAccountToken"] for name, pod in
               templates(spec["rayClusterSpec"]).items()}  # fmt: skip
    scales = spec["rayClusterSpec"]["enableInTreeAutoscaling"]
    assert [name for name, token in mounted.items() if token] == ["head"] * scales  # its own


@pytest.mark.parametrize(
    ("given", "volume"),
    [
        ([], {"persistentVolumeClaim": {"claimName": "tessera-shared"}}),
        (["--claim", "team"], {"persistentVolumeClaim": {"claimName": "team"}}),
        (["--storage-class", "x"], {"persistentVolumeClaim": {"claimName": "tessera-shared"}}),
        (["--nfs", "10.0.0.1:/export/a"], {"nfs": {"server": "10.0.0.1", "path": "/export/a"}}),
        (["--host-path", "/mnt/x"], {"hostPath": {"path": "/mnt/x", "type": "Directory"}}),
    ],
)
def test_storage_is_on_every_pod(given: list[str], volume: dict[str, Any]) -> None:
    found = manifests(8, *given)
    for pod in templates(next(of_kind(found, "RayJob"))["spec"]["rayClusterSpec"]).values():
        assert {"name": "shared", **volume} in pod["spec"]["volumes"]
        (container,) = pod["spec"]["containers"]
        assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]
        assert {"name": "TESSERA_WEIGHTS", "value": "/shared/weights"} in container["env"]
    claims = list(of_kind(found, "PersistentVolumeClaim"))
    assert bool(claims) == (volume.get("persistentVolumeClaim") == {"claimName": "tessera-shared"})
    assert all(each["spec"]["accessModes"] == ["ReadWriteMany"] for each in claims)
    assert [each["spec"].get("storageClassName") for each in claims if given] in ([], ["x"])


def test_with_a_url_alone_only_the_head_has_a_run_directory() -> None:
    found = manifests(8, "--checkpoint-url", "s3://bucket/run")
    pods = templates(next(of_kind(found, "RayJob"))["spec"]["rayClusterSpec"])
    names = {group: {v["name"] for v in pod["spec"]["volumes"]} for group, pod in pods.items()}
    assert names["head"] == {"shared-memory", "runs"}
    assert {name for group in names if group != "head" for name in names[group]} == {
        "shared-memory"
    }
    assert not list(of_kind(found, "PersistentVolumeClaim"))
    assert "TESSERA_WEIGHTS" not in str(found)
    assert "/opt/weights" in str(manifests(8, "--checkpoint-url", "s3://b", "--weights-dir",
                                           "/opt/weights"))  # fmt: skip


def test_options_of_pods() -> None:
    spec = ray_job(
        8, "--namespace", "team-a", "--token-secret", "ray-token", "--env-secret", "s3",
        "--env-secret", "wandb", "--pull-secret", "registry", "--node-selector",
        "nvidia.com/gpu.product=NVIDIA-H200", "--toleration", "team=a:NoExecute", "--toleration",
        "spot", "--priority-class", "high", "--service-account", "cloud", "--user-id", "1234",
        "--gpu-resource", "amd.com/gpu", "--name", "night", "--keep-s", "0", "--idle-s", "30",
        "--ray-version", "2.61.1",
    )  # fmt: skip
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    assert cluster["rayVersion"] == "2.61.1"
    assert spec["ttlSecondsAfterFinished"] == 0
    assert cluster["autoscalerOptions"]["idleTimeoutSeconds"] == 30
    for name, pod in templates(cluster).items():
        inner = pod["spec"]
        (container,) = inner["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": n}} for n in ("s3", "wandb")]
        assert inner["imagePullSecrets"] == [{"name": "registry"}]
        assert inner["priorityClassName"] == "high"
        assert inner["serviceAccountName"] == "cloud"
        assert inner["securityContext"]["runAsUser"] == 1234
        assert {"key": "team", "operator": "Equal", "value": "a", "effect": "NoExecute"} in inner[
            "tolerations"
        ]
        assert {"key": "spot", "operator": "Exists"} in inner["tolerations"]
        on_gpu = "amd.com/gpu" in container["resources"]["limits"]
        assert on_gpu == (name != "head")
        assert ("nodeSelector" in inner) == on_gpu
        taint = {"key": "amd.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        assert (taint in inner["tolerations"]) == on_gpu
    found = manifests(8, "--namespace", "team-a", "--service-account", "cloud", "--name", "night")
    assert {each["metadata"]["namespace"] for each in found.values() if "metadata" in each} == {
        "team-a"
    }
    assert not list(of_kind(found, "ServiceAccount"))


def test_policy_budget_and_monitor() -> None:
    found = manifests(8, "--pod-monitor")
    (policy,) = of_kind(found, "NetworkPolicy")
    rules = policy["spec"]["ingress"]
    assert policy["spec"]["podSelector"]["matchLabels"] == {"tessera-run": "tessera"}
    assert rules[0] == {
        "from": [{"podSelector": {"matchLabels": {"tessera-run": "tessera"}}}]
    }  # all ports, of this run's pods alone: no namespaceSelector
    assert [rule["ports"][0]["port"] for rule in rules[1:]] == [8265, 8080]
    budget = next(of_kind(found, "PodDisruptionBudget"))["spec"]
    assert budget["minAvailable"] == 2  # head and the one pod of learners
    assert budget["selector"]["matchExpressions"][0]["values"] == ["head", "learner"]
    shared = next(of_kind(manifests(1), "PodDisruptionBudget"))["spec"]
    assert shared["selector"]["matchExpressions"][0]["values"] == ["head", "shared"]
    (monitor,) = of_kind(found, "PodMonitor")
    assert monitor["spec"]["podMetricsEndpoints"] == [{"port": "metrics"}]
    for pod in templates(ray_job(8)["rayClusterSpec"]).values():
        ports = {
            each["name"]: each["containerPort"] for each in pod["spec"]["containers"][0]["ports"]
        }
        assert ports["metrics"] == 8080
    assert not list(of_kind(manifests(8), "PodMonitor"))


def test_overlays_share_a_base_and_list_every_file() -> None:
    eight, many = made(8, "--pod-monitor"), made(64, "--pod-monitor")
    base = {path for path in eight if path.startswith("base/")}
    assert {path: eight[path] for path in base} == {
        path: body for path, body in many.items() if path.startswith("base/")
    }
    assert not (eight.keys() - base) & many.keys()
    for path, body in {**eight, **many}.items():
        if path.endswith("kustomization.yaml"):
            folder = path.rpartition("/")[0]
            listed = yaml.safe_load(body)["resources"]
            beside = {
                each.rpartition("/")[2]
                for each in {**eight, **many}
                if each.rpartition("/")[0] == folder and not each.endswith("kustomization.yaml")
            }
            assert {each for each in listed if each != "../../base"} == beside
            assert ("../../base" in listed) == folder.startswith("overlays/")


def test_a_preset_that_is_a_file_goes_along(tmp_path: Any) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text("iterations: 3  # a note\nconditions: {template: 'a: b'}\n")
    _, options = parse(["kuberay", "--preset", str(preset), "--gpus", "8", "--image", IMAGE])
    values = eight_gpus() | {"arguments": ["--preset", str(preset)], "preset": str(preset)}
    found = files(read_plan(text(values), "plan"), options)
    carried = yaml.safe_load(found["overlays/job-8-gpus/preset.yaml"])
    assert carried["data"]["preset.yaml"] == preset.read_text()
    job = yaml.safe_load(found["overlays/job-8-gpus/rayjob.yaml"])["spec"]
    assert "--preset /etc/tessera/preset.yaml" in job["entrypoint"]
    assert str(tmp_path) not in job["entrypoint"]
    head = templates(job["rayClusterSpec"])["head"]["spec"]
    assert {"name": "preset", "configMap": {"name": "tessera-preset"}} in head["volumes"]


def test_pools_must_select_their_nodes() -> None:
    with pytest.raises(
        ConfigError, match=r"the pool 'fid' might run .*labels: \{tessera-role: rew"
    ):
        made(64, plan=many_gpus())
    assert made(64, plan=labelled(many_gpus()))


REFUSED = {
    "--name": ["Night", "1st", "a_b", "x" * 41, "-a", "a-", "", "a.b"],
    "--namespace": ["Team", "a_b", "x" * 64, "", "a.b"],
    "--image": ["tessera", "Tessera:1", "a b:1", "reg:5000/x", "x:", "tessera:1@sha256:12"],
    "--claim": ["My_Claim", "a b", "-a"],
    "--storage-class": ["A"],
    "--storage-size": ["0", "500GB", "-1Gi", "big", "1e3", "", "0Gi", "5 Gi"],
    "--nfs": ["server", "server:", "server:relative", ":/x", "ser ver:/x"],
    "--host-path": ["relative", "/a/../b", "/a b", "/a;b"],
    "--mount-path": ["shared", "/", "/dev/shm", "/a b", "/x'y"],
    "--run-dir": ["runs/x", "/elsewhere/x", "/shared/../etc", "/shared/$HOME"],
    "--checkpoint-url": ["bucket/run", "s3:/x", "ftp://x/y"],
    "--token-secret": ["Secret", "a/b"],
    "--env-secret": ["A_B"],
    "--pull-secret": ["a b"],
    "--gpus-per-node": ["0", "-1", "3000000000"],
    "--gpu-resource": ["gpu", "nvidia.com/cpu", "NVIDIA.com/gpu"],
    "--node-selector": ["product", "=x", "a/b/c=1", "a=b c", "a=" + "x" * 64],
    "--toleration": ["=a", "k:Never", "a b", "k=v:"],
    "--priority-class": ["High"],
    "--service-account": ["A"],
    "--user-id": ["0", "-1"],
    "--retries": ["-1", "3000000000"],
    "--keep-s": ["-1"],
    "--idle-s": ["0"],
    "--ray-version": ["2.60", "latest", "v2.60.0"],
}


@pytest.mark.parametrize(
    ("option", "value"), [(name, value) for name, values in REFUSED.items() for value in values]
)
def test_bad_values_are_refused_by_name(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"--preset": "x", "--gpus": "8", "--image": IMAGE} | {option: value}
    with pytest.raises(SystemExit, match="2"):
        parse(["kuberay", *(f"{name}={each}" for name, each in words.items())])
    told = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert option in told
    assert "found" in told


def test_two_storages_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        options_of(8, "--claim", "a", "--nfs", "b:/c")
    assert "--claim and --nfs name two storages" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        options_of(8, "--env-secret", "a", "--env-secret", "a")
    assert "--env-secret must be named once each" in capsys.readouterr().err

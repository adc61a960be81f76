"""Pod templates of the head, of worker groups and of the submitter, and the specification of a
RayCluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.deploy.checks import check_label_pair, check_toleration
from cluster.deploy.groups import GIB, MIB, HeadPod, PodGroup
from cluster.deploy.kuberay.options import NFS, KubeRayOptions
from cluster.deploy.run_command import ROLE_LABEL

Manifest = dict[str, Any]

RUN_LABEL = "tessera-run"
"""Label of every pod of a run: policies, budgets and monitors select by it."""
HEAD, SUBMITTER = "head", "submitter"
PORTS = {"gcs-server": 6379, "dashboard": 8265, "metrics": 8080}
SHM_SPARE = 256 * MIB  # of /dev/shm beside the object store: NCCL's and PyTorch's buffers
STOP_SPARE_S = 60  # of the grace period, for what Kubernetes and the command take themselves
WORKER_GRACE_S = 60
PRESET_DIRECTORY, PRESET_FILE = "/etc/tessera", "preset.yaml"
ACCELERATOR_LABEL = "ray.io/accelerator-type"


def ray_cluster_spec(
    head: HeadPod, groups: Sequence[PodGroup], options: KubeRayOptions, stop_s: int, job: bool
) -> Manifest:
    """The `spec` of a RayCluster, `rayClusterSpec` of a RayJob.

    Args:
        stop_s: longest wait for the run's checkpoint when the head is to end, seconds.
        job: whether the cluster is of one job, which the head stops before it ends.
    """
    auth = {"mode": "token"}
    if options.token_secret:
        auth["secretName"] = options.token_secret
    spec: Manifest = {"rayVersion": options.ray, "authOptions": auth}
    scales = any(group.scales for group in groups)
    spec["enableInTreeAutoscaling"] = scales
    if scales:
        spec["autoscalerOptions"] = {
            "version": "v2",  # the one that knows labels
            "upscalingMode": "Default",
            "idleTimeoutSeconds": options.idle_s,
            "securityContext": _container_security(),
            "resources": _resources(cpus="500m", memory="1Gi"),
        }
    spec["headGroupSpec"] = _head_group(head, options, stop_s, job, scales)
    spec["workerGroupSpecs"] = [
        _worker_group(group, options, stop_s if job and group.learns else 0) for group in groups
    ]
    return spec


def _head_group(
    head: HeadPod, options: KubeRayOptions, stop_s: int, job: bool, scales: bool
) -> Manifest:
    container = _container(HEAD, options)
    container["ports"] = [{"name": name, "containerPort": port} for name, port in PORTS.items()]
    # A stopped job gets SIGTERM and three seconds, unless this says more
    container["env"].append({"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": str(stop_s)})
    container["resources"] = _resources(head.cpus, _gib(head.memory_bytes))
    if job:
        stop = (
            f"python -m cluster.stop --run {options.run_directory} --checkpoint "
            f"--timeout-s {stop_s} || true"
        )
        container["lifecycle"] = _before_end(stop)
    pod = _pod(container, HEAD, options, head.object_store_bytes)
    # The autoscaler, which KubeRay puts beside the head, asks Kubernetes for pods
    pod["spec"]["automountServiceAccountToken"] = scales
    pod["spec"]["terminationGracePeriodSeconds"] = stop_s + STOP_SPARE_S
    return {
        "labels": {ROLE_LABEL: HEAD},
        # CPUs for the moments server alone, and no GPU: no other worker fits here
        "rayStartParams": {
            "num-cpus": str(head.ray_cpus),
            "num-gpus": "0",
            "object-store-memory": str(head.object_store_bytes),
        },
        "template": pod,
    }


def _worker_group(group: PodGroup, options: KubeRayOptions, stop_s: int) -> Manifest:
    """
    Args:
        stop_s: how long the pods stay, once they are to end, for a checkpoint of the learner.
    """
    container = _container("worker", options)
    container["ports"] = [{"name": "metrics", "containerPort": PORTS["metrics"]}]
    asked = {options.gpu_resource: str(group.gpus)} if group.gpus else {}
    container["resources"] = _resources(group.cpus, _gib(group.memory_bytes), asked)
    pod = _pod(container, group.name, options, group.object_store_bytes, group.gpus)
    pod["spec"]["automountServiceAccountToken"] = False
    pod["spec"]["terminationGracePeriodSeconds"] = stop_s + WORKER_GRACE_S
    if stop_s:  # all pods of a cluster are told to end at once; these end with the head's Ray
        container["lifecycle"] = _before_end(f"sleep {stop_s}")
    if group.gpus and options.node_selector:
        pairs = [check_label_pair("--node-selector", text) for text in options.node_selector]
        pod["spec"]["nodeSelector"] = dict(pairs)
    labels = {ROLE_LABEL: group.name}
    if group.gpus and group.accelerator_type:
        labels[ACCELERATOR_LABEL] = group.accelerator_type
    return {
        "groupName": group.name,
        "replicas": group.replicas,
        "minReplicas": group.min_replicas,
        "maxReplicas": group.max_replicas,
        "labels": labels,
        "rayStartParams": {
            "num-cpus": str(group.cpus),
            "num-gpus": str(group.gpus),
            "object-store-memory": str(group.object_store_bytes),
        },
        "template": pod,
    }


def submitter_pod(options: KubeRayOptions) -> Manifest:
    """Of the pod that runs `ray job submit`; KubeRay adds the command and the token."""
    container = {
        "name": "submitter",
        "image": options.image,
        "resources": _resources(cpus=1, memory="1Gi"),
        "securityContext": _container_security(),
    }
    spec: Manifest = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": _pod_security(options),
        "containers": [container],
    }
    _add_common(spec, options, gpus=0)
    return {"metadata": {"labels": _labels(options, SUBMITTER)}, "spec": spec}


def _before_end(command: str) -> Manifest:
    """Run before SIGTERM is sent."""
    return {"preStop": {"exec": {"command": ["/bin/sh", "-c", command]}}}


def _pod(
    container: Manifest, role: str, options: KubeRayOptions, object_store: int, gpus: int = 0
) -> Manifest:
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    volumes: list[Manifest] = [
        {
            "name": "shared-memory",
            "emptyDir": {"medium": "Memory", "sizeLimit": _mib(object_store + SHM_SPARE)},
        }
    ]
    if options.shared:
        mounts.append({"name": "shared", "mountPath": options.mount_path})
        volumes.append({"name": "shared", **_shared_volume(options)})
    elif role == HEAD:  # the run directory; its checkpoints are at the URL, too
        mounts.append({"name": "runs", "mountPath": options.run_directory.rpartition("/")[0]})
        volumes.append({"name": "runs", "emptyDir": {}})
    if role == HEAD and options.preset_text:
        mounts.append({"name": "preset", "mountPath": PRESET_DIRECTORY})
        volumes.append({"name": "preset", "configMap": {"name": preset_name(options)}})
    container["volumeMounts"] = mounts
    spec: Manifest = {
        "serviceAccountName": options.service_account or options.name,
        "securityContext": _pod_security(options),
        "containers": [container],
        "volumes": volumes,
    }
    _add_common(spec, options, gpus)
    return {"metadata": {"labels": _labels(options, role)}, "spec": spec}


def _labels(options: KubeRayOptions, role: str) -> dict[str, str]:
    return {RUN_LABEL: options.name, ROLE_LABEL: role}


def _add_common(spec: Manifest, options: KubeRayOptions, gpus: int) -> None:
    if options.pull_secret:
        spec["imagePullSecrets"] = [{"name": name} for name in options.pull_secret]
    if options.priority_class:
        spec["priorityClassName"] = options.priority_class
    tolerations = [_toleration(text) for text in options.toleration]
    if gpus:  # clouds keep nodes with GPUs to pods that ask for one
        tolerations.append(_toleration(f"{options.gpu_resource}:NoSchedule"))
    if tolerations:
        spec["tolerations"] = tolerations


def _toleration(text: str) -> dict[str, str]:
    key, value, effect = check_toleration("--toleration", text)
    made = {"key": key, "operator": "Equal" if value else "Exists"}
    return made | ({"value": value} if value else {}) | ({"effect": effect} if effect else {})


def _container(role: str, options: KubeRayOptions) -> Manifest:
    env = [{"name": "PYTHONUNBUFFERED", "value": "1"}]
    if options.weights:
        env.append({"name": "TESSERA_WEIGHTS", "value": options.weights})
        env.append({"name": "HF_HOME", "value": f"{options.weights}/huggingface"})
    container: Manifest = {"name": f"ray-{role}", "image": options.image, "env": env}
    if options.env_secret:
        container["envFrom"] = [{"secretRef": {"name": name}} for name in options.env_secret]
    container["securityContext"] = _container_security()
    return container


def _container_security() -> Manifest:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _pod_security(options: KubeRayOptions) -> Manifest:
    return {
        "runAsNonRoot": True,
        "runAsUser": options.user_id,
        "runAsGroup": options.user_id,
        "fsGroup": options.user_id,
        "fsGroupChangePolicy": "OnRootMismatch",  # not file by file at every start
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _shared_volume(options: KubeRayOptions) -> Manifest:
    if options.nfs:
        found = NFS.fullmatch(options.nfs)
        assert found is not None, "KubeRayOptions checks it"
        return {"nfs": {"server": found["server"], "path": found["path"]}}
    if options.host_path:
        return {"hostPath": {"path": options.host_path, "type": "Directory"}}
    return {"persistentVolumeClaim": {"claimName": options.claim or claim_name(options)}}


def claim_name(options: KubeRayOptions) -> str:
    """Of the claim that is made."""
    return f"{options.name}-shared"


def preset_name(options: KubeRayOptions) -> str:
    """Of the map that holds the preset."""
    return f"{options.name}-preset"


def _resources(cpus: int | str, memory: str, more: Mapping[str, str] | None = None) -> Manifest:
    """Requests equal to limits: such pods are evicted last."""
    asked = {"cpu": str(cpus), "memory": memory, **(more or {})}
    return {"requests": dict(asked), "limits": dict(asked)}


def _gib(size: int) -> str:
    return f"{-(-size // GIB)}Gi"


def _mib(size: int) -> str:
    return f"{-(-size // MIB)}Mi"

"""The target `kuberay`: a kustomize base, and for each plan an overlay with a RayJob and one with a
RayCluster."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import yaml

from cluster.deploy.groups import PodGroup, groups_of, head_of
from cluster.deploy.kuberay import support
from cluster.deploy.kuberay.options import KubeRayOptions
from cluster.deploy.kuberay.pods import (
    PRESET_DIRECTORY,
    PRESET_FILE,
    Manifest,
    ray_cluster_spec,
    submitter_pod,
)
from cluster.deploy.plan_document import PlanDocument
from cluster.deploy.run_command import for_job_submit, run_arguments
from cluster.deploy.target import Target

BASE = "base"
CHECKED = "Not run on a Kubernetes cluster with GPUs; how it was checked: cluster/deploy/README.md."
LEAST_STOP_S, WRITE_BYTES_PER_S = 300, 100e6


def files(plan: PlanDocument, options: KubeRayOptions) -> Mapping[str, str]:
    """Relative path -> text of a manifest."""
    head, groups = head_of(plan), groups_of(plan, options.gpus_per_node)
    stop_s = stop_seconds(plan)

    def spec(job: bool) -> Manifest:
        return ray_cluster_spec(head, groups, options, stop_s, job)

    name, budget = options.name, support.disruption_budget(groups, options)
    made = {
        f"{BASE}/{path}": text for path, text in _kustomization(_base(options), options).items()
    }
    job = {"rayjob.yaml": ray_job(plan, groups, options, spec(job=True)), "budget.yaml": budget}
    cluster = {
        "raycluster.yaml": {
            "apiVersion": "ray.io/v1",
            "kind": "RayCluster",
            "metadata": support.metadata(options, name),
            "spec": spec(job=False),
        },
        "budget.yaml": budget,
    }
    if options.preset_text:
        preset = support.preset_map(options)
        job["preset.yaml"] = cluster["preset.yaml"] = preset
    for kind, manifests in (("job", job), ("cluster", cluster)):
        overlay = _kustomization(manifests, options, resources=[f"../../{BASE}"])
        made |= {f"{folder_of(kind, plan)}/{path}": text for path, text in overlay.items()}
    return made


def folder_of(kind: str, plan: PlanDocument) -> str:
    """Of an overlay."""
    return f"overlays/{kind}-{plan.gpus}-gpu{'s' * (plan.gpus != 1)}"


def _base(options: KubeRayOptions) -> dict[str, Manifest]:
    made = {"network-policy.yaml": support.network_policy(options)}
    if not options.service_account:
        made["service-account.yaml"] = support.service_account(options)
    if options.makes_claim:
        made["storage.yaml"] = support.storage_claim(options)
    if options.pod_monitor:
        made["pod-monitor.yaml"] = support.pod_monitor(options)
    return made


def _kustomization(
    manifests: Mapping[str, Manifest], options: KubeRayOptions, resources: Sequence[str] = ()
) -> dict[str, str]:
    """Manifests, and the file that lists them."""
    listed: Manifest = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": options.namespace,
        "resources": [*resources, *manifests],
    }
    everything = {"kustomization.yaml": listed, **manifests}
    return {path: as_yaml(manifest) for path, manifest in everything.items()}


def ray_job(
    plan: PlanDocument, groups: Sequence[PodGroup], options: KubeRayOptions, cluster: Manifest
) -> Manifest:
    """A RayJob whose retries resume the run, each on a new cluster."""
    labels = {role.name: group.name for group in groups for role in group.roles}
    preset = f"{PRESET_DIRECTORY}/{PRESET_FILE}" if options.preset_text else ""
    arguments = run_arguments(plan, options, options.run_directory, labels, preset)
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": support.metadata(options, options.name),
        "spec": {
            "entrypoint": for_job_submit(["python", "-m", "learner.run", *arguments]),
            "submissionMode": "K8sJobMode",
            "backoffLimit": options.retries,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": options.keep_s,
            "submitterPodTemplate": submitter_pod(options),
            "rayClusterSpec": cluster,
        },
    }


def stop_seconds(plan: PlanDocument) -> int:
    """Longest wait for the end of an iteration and a checkpoint, seconds; both slower than planned
    by far."""
    write = plan.checkpoint_bytes / WRITE_BYTES_PER_S
    return max(LEAST_STOP_S, math.ceil((3 * (plan.iteration_s or 0) + write) / 60) * 60)


def as_yaml(manifest: Manifest) -> str:
    return yaml.safe_dump(manifest, sort_keys=False, width=100, default_flow_style=False)


def next_steps(plan: PlanDocument, options: KubeRayOptions) -> str:
    job = options.out / folder_of("job", plan)
    return (
        f"kubectl apply -k {job}      starts the run, and resumes it; its pods: "
        f"kubectl -n {options.namespace} get pods -l tessera-run={options.name}"
    )


KUBERAY = Target(
    name="kuberay",
    about=KubeRayOptions.__doc__ or "",
    options=KubeRayOptions,
    files=files,
    checked=CHECKED,
    next_steps=next_steps,
    common=(f"{BASE}/",),
)

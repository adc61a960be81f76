"""Manifests against schemas: KubeRay's fields, Kubernetes' objects, rules of KubeRay's operator.

TESSERA_KUBERAY_CRDS names a directory with KubeRay's CRDs (`ray-operator/config/crd/bases` of its
repository), against which the manifests are checked in full.
"""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any

import pytest
from kubernetes_validate import ValidationError

from tests.unit.cluster.deploy.kuberay.manifests import PLANS, manifests, of_kind, templates
from tests.unit.cluster.deploy.kuberay.schemas import (
    CRDS,
    NEWEST,
    OLDEST,
    RAY_CLUSTER,
    RAY_JOB,
    as_pod,
    check_object,
    crd_schema,
    errors,
)

GIVEN = os.environ.get("TESSERA_KUBERAY_CRDS", "")
OWN = {"RayJob": RAY_JOB, "RayCluster": RAY_CLUSTER}
NOT_CORE = {*OWN, "Kustomization", "PodMonitor"}
VARIATIONS = {
    "plain": [],
    "url": ["--checkpoint-url", "s3://bucket/run", "--weights-dir", "/opt/weights"],
    "nfs": ["--nfs", "10.0.0.1:/a", "--token-secret", "t", "--env-secret", "e",
            "--pull-secret", "p"],
    "host": ["--host-path", "/mnt/a", "--priority-class", "high", "--toleration", "a=b:NoExecute",
             "--node-selector", "a=b", "--service-account", "s", "--pod-monitor"],
    "class": ["--storage-class", "rwx", "--namespace", "team", "--name", "n" * 40],
}  # fmt: skip
EVERY = pytest.mark.parametrize("given", VARIATIONS.values(), ids=VARIATIONS)
PLAN = pytest.mark.parametrize("gpus", PLANS)


@PLAN
@EVERY
def test_fields_of_kuberay(gpus: int, given: list[str]) -> None:
    found = manifests(gpus, *given)
    for kind, schema in OWN.items():
        (manifest,) = of_kind(found, kind)
        assert errors(manifest, schema) == []


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@EVERY
def test_objects_and_pods_of_kubernetes(version: str, given: list[str]) -> None:
    found = manifests(8, *given)
    for manifest in found.values():
        if manifest["kind"] not in NOT_CORE:
            check_object(manifest, version)
    (job,) = of_kind(found, "RayJob")
    (cluster,) = of_kind(found, "RayCluster")
    specs = [job["spec"]["rayClusterSpec"], cluster["spec"]]
    pods = [pod for spec in specs for pod in templates(spec).values()]
    pods.append(job["spec"]["submitterPodTemplate"])
    for pod in pods:
        check_object(as_pod(pod), version)


def test_the_schemas_see_faults() -> None:
    (job,) = of_kind(manifests(8), "RayJob")
    for path, value in (
        (("spec", "backoffLimits"), 1),
        (("spec", "backoffLimit"), -1),
        (("spec", "submissionMode"), "K8sJob"),
        (("spec", "rayClusterSpec", "headGroupSpec", "label"), {}),
        (("spec", "rayClusterSpec", "autoscalerOptions", "idleTimeoutSeconds"), "60"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 1),
    ):
        wrong = copy.deepcopy(job)
        part = wrong
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value
        assert errors(wrong, RAY_JOB), path
    pod = as_pod(copy.deepcopy(templates(job["spec"]["rayClusterSpec"])["head"]))
    pod["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(ValidationError):
        check_object(pod, NEWEST)


@PLAN
@EVERY
def test_rules_of_the_operator(gpus: int, given: list[str]) -> None:
    """What KubeRay v1.7.0 refuses after the schema let it pass."""
    found = manifests(gpus, *given)
    (job,), (cluster,) = of_kind(found, "RayJob"), of_kind(found, "RayCluster")
    assert len(job["metadata"]["name"]) <= 47  # it adds to the name
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    assert job["spec"]["shutdownAfterJobFinishes"] or not job["spec"]["ttlSecondsAfterFinished"]
    for spec in (job["spec"]["rayClusterSpec"], cluster["spec"]):
        version = tuple(map(int, spec["rayVersion"].split(".")[:2]))
        assert spec["authOptions"]["mode"] == "token"
        assert version >= (2, 52)  # with a token; labels and the autoscaler's v2 need less
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            assert not {"labels", "resources"} & group["rayStartParams"].keys()
            assert "resources" not in group  # not in both places
            assert "restartPolicy" not in group["template"]["spec"]  # v2 wants Never, or none
            for key, value in group["labels"].items():
                assert re.fullmatch(r"([a-z.]+/)?[A-Za-z0-9][-\w.]{0,61}[A-Za-z0-9]", key)
                assert re.fullmatch(r"[A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?", value)
        for group in spec["workerGroupSpecs"]:
            assert 0 <= group["minReplicas"] <= group["maxReplicas"]
        env = spec["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
        assert not {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "RAY_enable_autoscaler_v2"} & {
            each["name"] for each in env
        }


@pytest.mark.skipif(not GIVEN, reason="TESSERA_KUBERAY_CRDS names no directory with KubeRay's CRDs")
@pytest.mark.parametrize("kind", CRDS)
def test_against_the_crds(kind: str) -> None:
    schema: dict[str, Any] = crd_schema(Path(GIVEN), kind)
    inner = schema["properties"]["spec"]["properties"]
    inner = inner["rayClusterSpec"]["properties"] if kind == "RayJob" else inner
    older = "secretName" not in inner["authOptions"]["properties"]  # than v1.6
    for given in VARIATIONS.values():
        for gpus in PLANS:
            (manifest,) = of_kind(manifests(gpus, *given), kind)
            manifest = copy.deepcopy(manifest)
            if older:
                part = manifest["spec"].get("rayClusterSpec", manifest["spec"])
                part["authOptions"].pop("secretName", None)
            assert errors(manifest, schema) == []
    wrong = copy.deepcopy(manifest)
    wrong["spec"]["unknown"] = 1
    assert errors(wrong, schema)

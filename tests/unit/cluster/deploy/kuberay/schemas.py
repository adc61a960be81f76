"""Schemas of what KubeRay and Kubernetes take.

`RAY_JOB` and `RAY_CLUSTER` are this project's own, of the fields that it writes: their names and
types are those of KubeRay's CRDs v1.5.2, v1.6.2 and v1.7.0 (`ray.io/v1`). The CRDs themselves are
taken from a directory (`crd_schema`). Pods are Kubernetes' own, checked with kubernetes-validate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
OBJECT: Schema = {"type": "object"}
"""Checked as a part of a pod."""
OLDEST, NEWEST = "1.28.0", "1.37.0"
"""Versions of Kubernetes whose schemas the manifests meet."""


def fields(required: str = "", **properties: Schema) -> Schema:
    """An object with these fields and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


AUTH = fields(mode={"enum": ["disabled", "token"]}, secretName=TEXT)  # secretName from v1.6 on
AUTOSCALER = fields(
    version={"enum": ["v1", "v2"]},
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    idleTimeoutSeconds=COUNT,
    securityContext=OBJECT,
    resources=OBJECT,
)
HEAD = fields("template", labels=TEXTS, rayStartParams=TEXTS, template=OBJECT)
WORKERS = fields(
    "groupName minReplicas maxReplicas template",
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    labels=TEXTS,
    rayStartParams=TEXTS,
    template=OBJECT,
)
CLUSTER_SPEC = fields(
    "headGroupSpec",
    rayVersion=TEXT,
    authOptions=AUTH,
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=AUTOSCALER,
    headGroupSpec=HEAD,
    workerGroupSpecs={"type": "array", "items": WORKERS},
)
JOB_SPEC = fields(
    entrypoint=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    backoffLimit=COUNT,
    shutdownAfterJobFinishes={"type": "boolean"},
    ttlSecondsAfterFinished=COUNT,
    submitterPodTemplate=OBJECT,
    rayClusterSpec=CLUSTER_SPEC,
)


def _resource(kind: str, spec: Schema) -> Schema:
    return fields(
        "apiVersion kind metadata spec",
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=fields("name", name=TEXT, namespace=TEXT, labels=TEXTS),
        spec=spec,
    )


RAY_JOB = _resource("RayJob", JOB_SPEC)
RAY_CLUSTER = _resource("RayCluster", CLUSTER_SPEC)
CRDS = {"RayJob": "rayjobs", "RayCluster": "rayclusters"}


def errors(manifest: dict[str, Any], schema: Schema) -> list[str]:
    """What a schema refuses, with its place."""
    found = Draft202012Validator(schema).iter_errors(manifest)
    return [f"{each.json_path}: {each.message[:200]}" for each in found]


def check_object(manifest: dict[str, Any], version: str) -> None:
    """Raises an error if Kubernetes of this version has no such object or field."""
    kubernetes_validate.validate(manifest, version, strict=True)


def as_pod(template: dict[str, Any]) -> dict[str, Any]:
    """A pod of a template, as KubeRay makes it."""
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"} | template["metadata"],
            "spec": template["spec"]}  # fmt: skip


def crd_schema(directory: Path, kind: str) -> Schema:
    """The schema of a CRD in a directory of KubeRay's, which also refuses unknown fields.

    Args:
        directory: with `ray.io_rayjobs.yaml` and `ray.io_rayclusters.yaml`.
    """
    with open(directory / f"ray.io_{CRDS[kind]}.yaml", encoding="utf-8") as file:
        crd = yaml.load(file, yaml.CSafeLoader)
    version = next(each for each in crd["spec"]["versions"] if each["name"] == "v1")
    schema: Schema = _strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = OBJECT
    return schema


def _strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _strict(each) for key, each in schema.items()}
    if made.pop("x-kubernetes-int-or-string", False):
        made.pop("anyOf", None)
        made["type"] = ["integer", "string"]
    free = made.pop("x-kubernetes-preserve-unknown-fields", False)
    if isinstance(made.get("properties"), dict) and made.get("type") == "object" and not free:
        made.setdefault("additionalProperties", False)
    return made

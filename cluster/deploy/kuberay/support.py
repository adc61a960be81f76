"""What a run needs beside its pods: an account, storage, a network policy, a disruption budget, a
monitor."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.deploy.groups import PodGroup
from cluster.deploy.kuberay.options import KubeRayOptions
from cluster.deploy.kuberay.pods import (
    HEAD,
    PORTS,
    PRESET_FILE,
    RUN_LABEL,
    SUBMITTER,
    Manifest,
    claim_name,
    preset_name,
)
from cluster.deploy.run_command import ROLE_LABEL
from cluster.errors import ConfigError

OPERATOR_LABELS = {"app.kubernetes.io/name": "kuberay-operator"}  # of its Helm chart
PROMETHEUS_LABELS = {"app.kubernetes.io/name": "prometheus"}  # of the Prometheus operator's pods
LARGEST_MAP_BYTES = 1_000_000  # of a ConfigMap: 1 MiB with its names


def metadata(options: KubeRayOptions, name: str) -> Manifest:
    return {
        "name": name,
        "namespace": options.namespace,
        "labels": {"app.kubernetes.io/part-of": "tessera", RUN_LABEL: options.name},
    }


def service_account(options: KubeRayOptions) -> Manifest:
    """Of all pods. KubeRay gives it the right to change this cluster's pods if one group scales."""
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": metadata(options, options.name),
        "automountServiceAccountToken": False,
    }


def storage_claim(options: KubeRayOptions) -> Manifest:
    """The shared storage."""
    spec: Manifest = {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": options.storage_size}},
    }
    if options.storage_class:
        spec["storageClassName"] = options.storage_class
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": metadata(options, claim_name(options)),
        "spec": spec,
    }


def preset_map(options: KubeRayOptions) -> Manifest:
    """The preset, where it is a file: the image does not have it.

    Raises:
        ConfigError: it is larger than Kubernetes takes.
    """
    if len(options.preset_text.encode()) > LARGEST_MAP_BYTES:
        raise ConfigError(f"--preset {options.preset} is larger than 1 MiB: put it into the image")
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(options, preset_name(options)),
        "data": {PRESET_FILE: options.preset_text},
    }


def network_policy(options: KubeRayOptions) -> Manifest:
    """Pods of the run reach each other; from elsewhere the operator reaches the dashboard, and
    Prometheus the figures. `kubectl port-forward` comes from the node, and is not kept out."""
    everywhere: Manifest = {"namespaceSelector": {}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(options, options.name),
        "spec": {
            "podSelector": {"matchLabels": {RUN_LABEL: options.name}},
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [{"podSelector": {"matchLabels": {RUN_LABEL: options.name}}}]},
                {
                    "from": [{**everywhere, "podSelector": {"matchLabels": OPERATOR_LABELS}}],
                    "ports": [{"protocol": "TCP", "port": PORTS["dashboard"]}],
                },
                {
                    "from": [{**everywhere, "podSelector": {"matchLabels": PROMETHEUS_LABELS}}],
                    "ports": [{"protocol": "TCP", "port": PORTS["metrics"]}],
                },
            ],
        },
    }


def disruption_budget(groups: Sequence[PodGroup], options: KubeRayOptions) -> Manifest:
    """Drained nodes leave the head and the learners alone: with them, work since the newest
    checkpoint would be lost. Other pods are replaced while the run goes on.

    Pods of a RayCluster have no controller that Kubernetes counts, so the number is `minAvailable`.
    """
    learning = [group for group in groups if group.learns]
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata(options, options.name),
        "spec": {
            "minAvailable": 1 + sum(group.replicas for group in learning),
            "selector": {
                "matchLabels": {RUN_LABEL: options.name},
                "matchExpressions": [
                    {
                        "key": ROLE_LABEL,
                        "operator": "In",
                        "values": [HEAD, *(group.name for group in learning)],
                    }
                ],
            },
        },
    }


def pod_monitor(options: KubeRayOptions) -> Manifest:
    """For the Prometheus operator: the figures of every pod."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": metadata(options, options.name),
        "spec": {
            "selector": {
                "matchLabels": {RUN_LABEL: options.name},
                "matchExpressions": [
                    {"key": ROLE_LABEL, "operator": "NotIn", "values": [SUBMITTER]}
                ],
            },
            "podMetricsEndpoints": [{"port": "metrics"}],
            "podTargetLabels": [RUN_LABEL, ROLE_LABEL],
        },
    }

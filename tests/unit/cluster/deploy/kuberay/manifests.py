"""Manifests of the KubeRay target, for its tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import yaml

from cluster.deploy.command import parse
from cluster.deploy.kuberay.files import files
from cluster.deploy.kuberay.options import KubeRayOptions
from cluster.deploy.plan_document import read_plan
from tests.unit.cluster.deploy.plans import cpus, eight_gpus, many_gpus, one_gpu, text

PLANS = {1: one_gpu, 8: eight_gpus, 64: many_gpus, 0: cpus}
IMAGE = "registry.example.org/team/tessera:0.1.0"


def options_of(gpus: int, *more: str) -> KubeRayOptions:
    given = ["kuberay", "--preset", PLANS[gpus]()["preset"], "--gpus", str(gpus)]
    _, options = parse([*given, "--image", IMAGE, *more])
    assert isinstance(options, KubeRayOptions)
    return options


def labelled(values: dict[str, Any]) -> dict[str, Any]:
    """A document whose pools select their nodes, as their presets must say."""
    for role in values["roles"]:
        if role["name"].startswith("reward-") and role["name"] != "reward-server":
            role["labels"] = {"tessera-role": role["name"]}
    return values


def made(gpus: int, *more: str, plan: dict[str, Any] | None = None) -> Mapping[str, str]:
    values = labelled(PLANS[gpus]()) if plan is None else plan
    return files(read_plan(text(values), "plan"), options_of(gpus, *more))


@cache
def manifests(gpus: int, *more: str) -> dict[str, dict[str, Any]]:
    """Path -> manifest; not to be changed."""
    read = {path: yaml.load(each, yaml.CSafeLoader) for path, each in made(gpus, *more).items()}
    return read


def of_kind(found: Mapping[str, dict[str, Any]], kind: str) -> Iterator[dict[str, Any]]:
    return (each for each in found.values() if each["kind"] == kind)


def ray_job(gpus: int, *more: str) -> dict[str, Any]:
    return next(of_kind(manifests(gpus, *more), "RayJob"))["spec"]


def templates(cluster: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Group -> pod template, of a RayCluster's spec."""
    workers = {each["groupName"]: each["template"] for each in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], **workers}

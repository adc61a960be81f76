"""The configuration of an arm, and what is kept of it beside its results."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import actors
import cluster
import learner
import rewards
from cluster.messages import SamplingSpec
from cluster.model_files.tensors import anywhere
from learner.config import RunConfig, dotted, merge, to_dict, validate
from learner.miniature.build import with_networks
from learner.miniature.study.method import SECTIONS
from learner.miniature.study.part import NETWORKS, Arm, Changes, Part
from learner.miniature.systems.registry import system_of

PLACE = f"{NETWORKS}/"
PACKAGE = "package://"
CLIP_SPACE = "clip"
"""The judge's third feature space: images of its CLIP."""
OF_TRAINING = (
    "iterations",
    "seed",
    "groups_per_iteration",
    "rollouts_per_group",
    "max_staleness",
    "max_failed_share",
    "policy",
    "tokenizer",
    "conditions",
    "rewards",
    "sampler",
    *SECTIONS,
)
OF_EVALUATION = ("seed", "policy", "tokenizer", "conditions", "judge", "evaluation", "sampler")
"""Sections that results depend on."""
COMPUTING_BY = {"learner": {"num_threads": 1}, "sampler": {"max_groups": 8}}
"""How every arm computes: one thread a process, and groups that are decoded together, which is
faster than one by one and may give other last bits."""
COMPUTING = (actors, cluster, learner, rewards)
LIBRARIES = ("torch", "numpy", "scipy", "open_clip_torch", "timm", "scikit-learn")


def run_config(part: Part, arm: Arm, seed: int, networks: Path, iterations: int = 0) -> RunConfig:
    """The configuration of an arm.

    Args:
        networks: folder of the seed's networks.
        iterations: 0: the arm's own number.
    """
    values = with_networks(networks, system_of(part.system).preset)
    if not arm.shipped:
        values = with_method(values, part.method)
    values = merge(values, {"seed": seed, **COMPUTING_BY})
    clip = values["judge"]["clip"]
    third = {"network": "clip", "model": clip["model"], "checkpoint": clip["pretrained"]}
    values = merge(values, {"judge": {"further": {CLIP_SPACE: third}}})
    if iterations:
        values = merge(values, {"iterations": iterations})
    return validate(merge(values, placed(arm.changes, networks)), f"{arm.name}, seed {seed}")


def placed(changes: Changes, networks: Path) -> dict[str, Any]:
    """Changes with the folder of networks for `NETWORKS` in paths."""
    return {
        name: placed(value, networks)
        if isinstance(value, Mapping)
        else value.replace(NETWORKS, str(networks))
        if isinstance(value, str)
        else value
        for name, value in changes.items()
    }


def with_method(values: Mapping[str, Any], method: Changes) -> dict[str, Any]:
    """A preset's values with nothing of its method but a part's own."""
    plain = to_dict(RunConfig())
    kept = {**values, **{name: plain[name] for name in SECTIONS}}
    kept["rewards"] = {**values["rewards"], "further": {}, "extra": []}
    return merge(kept, method)


def spec_of(config: RunConfig, sampling: Changes) -> SamplingSpec:
    """The sampling of a policy: that which is learned, with changes."""
    return replace(config.sampling.learned(), **sampling)


def kept_values(config: RunConfig, sections: tuple[str, ...], networks: Path) -> dict[str, Any]:
    """What results depend on, flat and by dotted names, with paths relative to the networks."""
    values = to_dict(config)
    flat = dotted({name: values[name] for name in sections})
    root = f"{networks}/"
    return {
        name: PLACE + value.removeprefix(root)
        if isinstance(value, str) and value.startswith(root)
        else value
        for name, value in flat.items()
    }


def changed(kept: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Names whose values differ -> (kept, now). An option that has come since must be at its
    default, which leaves results as they were."""
    defaults = dotted(to_dict(RunConfig()))
    found = {}
    for name in sorted(kept.keys() | now.keys()):
        before = kept[name] if name in kept else defaults.get(name)
        after = now.get(name)
        if before != after:
            found[name] = (before, after)
    return found


def digests(values: Mapping[str, Any], networks: Path) -> dict[str, str]:
    """Name of each network's file -> SHA-256; of all that the values name."""
    found: dict[str, str] = {}
    for name in sorted({value for value in values.values() if isinstance(value, str)}):
        if name.startswith(PLACE):
            path = networks / name.removeprefix(PLACE)
        elif name.startswith(PACKAGE):
            path = anywhere(name)
        else:
            continue
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        files = {f"{name}/{each.relative_to(path)}".removesuffix("/."): each for each in inside}
        found |= {name: digest(file) for name, file in files.items() if file.is_file()}
    return found


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@cache
def code_version() -> str:
    """Digest of the code that computes results (not of the study's own) and of its libraries'
    versions."""
    found = hashlib.sha256()
    for library in LIBRARIES:
        found.update(f"{library} {metadata.version(library)}\n".encode())
    for package in COMPUTING:
        root = Path(package.__path__[0])
        for file in sorted(root.rglob("*.py")):
            name = file.relative_to(root.parent)
            if name.parts[:2] != ("learner", "miniature"):
                found.update(f"{name}\n".encode() + file.read_bytes())
    return found.hexdigest()

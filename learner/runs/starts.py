"""What a start of a run records in starts.jsonl: command, versions, hardware, workers."""

from __future__ import annotations

import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cluster.io.starts import END, HOW, START, Ending, append_event, last_ending, read_events
from cluster.placement.nodes import Node
from cluster.program.invocation import command_of
from cluster.program.secrets import masked, without_secrets
from cluster.roles import FleetPlan
from learner.runs.run_dir import RunDirectory

PACKAGES = (
    "tessera-rl", "torch", "torchvision", "ray", "numpy", "scipy", "open_clip_torch", "timm",
    "torch-fidelity", "transformers", "triton",
)  # fmt: skip
"""Packages whose versions may change results."""
GIT_S = 5.0
LONGEST_DETAIL = 2000  # characters


def record_start(
    run: RunDirectory,
    arguments: Sequence[str] | None,
    plan: FleetPlan,
    nodes: Sequence[Node],
    *,
    inline: bool,
) -> None:
    """Append a start to starts.jsonl.

    Args:
        arguments: of the command line; None: the process's.
        nodes: of the cluster, or this machine.
    """
    run.check_owned()
    given = without_secrets(sys.argv[1:] if arguments is None else arguments)
    content = {
        "resumed": bool(read_events(run.path)) or run.metrics.is_file(),
        "command": " ".join([command_of("learner.run"), *map(shlex.quote, given)]),
        "directory": _working_directory(),
        "versions": versions(),
        "hardware": hardware(nodes),
        "fleet": {"inline": inline} | {role.name: role.count for role in plan.roles},
    }
    append_event(run.path, START, content)


def record_end(run: RunDirectory, how: Ending, detail: str = "") -> None:
    """Append an end to starts.jsonl, unless the same is recorded of this start.

    Args:
        detail: the error of a run that failed.
    """
    run.check_owned()
    if last_ending(run.path) != how:
        append_event(run.path, END, {HOW: how, "detail": masked(detail)[:LONGEST_DETAIL]})


def versions() -> dict[str, str]:
    """Versions of Python, installed packages and CUDA, and the commit of a checkout."""
    import torch

    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if commit := _commit(Path(__file__).resolve().parents[2]):
        found["commit"] = commit
    return found


def hardware(nodes: Sequence[Node]) -> dict[str, Any]:
    """CPU, memory and GPUs of this machine; hosts, CPUs and GPUs of the cluster."""
    return {
        "host": socket.gethostname(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": _gpu_models(),
        "hosts": len(nodes),
        "cluster_cpus": sum(node.cpus for node in nodes),
        "cluster_gpus": sum(node.gpus for node in nodes),
    }


def _working_directory() -> str:
    try:
        return os.getcwd()
    except OSError:  # deleted meanwhile
        return ""


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu_models() -> list[str]:
    """By NVIDIA's driver; torch would make a CUDA context in this process to say it."""
    found = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        with suppress(OSError):
            text = file.read_text(errors="replace")
            found += [
                line.partition(":")[2].strip()
                for line in text.splitlines()
                if line.startswith("Model:")
            ]
    return found


def _commit(home: Path) -> str:
    """The commit that a checkout of this program is at, with + if files differ; empty: none."""
    if not (home / ".git").exists():
        return ""
    line = ["git", "-C", str(home), "describe", "--always", "--dirty=+", "--abbrev=12",
            "--exclude", "*"]  # fmt: skip
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=GIT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()

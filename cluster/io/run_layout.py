"""The names in a run directory: its files, its directories, and the steps of its checkpoints.

run/
  config.yaml  captions.parquet    configuration; captions with the features made for the run
  run.log  metrics.jsonl           log; one line of metrics an iteration
  evaluations.jsonl  evaluation.json     evaluations while training; the table of the evaluations
  best.json  trace.json            the best checkpoint; a timeline for Perfetto
  report.html  starts.jsonl        the report; every start, and how it ended
  owner.lock  fleet.json           the process that writes here; how to reach its fleet
  checkpoints/step_000050/         see `learner.checkpoints.checkpoint`
  rollouts/iteration_000001.parquet
  gallery/step_000050.png .json    a sheet of images; where each is, what it shows, its rewards
  tensorboard/
  loggers.json  wandb/             runs of other loggers; what Weights & Biases keeps here
"""

from __future__ import annotations

import re
from pathlib import Path

CONFIG = "config.yaml"
CAPTIONS = "captions.parquet"
LOG = "run.log"
METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
OLD_EVALUATIONS = "exams.jsonl"
"""The name of that file before version 0.2; a run that began with it keeps it."""
EVALUATION = "evaluation.json"
BEST = "best.json"
TRACE = "trace.json"
REPORT = "report.html"
STARTS = "starts.jsonl"
"""Command, versions and hardware of each start (`cluster.io.starts`)."""
OWNER = "owner.lock"
DISCOVERY_FILE = "fleet.json"
CHECKPOINTS = "checkpoints"
ROLLOUTS = "rollouts"
GALLERY = "gallery"
TENSORBOARD = "tensorboard"
LOGGERS = "loggers.json"
BASE_GALLERY = "base.png"
BEFORE_AFTER = "before_after.png"
"""In the gallery: images of the base policy and of the tuned one, side by side."""

MANIFEST = "manifest.msgpack"
"""Of a checkpoint: written last, so that a directory with one is complete."""
POLICY_FILE = "policy.safetensors"
"""Of a checkpoint: the policy's weights."""
ARCHIVED = "archived-"
"""Prefix of directories of checkpoints that `--from-step` passed over (earlier: set-aside-)."""

_STEP = re.compile(r"step_(\d{6,})")
_ROLLOUT_FILE = re.compile(r"iteration_(\d{6,})\.parquet")


def step_name(step: int) -> str:
    """50 -> step_000050, the directory of the checkpoint after 50 iterations."""
    return f"step_{step:06d}"


def step_of(name: str) -> int | None:
    """The step in a directory's name; None where it is not a checkpoint's."""
    found = _STEP.fullmatch(name)
    step = int(found.group(1)) if found else None
    return step if step is not None and step_name(step) == name else None


def steps_in(checkpoints: Path) -> list[int]:
    """Steps of the checkpoints in a directory, complete or not, oldest first."""
    entries = checkpoints.iterdir() if checkpoints.is_dir() else ()
    found = [step_of(path.name) for path in entries if path.is_dir()]
    return sorted(step for step in found if step is not None)


def rollout_name(iteration: int) -> str:
    """1 -> iteration_000001.parquet"""
    return f"iteration_{iteration:06d}.parquet"


def iteration_of(name: str) -> int | None:
    """The iteration in the name of a file of rollouts; None where it is another file."""
    found = _ROLLOUT_FILE.fullmatch(name)
    return int(found.group(1)) if found else None

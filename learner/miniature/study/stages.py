"""The stages of an arm: networks of a seed, training, evaluation. Each is kept on disk, appears
there whole or not at all, and is skipped where it is.

    OUT/networks/IMAGES/seed_S/              networks of a seed
    OUT/SYSTEM/tuned/seed_S/ARM/             policy.safetensors, metrics.jsonl, record.json
    OUT/SYSTEM/evaluated/seed_S/POLICY.json  figures of the judge

A record holds settings, digests of the networks, and version of the code. Other settings or
networks than now are refused. Under another version of the code the arm's first iterations are
repeated, and must give the same metrics; evaluations, which take seconds, are made again.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress
from threadpoolctl import threadpool_limits

from actors.checkpoints.loading import PolicyConfig
from cluster.errors import ConfigError, DataError
from cluster.fleet import InlineFleet
from cluster.io.files import replacing, writing
from cluster.io.strict_json import MALFORMED, dumps
from learner.config import RunConfig
from learner.evaluation import held_out
from learner.fleet_plan import fleet_plan, sampling_plan
from learner.loop import prepare, train
from learner.miniature.build import BuildConfig, Builder
from learner.miniature.study.names import BASE
from learner.miniature.study.part import Arm, Changes, Part, folder_of
from learner.miniature.study.runs import (
    OF_EVALUATION,
    OF_TRAINING,
    changed,
    code_version,
    digest,
    digests,
    kept_values,
    run_config,
    spec_of,
)
from learner.miniature.systems.registry import system_of
from learner.rollouts.feature_space import set_reference

POLICY, METRICS, RECORD = "policy.safetensors", "metrics.jsonl", "record.json"
REPEATED = 2  # iterations, under another version of the code
NOT_COMPARED = ("time/", "fleet/")
CONTINUE = "the same command continues"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One arm of one seed."""

    out: Path
    part: Part
    seed: int
    arm: Arm
    """The base policy is the arm without changes that is not trained."""
    iterations: int = 0
    """0: the arm's own number."""
    scale: float = 1.0
    """Of the steps in which networks are trained."""

    @property
    def networks(self) -> Path:
        shorter = f"-scale_{self.scale:g}" if self.scale != 1 else ""
        return self.out / "networks" / f"{self.part.images}{shorter}" / f"seed_{self.seed}"

    @property
    def tuned(self) -> Path:
        return self.out / self.part.system / "tuned" / f"seed_{self.seed}" / self.arm.folder

    @property
    def policies(self) -> Mapping[str, Changes]:
        """Name in the results -> its sampling."""
        return self.part.base if self.arm.name == BASE else {self.arm.name: {}, **self.arm.sampled}

    def evaluated(self, policy: str) -> Path:
        folder = self.out / self.part.system / "evaluated" / f"seed_{self.seed}"
        return folder / f"{folder_of(policy)}.json"

    def config(self) -> RunConfig:
        return run_config(self.part, self.arm, self.seed, self.networks, self.iterations)


def build_networks(job: Job) -> None:
    """Train the networks of a seed that are not there."""
    config = BuildConfig(
        system=job.part.system, out=job.networks, seed=job.seed, scale=job.scale, num_threads=1
    )
    with Progress(disable=True) as progress:
        Builder(config, progress).build(keep=True, judge=_own_judge(job))


def built(job: Job) -> bool:
    """Whether all networks of a seed are there."""
    networks = system_of(job.part.system).networks
    needed = [each.file for each in networks if _own_judge(job) or not each.of_judge]
    return all((job.networks / file).is_file() for file in needed)


def _own_judge(job: Job) -> bool:
    """Whether the judge is built, too, and not shipped; it is the same for every seed."""
    return system_of(job.part.system).on_demand


def train_arm(job: Job) -> None:
    """Train an arm, or check the one that is kept.

    Raises:
        ConfigError: it was trained with other settings or networks, or the code computes others.
    """
    config = job.config()
    values = kept_values(config, OF_TRAINING, job.networks)
    kept = read_record(job)
    if kept is not None:
        check_arm(job, kept)
        if code_version() not in kept["code"]:
            _check_code(job, config)
            _write_record(job.tuned, {**kept, "code": [*kept["code"], code_version()]})
        return
    start = time.process_time()
    partial = job.tuned.with_name(f"{job.tuned.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with writing(partial, then=CONTINUE):
        partial.mkdir(parents=True)
        rows = _train(config, partial)
        (partial / METRICS).write_text("".join(f"{dumps(row)}\n" for row in rows))
    record = {
        "settings": values,
        "networks": digests(values, job.networks),
        "code": [code_version()],
        "seconds": time.process_time() - start,
    }
    _write_record(partial, record)
    partial.rename(job.tuned)


def _train(config: RunConfig, folder: Path | None, iterations: int = 0) -> list[dict[str, Any]]:
    """Metrics of each iteration; writes the tuned policy.

    Args:
        folder: None writes nothing.
        iterations: to stop after; 0: all.
    """
    config = replace(config, evaluation=replace(config.evaluation, num_images=0))
    rows: list[dict[str, Any]] = []
    with InlineFleet(fleet_plan(config)) as fleet:
        fleet.broadcast(0)
        space = set_reference(config, fleet)
        prepare(config, fleet, space)
        train(
            config,
            fleet,
            space,
            0,
            lambda done: rows.append(done.metrics),
            lambda: len(rows) == iterations,
        )
        if folder is not None:
            fleet.learner.save(folder)
            for file in set(folder.iterdir()) - {folder / POLICY}:
                file.unlink()
    return rows


def read_record(job: Job) -> dict[str, Any] | None:
    """The record of a trained arm; None if there is none."""
    return _read(job.tuned / RECORD)


def check_arm(job: Job, kept: Mapping[str, Any]) -> None:
    """Check that a trained arm is what this command would train.

    Raises:
        ConfigError: it was trained with other settings or networks.
    """
    values = kept_values(job.config(), OF_TRAINING, job.networks)
    found = changed(kept["settings"], values)
    files = digests(values, job.networks)
    found |= changed(kept["networks"], files)
    if found:
        name, (before, after) = next(iter(found.items()))
        others = f" and {len(found) - 1} more differ" if len(found) > 1 else ""
        raise ConfigError(
            f"{job.tuned} was trained with other settings: {name} was {before!r}, expected "
            f"{after!r}{others}: remove it to train the arm again, or name another --out"
        )


def _check_code(job: Job, config: RunConfig) -> None:
    """Repeat an arm's first iterations.

    Raises:
        ConfigError: a metric differs.
    """
    kept = [json.loads(line) for line in (job.tuned / METRICS).read_text().splitlines()]
    for before, row in zip(kept, _train(config, None, REPEATED)):
        now = json.loads(dumps(row))
        for name in sorted(before.keys() & now.keys()):
            if not name.startswith(NOT_COMPARED) and before[name] != now[name]:
                raise ConfigError(
                    f"{job.tuned} was trained by another version of the code, and this one "
                    f"computes something else: {name} of iteration {now['iteration']} was "
                    f"{before[name]}, found {now[name]}: remove it to train the arm again, or name "
                    "another --out"
                )


def evaluate_arm(job: Job) -> None:
    """Evaluate the policies of an arm, unless their figures are kept."""
    wanted = {policy: _identity(job, sampling) for policy, sampling in job.policies.items()}
    left = [policy for policy in wanted if figures_of(job, policy, wanted[policy]) is None]
    if not left:
        return
    config = job.config()
    if job.arm.name != BASE:
        config = replace(config, policy=PolicyConfig(checkpoint=str(job.tuned / POLICY)))
    with threadpool_limits(1), InlineFleet(sampling_plan(config)) as fleet:
        real = held_out.real_images(config, fleet)
        for policy in left:
            spec = spec_of(config, job.policies[policy])
            figures = held_out.evaluate_policy(config, fleet, spec, real)
            file = job.evaluated(policy)
            with writing(file, then=CONTINUE), replacing(file) as partial:
                partial.write_text(dumps({**wanted[policy], "figures": figures}) + "\n")


def _identity(job: Job, sampling: Changes) -> dict[str, Any]:
    """What the figures of a policy depend on."""
    config = job.config()
    values = kept_values(config, OF_EVALUATION, job.networks)
    files = digests(values, job.networks)
    if job.arm.name != BASE:
        files[POLICY] = digest(job.tuned / POLICY)
    spec = spec_of(config, sampling)
    sampled = {name: getattr(spec, name) for name in spec.__dataclass_fields__}
    return {"settings": values, "sampling": sampled, "files": files, "code": code_version()}


def figures_of(
    job: Job, policy: str, identity: Mapping[str, Any] | None = None
) -> dict[str, float] | None:
    """Kept figures of a policy; None if there are none, or they are of something else than now."""
    kept = _read(job.evaluated(policy))
    if kept is None or not (built(job) and (job.arm.name == BASE or read_record(job))):
        return None
    identity = identity or _identity(job, job.policies[policy])
    if {**kept, "figures": None} != {**identity, "figures": None}:
        return None
    return {k: math.nan if v is None else float(v) for k, v in kept["figures"].items()}


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    file = folder / RECORD
    with writing(file, then=CONTINUE), replacing(file) as partial:
        partial.write_text(dumps(record, indent=1) + "\n")


def _read(file: Path) -> dict[str, Any] | None:
    """
    Raises:
        DataError: it is damaged.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        found = json.loads(text)
        if isinstance(found, dict):
            return found
    except MALFORMED:
        pass
    raise DataError(f"{file} is damaged: remove it, and what it belongs to is made again")

"""What an evaluation is of: the policies of a run, a checkpoint, a model's file, or images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from actors.checkpoints.loading import PolicyConfig, TokenizerConfig
from actors.checkpoints.zoo import MODELS
from actors.sample_source import complete_checkpoints, default_tokenizer, run_source
from cluster.errors import ConfigError, DataError
from cluster.io.paths import expand_user
from cluster.io.run_layout import BEST, CHECKPOINTS, CONFIG, POLICY_FILE, step_of
from cluster.io.strict_json import MALFORMED
from cluster.model_files.file_kinds import FileKind, presumed_kind
from cluster.model_files.tensors import SCHEMES
from learner.config import RunConfig, load_preset
from learner.data.named_sets import is_named
from learner.runs.records import TUNED
from learner.runs.run_dir import RunDirectory

BASE = "base"
IMAGES = (FileKind.NPZ, FileKind.NPY, FileKind.PARQUET, FileKind.CUT_ZIP)
WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True, kw_only=True)
class Target:
    """A policy, or a set of images."""

    name: str
    policy: PolicyConfig | None = None
    tokenizer: TokenizerConfig | None = None
    """None: that of the configuration."""
    images: str = ""
    """Path of the images; of a policy, empty."""
    tuned: bool = False
    """By a run: sampled with the spec that was learned (`SamplingSpec.learned`)."""
    step: int | None = None
    """Of the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """Which policy of a run, and how a model's file is read."""

    step: int | None = None
    """Step of the run's checkpoint; by default the best one (best.json), else the newest."""
    architecture: str = ""
    """Architecture of a model's file that does not state it."""
    ema: bool = False
    """Take the averaged weights of a trainer's checkpoint instead of the current ones."""


def find_targets(
    what: Sequence[str], preset: str, options: PolicyOptions
) -> tuple[RunConfig, list[Target]]:
    """The targets that the command line names, and the configuration to evaluate them with: that of
    the preset, else of the first run among them.

    Raises:
        ConfigError: nothing is named, not there, or does not say its configuration.
    """
    if not what and not preset:
        raise ConfigError(
            "what should be evaluated? Name a run directory, a checkpoint (RUN/checkpoints/"
            "step_000100), a model by name or file, or images (an .npz file, a folder); a model "
            "and images need --preset. --preset alone evaluates its policy"
        )
    found = [_of(name, options, alone=len(what) == 1) for name in what]
    runs = [run for run, _ in found if run is not None]
    if preset:
        config = load_preset(preset)
    elif runs:
        config = RunDirectory(runs[0]).read_config()
    else:
        raise ConfigError(
            f"{', '.join(what)}: --preset NAME is needed, which says judge, conditions and "
            f"tokenizer{_preset_of(what)}"
        )
    targets = [target for _, several in found for target in several]
    if not what:
        targets = [Target(name=BASE, policy=config.policy)]
    targets = _without_doubles(targets)
    if not any(target.tuned for target in targets) and options.step is not None:
        raise ConfigError(f"--step {options.step} is of a run's checkpoint, and none is named")
    return config, targets


def _of(name: str, options: PolicyOptions, *, alone: bool) -> tuple[Path | None, list[Target]]:
    """The run that a name belongs to, if any, and its targets."""
    path = expand_user(name)
    if step_of(path.name) is not None and (path / POLICY_FILE).is_file():
        return _of_checkpoint(path, alone=alone)
    if (path / CONFIG).is_file():
        return path, _of_run(path, options, "" if alone else f"{path.name} ")
    if is_named(name):
        return None, [Target(name=name, images=name)]
    if name not in MODELS and path.exists() and _holds_images(path):
        return None, [Target(name=path.name, images=name)]
    return None, [_of_model(name, options)]


def _of_checkpoint(path: Path, *, alone: bool) -> tuple[Path | None, list[Target]]:
    """A run's checkpoint. It holds the run's configuration, too, in case it was moved."""
    step, run = step_of(path.name), path.absolute().parents[1]
    found = [place for place in (run, path) if (place / CONFIG).is_file()]
    config = RunDirectory(found[0]).read_config() if found else None
    target = Target(
        name=f"step {step}" if alone else f"{run.name} step {step}",
        policy=PolicyConfig(checkpoint=str(path / POLICY_FILE)),
        tokenizer=config.tokenizer if config else None,
        tuned=True,
        step=step,
    )
    return found[0] if found else None, [target]


def _of_run(run: Path, options: PolicyOptions, prefix: str) -> list[Target]:
    """Base policy and tuned policy."""
    steps = complete_checkpoints(run)
    if not steps:
        raise ConfigError(
            f"{run} has no complete checkpoint ({CHECKPOINTS}/step_*) yet; its base policy alone: "
            f"--preset {run / CONFIG}"
        )
    step = options.step if options.step is not None else _best_step(run)
    if step not in steps and options.step is None:
        step = max(steps)
    tuned = run_source(run, step)
    base = run_source(run, base=True)
    return [
        Target(name=f"{prefix}{BASE}", policy=base.policy, tokenizer=base.tokenizer, step=0),
        Target(
            name=f"{prefix}{TUNED}",
            policy=tuned.policy,
            tokenizer=tuned.tokenizer,
            tuned=True,
            step=tuned.step,
        ),
    ]


def _best_step(run: Path) -> int | None:
    """The step of best.json; None where there is none."""
    file = run / BEST
    if not file.is_file():
        return None
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["step"])
    except MALFORMED as error:
        raise DataError(f"{file}: not readable ({error}): name a step with --step") from error


def _of_model(name: str, options: PolicyOptions) -> Target:
    """A model by name or file.

    Raises:
        ConfigError: no such name, or it does not go with the options.
        CheckpointError: its architecture cannot be known.
    """
    path = expand_user(name)
    if name not in MODELS and not path.exists() and not name.startswith(SCHEMES):
        suffix = path.suffix.lower()
        if "/" in name or suffix in (*WEIGHTS, ".npz", ".npy"):
            raise ConfigError(f"{name}: there is no such file or directory ({path.absolute()})")
    policy = PolicyConfig(checkpoint=name, architecture=options.architecture, ema=options.ema)
    label = name if name in MODELS else path.stem
    return Target(name=label, policy=policy, tokenizer=default_tokenizer(policy))


def _holds_images(path: Path) -> bool:
    if path.is_file():
        return presumed_kind(path) in IMAGES
    return not any(file.suffix.lower() in WEIGHTS for file in path.iterdir())


def _preset_of(what: Sequence[str]) -> str:
    """Advice: the shipped preset of a named model, where it has the same name."""
    for name in what:
        try:
            load_preset(name)
        except ConfigError:
            continue
        return f": there is --preset {name}"
    return ""


def _without_doubles(targets: Sequence[Target]) -> list[Target]:
    """Each policy once, and each name once.

    Raises:
        ConfigError: two different targets have the same name.
    """
    kept: list[Target] = []
    for target in targets:
        same = [other for other in kept if replace(other, name=target.name) == target]
        if same:
            continue
        if any(other.name == target.name for other in kept):
            raise ConfigError(
                f"two of the targets are called {target.name!r}: evaluate them one by one, each "
                "with its own --out, and compare them with --compare"
            )
        kept.append(target)
    return kept

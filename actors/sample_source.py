"""The options of `actors.sample`, and the checkpoint or run that they name.

Of a run directory, `config.yaml` states policy, tokenizer and sampling spec, and
`checkpoints/step_NNNNNN/policy.safetensors` holds the tuned weights.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from actors.captions import DType
from actors.checkpoints.loading import PolicyConfig, TokenizerConfig
from actors.checkpoints.official import holds_tokenizer
from actors.checkpoints.zoo import MODELS
from actors.text.encoder import DEFAULT_ENCODER
from cluster.errors import ConfigError
from cluster.io import strict_yaml
from cluster.io.locks import is_lock
from cluster.io.paths import expand_user
from cluster.io.run_layout import (
    CHECKPOINTS,
    CONFIG,
    MANIFEST,
    POLICY_FILE,
    step_name,
    step_of,
    steps_in,
)
from cluster.messages import SamplingSpec
from cluster.text_limits import LongCaptions

MAX_SIZE = 4096  # pixels a side

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Sample images for classes or captions, from a checkpoint or from a run.

    Without a checkpoint or a run: the miniature's base policy, handwritten digits.
    """

    out: Path = Path("samples")
    """New directory for grid.png, images/*.png and samples.json."""
    classes: str = ""
    """Class indices, as in 207,360, or all."""
    captions: Path | None = None
    """Text file with one caption per line, a table (.tsv, .csv, .json, .jsonl), or a Parquet file
    with features, as actors.captions writes it."""
    column: str = ""
    """Column of a table that holds the captions. Default: the only one called caption, prompt, text
    or the like."""
    long_captions: LongCaptions = "error"
    """What to do with captions longer than the policy's text encoder reads. error: sample nothing.
    truncate: cut them, as LlamaGen does."""
    num_images: int | None = None
    """Images in all, spread evenly over the conditions; over all classes if none are named."""
    per_condition: int | None = None
    """Images of each condition, without --num-images; 4 if neither is given."""
    checkpoint: str = ""
    """Policy: a file, or the name of an official one."""
    architecture: str = ""
    """Architecture of a checkpoint whose file does not state it."""
    ema: bool = False
    """Take the averaged weights of a trainer's checkpoint instead of the current ones."""
    tokenizer: str = ""
    """Tokenizer of the policy's codes: a file, or the name of an official one. Default: the run's,
    else the one that belongs to a policy with a name, else the miniature's."""
    tokenizer_architecture: str = ""
    """Architecture of a tokenizer whose file does not state it."""
    run: Path | None = None
    """Run directory whose newest tuned policy, tokenizer and sampling spec are used."""
    step: int | None = None
    """Step of the run's checkpoint to sample from, with --run; by default the newest."""
    base: bool = False
    """Sample from the policy that the run started from, with --run."""
    cfg_scale: float | None = None
    """Classifier-free guidance, 0 to 100: 1 is none, 0 the unconditional policy, between them a
    mixture (LlamaGen's script samples without guidance at every scale up to 1). Default: the
    run's, else 1."""
    temperature: float | None = None
    """Divisor of the logits, 1e-5 to 1000. Default: the run's, else 1."""
    top_k: int | None = None
    """Keep the k most likely tokens, 0 all. Default: the run's, else 0."""
    top_p: float | None = None
    """Keep the most likely tokens up to probability p. Default: the run's, else 1."""
    seed: int = 0
    """Seed of all random numbers; image i depends only on the seed and on i."""
    batch: int = 32
    """Images decoded at once."""
    size: int = 0
    """Pixels a side that images are resized to before they are rounded to 8 bits, as LlamaGen's
    --image-size-eval does: 256 for evaluating 384-pixel policies. 0: as they are decoded."""
    encoder: str = DEFAULT_ENCODER
    """Text encoder for captions whose file has no features."""
    device: str = "auto"
    """Device to sample on: auto (a GPU if there is one), cpu, cuda or cuda:N."""
    dtype: DType = "auto"
    """Dtype of policy and text encoder; auto is bfloat16 on a GPU and float32 on a CPU."""
    kernels: Literal["auto", "torch"] = "auto"
    """What decoding computes with between its matrix products. auto: on CUDA Triton's kernels, or,
    with a message that says why, plain PyTorch. torch: plain PyTorch."""
    npz: Path | None = None
    """Write all images to one .npz, too, as the ADM evaluator reads them: arr_0 (N, H, W, 3) uint8,
    and arr_1 (N,) the classes."""
    png: bool = True
    """Write each image to images/."""


@dataclass(frozen=True, kw_only=True)
class SampleSource:
    """A policy, the tokenizer of its codes, and its sampling spec."""

    policy: PolicyConfig = dataclasses.field(default_factory=PolicyConfig)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    spec: SamplingSpec = dataclasses.field(default_factory=SamplingSpec)
    step: int | None = None
    """Iterations of the run that tuned the policy; None outside of a run."""


def check(config: SampleConfig) -> None:
    """Check the options alone.

    Raises:
        ConfigError: they contradict each other, or would overwrite something.
    """
    for name in ("batch", "num_images", "per_condition"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be >= 1, found {value}")
    if not 0 <= config.size <= MAX_SIZE:
        raise ConfigError(f"--size must be in [0, {MAX_SIZE}] pixels a side, found {config.size}")
    if not 0 <= config.seed < 2**63:
        raise ConfigError(f"--seed must be in [0, 2^63), found {config.seed}")
    for name in ("cfg_scale", "temperature", "top_p"):
        value = getattr(config, name)
        if value is not None and not math.isfinite(value):
            raise ConfigError(f"--{name.replace('_', '-')} must be finite, found {value}")
    if config.num_images is not None and config.per_condition is not None:
        raise ConfigError("--num-images and --per-condition exclude each other: give one")
    if config.classes and config.captions:
        raise ConfigError("--classes and --captions exclude each other: give one")
    if config.column and not config.captions:
        raise ConfigError("--column says nothing without --captions")
    if not config.classes and not config.captions and config.num_images is None:
        raise ConfigError(
            "what should be shown? --classes 0,1,2 or --classes all or --captions FILE"
        )
    if config.run and (config.checkpoint or config.architecture or config.ema):
        raise ConfigError("--run brings its own policy: leave --checkpoint and its options out")
    if config.tokenizer_architecture and not config.tokenizer:
        raise ConfigError("--tokenizer-architecture says nothing without --tokenizer")
    if not config.run and (config.step is not None or config.base):
        raise ConfigError("--step and --base need a --run to choose from")
    if config.base and config.step is not None:
        raise ConfigError("--base and --step exclude each other: the base policy has no steps")
    check_unused(config.out)
    if config.npz:
        _check_npz(config.npz.absolute(), config.out.absolute())


def check_unused(out: Path) -> None:
    """Refuse an output directory that holds anything but locks.

    Raises:
        ConfigError: it does.
    """
    if out.exists() and not (out.is_dir() and all(is_lock(file) for file in out.iterdir())):
        raise ConfigError(f"--out {out} is not empty: name another directory")


def _check_npz(npz: Path, out: Path) -> None:
    if npz.exists() or npz == out:
        raise ConfigError(f"--npz {npz} exists or is --out: name another file")
    parent = next(folder for folder in npz.parents if folder.exists())
    if out not in npz.parents and not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ConfigError(f"--npz {npz}: cannot write to {parent}")


def find_source(config: SampleConfig) -> SampleSource:
    """Policy, tokenizer and spec of the options.

    Raises:
        ConfigError: see `run_source`; or an invalid sampling value.
    """
    if config.run:
        source = run_source(config.run, config.step, config.base)
    else:
        checkpoint = config.checkpoint or PolicyConfig().checkpoint
        if complete_checkpoints(Path(checkpoint)):
            raise ConfigError(
                f"--checkpoint {checkpoint} is a run directory: name it with --run instead"
            )
        policy = PolicyConfig(
            checkpoint=checkpoint, architecture=config.architecture, ema=config.ema
        )
        own = default_tokenizer(policy)
        if own is None and not config.tokenizer:
            raise ConfigError(
                f"{checkpoint} does not say which tokenizer its codes belong to: name it with "
                "--tokenizer"
            )
        source = SampleSource(policy=policy, tokenizer=own or TokenizerConfig())
    if config.tokenizer:
        tokenizer = TokenizerConfig(
            checkpoint=config.tokenizer, architecture=config.tokenizer_architecture
        )
        source = dataclasses.replace(source, tokenizer=tokenizer)
    spec = with_guidance(
        source.spec,
        cfg_scale=config.cfg_scale,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
    )
    return dataclasses.replace(source, spec=spec)


def default_tokenizer(policy: PolicyConfig) -> TokenizerConfig | None:
    """The tokenizer of a policy: of a named model, in the policy's file (taming, AR-GRPO), or the
    miniature's; None if unknown."""
    if policy.checkpoint == PolicyConfig().checkpoint:
        return TokenizerConfig()
    if policy.architecture.lower().endswith((".yaml", ".yml")):
        return TokenizerConfig(checkpoint=policy.checkpoint, architecture=policy.architecture)
    model = MODELS.get(policy.checkpoint) or MODELS.get(policy.architecture)
    if model is None or not model.tokenizer:
        return None
    if model.tokenizer == policy.architecture:
        return TokenizerConfig(checkpoint=policy.checkpoint, architecture=policy.architecture)
    if policy.checkpoint not in MODELS and holds_tokenizer(policy.checkpoint):
        return TokenizerConfig(checkpoint=policy.checkpoint, architecture=model.tokenizer)
    return TokenizerConfig(checkpoint=model.tokenizer)


def run_source(run: Path, step: int | None = None, base: bool = False) -> SampleSource:
    """The policy of a run.

    Args:
        step: of the checkpoint; None is the newest.
        base: the policy that the run started from.

    Raises:
        ConfigError: not a run directory, no such checkpoint, or a section of its configuration that
            this version does not know.
    """
    file = expand_user(run) / CONFIG
    values = _read_yaml(file)
    policy = build(PolicyConfig, _section(values, "policy", file), f"{file}: policy")
    tokenizer = build(TokenizerConfig, _section(values, "tokenizer", file), f"{file}: tokenizer")
    spec = build(SamplingSpec, _section(values, "sampling", file), f"{file}: sampling")
    if base:
        return SampleSource(policy=policy, tokenizer=tokenizer, spec=spec, step=0)
    found = _checkpoint(expand_user(run), step)
    # Its header carries the architecture: the base policy's section does not apply.
    tuned = PolicyConfig(checkpoint=str(found / POLICY_FILE))
    return SampleSource(
        policy=tuned, tokenizer=tokenizer, spec=spec.learned(), step=step_of(found.name)
    )


def with_guidance(spec: SamplingSpec, **changes: float | int | None) -> SamplingSpec:
    """Change numbers of a spec (None: unchanged) and set its guidance: "none" at cfg_scale 1, else
    "guided".

    Raises:
        ConfigError: an invalid value.
    """
    values = dataclasses.asdict(spec) | {k: v for k, v in changes.items() if v is not None}
    values["guidance"] = "none" if values["cfg_scale"] == 1 else "guided"
    return build(SamplingSpec, values, "sampling")


def build(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """A configuration from plain values.

    Raises:
        ConfigError: an unknown field, or an invalid value.
    """
    fields = {field.name: field.default for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(values.keys() - fields.keys())
    if unknown:
        raise ConfigError(f"{where}: field {unknown[0]!r} is unknown: there are {sorted(fields)}")
    for name, value in values.items():
        if wrong := _wrong_type(fields[name], value):
            raise ConfigError(f"{where}: {name} must be {wrong}, found {value!r:.60}")
    try:
        return kind(**values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _wrong_type(default: object, value: object) -> str:
    """The type expected of a value, by the field's default; empty if it has it, or any is allowed.
    (YAML reads 1e-5 as text, and yes as true.)"""
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else "true or false"
    if isinstance(default, int | float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        whole = isinstance(default, float) or isinstance(value, int)
        return "" if number and whole else "a number" if not number else "a whole number"
    if isinstance(default, str):
        return "" if isinstance(value, str) else "text"
    return ""


def _checkpoint(run: Path, step: int | None) -> Path:
    steps = complete_checkpoints(run)
    if not steps:
        raise ConfigError(
            f"{run} has no checkpoint yet (checkpoints/step_*/{POLICY_FILE}); --base samples the "
            "policy that the run started from"
        )
    if step is None:
        return steps[max(steps)]
    if step not in steps:
        kept = ", ".join(str(number) for number in sorted(steps))
        raise ConfigError(f"{run} keeps no checkpoint of step {step}: there are {kept}")
    return steps[step]


def complete_checkpoints(run: Path) -> dict[int, Path]:
    """Step -> directory of each complete checkpoint with a policy; a running job may be writing or
    removing others."""
    root = run / CHECKPOINTS
    found = {step: root / step_name(step) for step in steps_in(root)}
    needed = (POLICY_FILE, MANIFEST)
    return {
        step: path
        for step, path in found.items()
        if all((path / name).is_file() for name in needed)
    }


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = strict_yaml.load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file.parent} is not a run directory: no readable {CONFIG}") from error
    except ValueError as error:  # not UTF-8, not YAML
        raise ConfigError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must be a mapping of fields, found {type(values).__name__}")
    return values


def _section(values: Mapping[str, Any], name: str, file: Path) -> dict[str, Any]:
    section = values.get(name, {})
    if not isinstance(section, dict):
        raise ConfigError(f"{file}: {name} must be a mapping, found {type(section).__name__}")
    return section

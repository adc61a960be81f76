"""Sample images of a policy: `python -m actors.sample --classes 0,1,2`.

Image i shows condition i mod C of C conditions; its uniforms are a function of (seed, i). So more
images leave the first ones unchanged (on a GPU, up to rounding), and --batch changes at most the
last bits of logits. Conditions alternate, so that any range of the .npz has all of them in equal
shares: the ADM evaluator's Inception Score, of ranges, is then up to 8 % above that of random
classes, which `python -m learner.evaluate --npz` avoids.

Shapes: N images, B batch, T tokens, H and W pixels.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys

    from cluster.program.start import run_command

    sys.exit(run_command("actors.sample"))

import dataclasses
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tyro

from actors.captions import DTYPES, resolve_device
from actors.checkpoints.loading import load_decoder, load_policy
from actors.decoding.decode import decode_tokens, rollout_uniforms
from actors.decoding.steps import Workspace
from actors.kernels import plain
from actors.kernels.interface import Kernels
from actors.models.base import Policy
from actors.models.vq import VQDecoder
from actors.sample_files import ContactSheet, NpzWriter, PngWriter
from actors.sample_source import SampleConfig, SampleSource, check, check_unused, find_source
from actors.text.captions import caption_conditions, read_captions
from actors.text.encoder import CaptionEncoder, check_captions
from cluster.errors import ConfigError, LockHeldError, TesseraError
from cluster.io.locks import locked, locked_file
from cluster.io.paths import output_path
from cluster.io.strict_json import dumps
from cluster.messages import Condition, RequestKey, SamplingSpec
from cluster.program.console import FAILED, INTERRUPTED, REFUSED, progress_bar
from cluster.program.help import answer_help
from cluster.program.invocation import command_of
from cluster.program.precision import start_computing
from cluster.program.streams import printable

logger = logging.getLogger(__name__)

STREAM = "sample"
PER_CONDITION = 4
ALL = "all"
ABOUT = (
    "Sample images for classes or captions, from a checkpoint or from a run. Without either: the "
    "miniature's base policy, handwritten digits."
)
COMMON = {
    "what to sample from": ("--checkpoint", "--tokenizer", "--run", "--step", "--base"),
    "what to sample": ("--classes", "--captions", "--num-images", "--per-condition", "--seed"),
    "how": ("--cfg-scale", "--temperature", "--top-k", "--top-p", "--size", "--batch", "--device"),
    "where to": ("--out", "--npz", "--png"),
}
"""What --help shows; --help-all shows every option."""


@torch.inference_mode()
def decode_batch(
    policy: Policy,
    decoder: VQDecoder,
    conditions: Sequence[Condition],
    spec: SamplingSpec,
    uniforms: np.ndarray,
    workspace: Workspace,
    size: int = 0,
) -> np.ndarray:
    """B conditions and uniforms (B, T) -> images (B, H, W, 3) uint8, resized to `size` unless 0."""
    encoded = policy.encode(conditions)
    draws = torch.from_numpy(uniforms).to(encoded.values.device)
    decoded = decode_tokens(policy, encoded, draws, spec, workspace)
    return decoder.pixels(policy.codes(decoded.tokens), size).cpu().numpy()


def sample_images(
    policy: Policy,
    decoder: VQDecoder,
    conditions: Sequence[Condition],
    spec: SamplingSpec,
    *,
    num_images: int,
    seed: int,
    batch: int,
    size: int = 0,
    kernels: Kernels | None = None,
) -> Iterator[np.ndarray]:
    """Images of the conditions, in batches.

    Args:
        conditions: image i shows number i mod len(conditions).
        seed: with the image's number it determines its uniforms.
        batch: images decoded at once; changes at most rounding.
        size: pixels a side that images are resized to; 0: not resized.
        kernels: of decoding; None is `best_kernels`.

    Yields:
        (B, H, W, 3) uint8; B = batch, except for the last.

    Raises:
        DataError: a condition does not fit the policy.
        ConfigError: guidance with a policy that has no unconditional branch.
    """
    workspace = Workspace(policy, kernels=kernels)
    for first in range(0, num_images, batch):
        numbers = range(first, min(first + batch, num_images))
        uniforms = [
            rollout_uniforms(seed, RequestKey(STREAM, 0, number), 1, policy.num_tokens)
            for number in numbers
        ]
        shown = [conditions[number % len(conditions)] for number in numbers]
        draws = np.concatenate(uniforms)
        yield decode_batch(policy, decoder, shown, spec, draws, workspace, size)


@dataclass(frozen=True)
class Plan:
    """What sampling needs, loaded and checked before a file is written."""

    config: SampleConfig
    source: SampleSource
    policy: Policy
    decoder: VQDecoder
    conditions: list[Condition]
    num_images: int
    device: str


def prepare(config: SampleConfig) -> Plan:
    """Check the options, and load the models.

    Raises:
        TesseraError: the problem, and what to do.
    """
    npz = output_path(config.npz, "--npz") if config.npz else None
    config = dataclasses.replace(config, out=output_path(config.out, "--out"), npz=npz)
    check(config)
    source, device = find_source(config), resolve_device(config.device)
    if source.spec.guidance_note:
        logger.warning("note: --cfg-scale: %s", source.spec.guidance_note)
    dtype = _dtype(config.dtype, device)
    start_computing()
    policy = load_policy(source.policy, device=device, dtype=dtype)
    decoder = load_decoder(source.tokenizer, device=device)
    codes = decoder.config.codebook_size
    if policy.vocab_size != codes:
        raise ConfigError(
            f"the policy draws from {policy.vocab_size} codes, but the tokenizer "
            f"{source.tokenizer.checkpoint} has {codes}: name the policy's with --tokenizer"
        )
    conditions = read_conditions(config, policy, device, dtype)
    for first in range(0, len(conditions), config.batch):
        encoded = policy.encode(conditions[first : first + config.batch])
        if source.spec.guided_sampling:
            policy.null_conditions(encoded)
    each = config.per_condition or PER_CONDITION
    num_images = config.num_images or each * len(conditions)
    return Plan(config, source, policy, decoder, conditions, num_images, device)


def read_conditions(
    config: SampleConfig, policy: Policy, device: str, dtype: torch.dtype
) -> list[Condition]:
    """The conditions of the options, captions with their features.

    Raises:
        ConfigError: the policy takes no conditions, or of another kind.
        DataError: a file of captions cannot be read.
    """
    architecture = policy.config
    if architecture.conditioning == "none":
        if config.classes or config.captions:
            raise ConfigError(
                "this policy is unconditional: say --num-images, without --classes or --captions"
            )
        return [Condition(text="")]
    if config.captions is None:
        return class_conditions(config.classes or ALL, policy)
    of_classes = architecture.conditioning == "class"
    if config.captions.suffix.lower() == ".parquet" or not of_classes:
        found = caption_conditions(config.captions, config.column)
        if all(condition.features is not None for condition in found):
            return found
    if of_classes:  # refused before gigabytes of encoder are loaded
        raise ConfigError("--captions needs a caption-conditional policy: this one takes --classes")
    texts = read_captions(config.captions, config.column)
    encoder = CaptionEncoder(
        config.encoder, device=device, dtype=dtype, max_tokens=architecture.caption_tokens
    )
    check_captions(str(config.captions), texts, encoder, config.long_captions)
    return [Condition(text=text, features=rows) for text, rows in zip(texts, encoder(texts))]


def class_conditions(classes: str, policy: Policy) -> list[Condition]:
    """Conditions of "207,360" or "all".

    Raises:
        ConfigError: not numbers; or "all" of a policy without classes.
    """
    if classes == ALL:
        if policy.config.conditioning != "class":
            raise ConfigError("this policy has no classes: name its conditions with --captions")
        indices = list(range(policy.config.num_classes))
    else:
        try:
            indices = [int(part) for part in classes.split(",")]
        except ValueError:
            raise ConfigError(
                f"--classes takes indices separated by commas, or all; found {classes!r}"
            ) from None
    return [Condition(text=f"class {index}", class_index=index) for index in indices]


def write(plan: Plan) -> None:
    """Sample and write everything. samples.json comes last: it marks the directory as complete."""
    with ExitStack() as owned:
        owned.enter_context(locked(plan.config.out, f"--out {plan.config.out}"))
        check_unused(plan.config.out)  # again, now that it is locked
        if plan.config.npz:
            owned.enter_context(locked_file(plan.config.npz, f"--npz {plan.config.npz}"))
        _write(plan)


def _write(plan: Plan) -> None:
    config, out = plan.config, plan.config.out
    sheet = ContactSheet(len(plan.conditions), plan.num_images)
    writers: list[ContactSheet | PngWriter | NpzWriter] = [sheet]
    start = time.monotonic()
    with ExitStack() as stack:
        if config.png:
            writers.append(stack.enter_context(PngWriter(out / "images", plan.conditions)))
        if config.npz:
            npz = NpzWriter(config.npz, plan.num_images, _labels(plan))
            writers.append(stack.enter_context(npz))
        advance = stack.enter_context(progress_bar("sampling", plan.num_images, "images"))
        batches = sample_images(
            plan.policy,
            plan.decoder,
            plan.conditions,
            plan.source.spec,
            num_images=plan.num_images,
            seed=config.seed,
            batch=config.batch,
            size=config.size,
            kernels=plain if config.kernels == "torch" else None,
        )
        for images in batches:
            for writer in writers:
                writer.write(images)
            advance(len(images))
    sheet.save(out / "grid.png")
    record = describe(plan) | {"seconds": round(time.monotonic() - start, 3)}
    text = printable(dumps(record, indent=2, ensure_ascii=False))
    (out / "samples.json").write_text(text + "\n", encoding="utf-8")


def describe(plan: Plan) -> dict[str, Any]:
    """What was sampled, for samples.json; enough to repeat it."""
    config, source = plan.config, plan.source
    return {
        "policy": dataclasses.asdict(source.policy),
        "tokenizer": dataclasses.asdict(source.tokenizer),
        "run": str(config.run) if config.run else None,
        "step": source.step,
        "spec": dataclasses.asdict(source.spec),
        "seed": config.seed,
        "batch": config.batch,
        "size": config.size or None,
        "device": plan.device,
        "dtype": str(_dtype(config.dtype, plan.device)).removeprefix("torch."),
        "kernels": config.kernels,
        "num_images": plan.num_images,
        "order": "image i shows condition i modulo the number of conditions",
        "conditions": [
            {"text": condition.text, "class_index": condition.class_index}
            for condition in plan.conditions
        ],
        "npz": str(config.npz) if config.npz else None,
    }


def _labels(plan: Plan) -> list[int] | None:
    classes = [c.class_index for c in plan.conditions if c.class_index is not None]
    if len(classes) < len(plan.conditions):
        return None
    return [classes[number % len(classes)] for number in range(plan.num_images)]


def _dtype(name: str, device: str) -> torch.dtype:
    if name != "auto":
        return DTYPES[name]
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    prog = command_of("actors.sample")
    arguments = answer_help(arguments, prog, ABOUT, COMMON, SampleConfig())
    config = tyro.cli(SampleConfig, args=arguments, prog=prog)
    status = REFUSED  # nothing is written before everything is loaded and checked
    try:
        plan = prepare(config)
        status = FAILED
        write(plan)
    except (TesseraError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED if isinstance(error, LockHeldError) else status
    except KeyboardInterrupt:
        print("stopped; a directory without samples.json is incomplete", file=sys.stderr)
        return INTERRUPTED
    print(f"{plan.num_images} images of {len(plan.conditions)} conditions: {plan.config.out}")
    return 0

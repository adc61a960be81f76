"""Build the miniature's networks from scratch: `python -m learner.miniature.build`.

Trains tokenizer, policy, CLIP, preference model and feature network on the 1,000 training digits,
and for the judge, with other seeds and architectures, a classifier and a second CLIP: about two
minutes on two cores. Deterministic in seed and number of threads, on one kind of machine.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys

    from cluster.program.start import run_command

    sys.exit(run_command("learner.miniature.build"))

import gzip
import sys
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
import yaml
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from actors.models.llamagen import LlamaGenConfig
from actors.models.vq import VQConfig, VQTokenizer
from cluster.errors import ConfigError, TesseraError
from cluster.io.locks import locked
from cluster.io.paths import output_path
from cluster.io.strict_json import dumps
from cluster.model_files.tensors import write_tensors
from cluster.model_files.torchvision_ops import ensure_torchvision
from cluster.program.console import FAILED, INTERRUPTED, REFUSED, make_console
from cluster.program.invocation import command_of
from cluster.program.precision import start_computing
from cluster.program.streams import safe_streams
from learner.config import DEFAULT_PRESET, load_preset, to_dict
from learner.data.digits import CLASS_NAMES, IMAGE_SIZE, captions, digits, to_pixels
from learner.miniature import training
from rewards.networks.convnet import ConvNetConfig

NETWORKS = Path(__file__).parent / "networks"
VOCABULARY = "vocabulary.txt.gz"
PRESET = "miniature.yaml"
TOKENIZER = VQConfig(
    channels=32,
    multipliers=(1, 1),
    num_res_blocks=1,
    z_channels=32,
    codebook_size=64,
    codebook_dim=8,
)
POLICY = LlamaGenConfig(
    dim=96, num_layers=4, num_heads=4, grid=4, vocab_size=64, num_classes=len(CLASS_NAMES)
)
FEATURES = ConvNetConfig(image_size=8, channels=(24, 48), features=64, num_classes=10)
JUDGE = ConvNetConfig(image_size=8, channels=(32, 64, 128), num_classes=10)
STEPS = {
    "tokenizer": 1800,
    "policy": 600,
    "clip": 400,
    "preference": 400,
    "features": 500,
    "judge": 1000,
    "judge_clip": 400,
}


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Build the miniature's networks."""

    out: Path = Path("networks")
    """Directory for the networks and a preset that uses them (miniature.yaml)."""
    seed: int = 0
    """Base of every network's seed."""
    judge_seed: int = 20250
    """Seed of the judge, fixed so that rebuilt networks share one judge."""
    scale: float = 1.0
    """Factor of the numbers of steps (below 1 for quick tests)."""
    num_threads: int = 2
    """Threads of torch; results depend on them."""


class Builder:
    """Trains the networks in turn, each with its own random generator."""

    def __init__(self, config: BuildConfig, progress: Progress) -> None:
        self.config, self.progress = config, progress
        images, labels = digits("train")
        self.pixels, self.labels = to_pixels(images), torch.from_numpy(labels)

    def batches(self, name: str) -> training.Batches:
        seed = self.config.judge_seed if name.startswith("judge") else self.config.seed
        mixed = seed * 1_000_003 + zlib.crc32(name.encode())
        torch.manual_seed(mixed)  # initial weights
        return training.Batches(self.pixels, self.labels, torch.Generator().manual_seed(mixed))

    def steps(self, name: str) -> tuple[int, training.Tick]:
        count = max(1, int(STEPS[name] * self.config.scale))
        task = self.progress.add_task(name, total=count)
        return count, lambda: self.progress.advance(task)

    def build(self) -> None:
        start_computing()
        torch.set_num_threads(self.config.num_threads)
        out = self.config.out
        out.mkdir(parents=True, exist_ok=True)
        tokenizer = training.train_tokenizer(
            self.batches("tokenizer"), TOKENIZER, *self.steps("tokenizer")
        )
        write_tensors(out / "tokenizer.safetensors", tokenizer.state_dict(), TOKENIZER.to_dict())
        policy = training.train_policy(
            self.batches("policy"), tokenizer, POLICY, *self.steps("policy")
        )
        write_tensors(out / "policy.safetensors", policy.state_dict(), POLICY.to_dict())
        for name, config in (("features", FEATURES), ("judge", JUDGE)):
            network = training.train_classifier(self.batches(name), config, *self.steps(name))
            write_tensors(out / f"{name}.safetensors", network.state_dict(), config.to_dict())
        self._build_text_image("clip", width=64, depth=2, heads=2)
        self._build_text_image("judge_clip", width=48, depth=3, heads=3)
        self._build_text_image("preference", width=64, depth=2, heads=2, tokenizer=tokenizer)

    def _build_text_image(
        self, name: str, width: int, depth: int, heads: int, tokenizer: VQTokenizer | None = None
    ) -> None:
        ensure_torchvision()
        import open_clip

        directory = self.config.out / name
        directory.mkdir(exist_ok=True)
        write_vocabulary(directory / VOCABULARY)
        config = open_clip_config(width, depth, heads)
        (directory / "open_clip_config.json").write_text(dumps(config, indent=2) + "\n")
        batches = self.batches(name)
        model = open_clip.CLIP(**config["model_cfg"])
        encode = open_clip.get_tokenizer(
            f"local-dir:{directory}", bpe_path=str(directory / VOCABULARY)
        )
        tokens = encode(captions())
        if tokenizer is None:
            training.train_clip(batches, model, tokens, *self.steps(name))
        else:
            steps = self.steps(name)
            training.train_preference(batches, model, tokens, tokenizer, *steps)
        write_tensors(directory / "open_clip_model.safetensors", model.state_dict(), config)


def vocabulary_merges() -> list[str]:
    """Byte-pair merges that make each word of the captions one token."""
    merges: dict[str, None] = {}
    for word in dict.fromkeys(" ".join(captions()).split()):
        head, *rest = [*word[:-1], f"{word[-1]}</w>"]
        for letter in rest:
            merges[f"{head} {letter}"] = None
            head += letter
    return list(merges)


def write_vocabulary(path: Path) -> None:
    """Write a byte-pair vocabulary in open_clip's format with the captions' words. (CLIP's has
    49,152 entries, an embedding larger than all the miniature's networks.) Other text encodes as
    bytes."""
    text = "\n".join(["#version: tessera", *vocabulary_merges()])
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def open_clip_config(width: int, depth: int, heads: int) -> dict[str, Any]:
    """Model and preprocessing of a small CLIP, in open_clip's layout."""
    bytes_and_specials = 2 * 256 + 2
    return {
        "model_cfg": {
            "embed_dim": 32,
            "vision_cfg": {
                "image_size": IMAGE_SIZE,
                "patch_size": 2,
                "layers": depth,
                "width": width,
                "head_width": width // heads,
                "mlp_ratio": 2.0,
            },
            "text_cfg": {
                "context_length": 16,
                "vocab_size": bytes_and_specials + len(vocabulary_merges()),
                "layers": 1,
                "width": width,
                "heads": heads,
                "mlp_ratio": 2.0,
                "tokenizer_kwargs": {"bpe_path": VOCABULARY},
            },
        },
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"},
    }


def with_networks(folder: Path) -> dict[str, Any]:
    """The miniature's configuration as plain values, with the networks of a folder and the shipped
    judge."""
    values = to_dict(load_preset(DEFAULT_PRESET))
    values["policy"]["checkpoint"] = str(folder / "policy.safetensors")
    values["tokenizer"]["checkpoint"] = str(folder / "tokenizer.safetensors")
    values["rewards"]["clip"]["model"] = str(folder / "clip")
    values["rewards"]["hps"]["model"] = str(folder / "preference")
    values["rewards"]["features"]["checkpoint"] = str(folder / "features.safetensors")
    return values


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    prog = command_of("learner.miniature.build")
    config = tyro.cli(BuildConfig, args=arguments, description=__doc__, prog=prog)
    try:
        config = replace(config, out=output_path(config.out, "--out"))
        with locked(config.out, f"--out {config.out}"):
            return _build(config)
    except TesseraError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED if isinstance(error, ConfigError) else FAILED


def _build(config: BuildConfig) -> int:
    columns = (TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn())
    try:
        with (
            safe_streams(output_is_all=False),
            Progress(*columns, TimeElapsedColumn(), console=make_console()) as progress,
        ):
            Builder(config, progress).build()
    except KeyboardInterrupt:
        print(f"stopped: {config.out} is not whole", file=sys.stderr)
        return INTERRUPTED
    preset = config.out / PRESET
    preset.write_text(yaml.safe_dump(with_networks(config.out.absolute()), sort_keys=False))
    size = sum(file.stat().st_size for file in config.out.rglob("*") if file.is_file())
    make_console().print(
        f"wrote {size / 1e6:.1f} MB to {config.out}; use them with\n"
        f"  {command_of('learner.run')} --preset {preset}",
        highlight=False,
        soft_wrap=True,
    )
    return 0

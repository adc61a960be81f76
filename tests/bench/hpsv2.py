"""Preference scores per second: `HpsReward` against `hpsv2.img_score.score`, image by image.

python -m tests.bench.hpsv2

Same machine, threads and checkpoint: ViT-H-14 with random weights, which the bench makes (3.9 GB in
a temporary folder; `--checkpoint` keeps it). The package reads the checkpoint again on every call
and encodes the text for every image; that is how it is called for one image at a time. Both sides
score once before the clock starts, so that the file is in the page cache and the text is encoded.
Needs the extra `hpsv2`, and 9 GiB of memory.

`RESULT hpsv2.speedup` is that of bf16 on our side; the package's side computes as the package does:
fp32 on a CPU, fp16 autocast on a GPU. The ratio of fp32 with fp32 stands beside it.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table

from cluster.messages import Condition
from cluster.model_files.torchvision_ops import ensure_torchvision
from rewards.networks.open_clip_models import Precision
from rewards.scorers.hpsv2 import ARCHITECTURE, HpsConfig, HpsReward
from tests.parity import text_image

PROMPT = "a photograph of a lighthouse in the evening"
T = TypeVar("T")
PACKAGE = "hpsv2.score, one by one"
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


@dataclass(frozen=True)
class Options:
    """Images scored per second, by the package and by us."""

    images: int = 8
    """Images of one call on our side."""
    rounds: int = 2
    """Turns that the sides take, each loading its model anew; the fastest call of all counts."""
    calls: int = 4
    """Timed calls of each side in a round; the package's are for one image each."""
    size: int = 256
    """Side of the images, pixels."""
    batch_size: int = 0
    """Images of one forward pass; 0 chooses."""
    threads: int = 2
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    small: bool = False
    """A small architecture, to try the bench; its ratio says nothing."""
    checkpoint: Path | None = None
    """Use this file, and make it first if it is not there."""


@dataclass(frozen=True)
class Run:
    """One side's figures."""

    seconds: float
    """Per image."""
    scores: np.ndarray
    load: float
    """Of the machine while it ran (one minute's average)."""


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # the package's, of deprecated calls
    pictures = text_image.pictures(options.images, options.size, options.size)
    with tempfile.TemporaryDirectory() as folder:
        architecture = text_image.TINY if options.small else ARCHITECTURE
        if options.small:
            text_image.register_tiny(Path(folder))
        checkpoint = options.checkpoint or Path(folder) / "random.pt"
        if not checkpoint.exists():
            make(architecture, checkpoint)
        runs: dict[str, list[Run]] = {side: [] for side in (*PRECISIONS, PACKAGE)}
        for _ in range(options.rounds):  # the memory does not hold all models at once
            for precision in PRECISIONS:
                run = run_ours(options, architecture, checkpoint, precision, pictures)
                runs[precision].append(run)
            run = run_package(options, architecture, checkpoint, Path(folder), pictures)
            runs[PACKAGE].append(run)
    report(options, {side: min(turns, key=lambda run: run.seconds) for side, turns in runs.items()})


def make(architecture: str, checkpoint: Path) -> None:
    """Weights as open_clip initialises them, in the layout of HPSv2's files."""
    ensure_torchvision()
    import open_clip

    torch.manual_seed(0)
    model = open_clip.create_model(architecture)
    torch.save({"state_dict": model.state_dict()}, checkpoint)


def run_ours(
    options: Options, architecture: str, checkpoint: Path, precision: Precision, images: np.ndarray
) -> Run:
    config = HpsConfig(
        model=architecture,
        pretrained=str(checkpoint),
        precision=precision,
        batch_size=options.batch_size,
    )
    scorer = HpsReward(config, options.device)
    conditions = [Condition(text=PROMPT)] * len(images)
    seconds, scores = fastest(lambda: scorer(images, conditions), options.calls)
    return Run(seconds / len(images), scores, os.getloadavg()[0])


def run_package(
    options: Options, architecture: str, checkpoint: Path, folder: Path, images: np.ndarray
) -> Run:
    module = text_image.prepare_package(
        architecture, folder if options.small else None, folder / "root", options.device
    )
    pictures = [Image.fromarray(image) for image in images]

    def one(row: int) -> float:
        return float(module.score(pictures[row], PROMPT, cp=str(checkpoint))[0])

    seconds, _ = fastest(lambda: one(0), options.calls)
    load = os.getloadavg()[0]
    scores = module.score(pictures, PROMPT, cp=str(checkpoint))  # reads the checkpoint once
    module.model_dict.clear()
    return Run(seconds, np.array(scores, np.float32), load)


def fastest(call: Callable[[], T], repeats: int) -> tuple[float, T]:
    """Best seconds of several calls after one that is not timed, and what the last returned."""
    result = call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()  # scores come back as numbers, so that a GPU has finished
        times.append(time.perf_counter() - start)
    return min(times), result


def report(options: Options, best: dict[str, Run]) -> None:
    theirs = best[PACKAGE]
    table = Table(title=f"{options.size} x {options.size} images, {options.threads} threads")
    for heading in ("", "s/image", "images/s", "speedup", "scores apart", "load"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, run in best.items():
        apart = np.abs(run.scores - theirs.scores).max()
        name = name if run is theirs else f"HpsReward, {name}"
        table.add_row(
            name, f"{run.seconds:.3f}", f"{1 / run.seconds:.2f}",
            f"{theirs.seconds / run.seconds:.1f}", f"{apart:.1e}", f"{run.load:.1f}",
        )  # fmt: skip
    Console(width=100).print(table)
    print(
        f"scores of the package vary by {theirs.scores.std():.1e} between the images (random "
        f"weights); torch {torch.__version__}, {options.device}; speedup is that of bf16"
    )
    for precision in PRECISIONS:
        run = best[precision]
        print(f"RESULT hpsv2.{precision}_images_per_s={1 / run.seconds:.3g}")
        print(f"RESULT hpsv2.{precision}_apart={np.abs(run.scores - theirs.scores).max():.2g}")
        print(f"RESULT hpsv2.{precision}_speedup={theirs.seconds / run.seconds:.3g}")
    print(f"RESULT hpsv2.speedup={theirs.seconds / best['bf16'].seconds:.3g}")


if __name__ == "__main__":
    main(tyro.cli(Options))

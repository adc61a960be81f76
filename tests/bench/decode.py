"""Decoding speed: tokens/s, images/s, share of the roofline, and against the official code.

python -m tests.bench.decode --official DIR

DIR is a checkout of FoundationVision/LlamaGen (figures are against ce98ec4). Its `generate` runs in
this process on the same weights, alternating with ours. Without DIR there is no comparison, and no
speedup is printed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from actors.decoding.decode import decode_tokens
from actors.decoding.steps import Workspace
from actors.models.base import Conditions
from actors.models.llamagen import LlamaGen
from cluster.messages import SamplingSpec
from tests.bench.measuring import (
    Official,
    fastest,
    measure_machine,
    random_llamagen,
    size_config,
)


@dataclass(frozen=True)
class Options:
    """Decoding speed of LlamaGen, ours and the official code's."""

    official: Path | None = None
    """Checkout of FoundationVision/LlamaGen."""
    size: Literal["tiny", "B", "L", "XL", "XXL", "3B"] = "B"
    batch: int = 16
    """Images of one batch; guidance decodes twice as many rows."""
    grid: int = 16
    cfg_scales: tuple[float, ...] = (1.0, 2.0)
    repeats: int = 2
    """Runs of each; the fastest counts."""
    threads: int = 2
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    dtype: Literal["float32", "bfloat16"] = "float32"


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    dtype, device = getattr(torch, options.dtype), options.device
    policy = random_llamagen(size_config(options.size, options.grid), device, dtype)
    official = Official(options.official, options.size, policy) if options.official else None
    machine = measure_machine(device, dtype, small=options.size == "tiny")
    table = Table(title=f"GPT-{options.size}, batch {options.batch}, {options.dtype}")
    for heading in ("", "s", "tokens/s", "images/s", "of roofline", "speedup"):
        table.add_column(heading, justify="right" if heading else "left")
    results: dict[str, float] = {}
    for scale in options.cfg_scales:
        name = f"cfg{scale:g}" if scale != 1 else "plain"
        runs = [run_ours(options, policy, scale)]
        if official:
            runs.append(run_official(options, official, scale))
        best = fastest(runs, device, options.repeats)
        rows = options.batch * (1 if scale == 1 else 2)
        bound = machine.seconds(policy, rows)
        for label, seconds in zip(("tessera", "official"), best):
            tokens = options.batch * policy.num_tokens / seconds
            gain = f"{best[1] / seconds:.2f}" if official else ""
            table.add_row(
                f"{name}, {label}", f"{seconds:.2f}", f"{tokens:.0f}",
                f"{tokens / policy.num_tokens:.2f}", f"{bound / seconds:.0%}", gain,
            )  # fmt: skip
        results[f"{name}_tokens_per_s"] = options.batch * policy.num_tokens / best[0]
        results[f"{name}_roofline_share"] = bound / best[0]
        if official:
            results[f"{name}_speedup"] = best[1] / best[0]
    Console(width=100).print(table)
    print(
        f"machine: {machine.bytes_per_s / 1e9:.0f} GB/s, "
        f"{machine.flops_per_s / 1e9:.0f} GFLOP/s; torch {torch.__version__}, {device}"
    )
    for name, value in results.items():
        print(f"RESULT decode.{name}={value:.3g}")


def run_ours(options: Options, policy: LlamaGen, scale: float) -> Callable[[], object]:
    spec = SamplingSpec(cfg_scale=scale, guidance="none" if scale == 1 else "guided")
    workspace = Workspace(policy)
    classes = Conditions(torch.arange(options.batch, device=options.device))
    shape = options.batch, policy.num_tokens
    uniforms = torch.rand(shape, dtype=torch.float64, device=options.device)
    return lambda: decode_tokens(policy, classes, uniforms, spec, workspace)


def run_official(options: Options, official: Official, scale: float) -> Callable[[], object]:
    classes = torch.arange(options.batch, device=options.device)
    return lambda: official.decode(classes, scale)


if __name__ == "__main__":
    main(tyro.cli(Options))

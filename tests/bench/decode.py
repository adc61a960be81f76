"""Decoding speed: tokens/s, images/s, share of the roofline, and against the official code.

python -m tests.bench.decode --official DIR

DIR is a checkout of FoundationVision/LlamaGen (figures are against ce98ec4). Its `generate` runs in
this process on the same weights, alternating with ours. Without DIR there is no comparison, and no
speedup is printed.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from actors.decoding.decode import decode_tokens
from actors.decoding.steps import Workspace
from actors.models.base import Conditions
from actors.models.llamagen import LlamaGen, LlamaGenConfig
from cluster.messages import SamplingSpec

SIZES = {
    "tiny": (64, 2, 2),  # to try the bench; its figures say nothing
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1280, 36, 20),
    "XXL": (1536, 48, 24),
    "3B": (3200, 24, 32),
}
"""Width, layers, heads."""


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


@dataclass(frozen=True)
class Machine:
    """What the roofline is made of, measured here."""

    bytes_per_s: float
    flops_per_s: float

    def seconds(self, policy: LlamaGen, rows: int) -> float:
        """Least time of one decoding of `rows` rows: each step reads every weight once and the live
        keys and values, and computes 2 FLOPs a weight and row."""
        config, dtype = policy.config, policy.output.weight.dtype
        weights = sum(p.numel() for name, p in policy.named_parameters() if "embed" not in name)
        slots = sum(range(1, config.num_tokens + 1))
        cache = 2 * config.num_layers * rows * config.dim * slots * dtype.itemsize
        reading = weights * dtype.itemsize / self.bytes_per_s
        computing = 2 * weights * rows / self.flops_per_s
        return config.num_tokens * max(reading, computing) + cache / self.bytes_per_s


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    policy = build(options)
    official = load_official(options, policy) if options.official else None
    machine = measure(options)
    table = Table(title=f"GPT-{options.size}, batch {options.batch}, {options.dtype}")
    for heading in ("", "s", "tokens/s", "images/s", "of roofline", "speedup"):
        table.add_column(heading, justify="right" if heading else "left")
    results: dict[str, float] = {}
    for scale in options.cfg_scales:
        name = f"cfg{scale:g}" if scale != 1 else "plain"
        runs = [run_ours(options, policy, scale)]
        if official:
            runs.append(run_official(options, official, scale))
        best = fastest(options, runs)
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
        f"machine: reads {machine.bytes_per_s / 1e9:.0f} GB/s, "
        f"{machine.flops_per_s / 1e9:.0f} GFLOP/s; torch {torch.__version__}, {options.device}"
    )
    for name, value in results.items():
        print(f"RESULT decode.{name}={value:.3g}")


def fastest(options: Options, runs: list[Callable[[], None]]) -> list[float]:
    """Best seconds of each, the runs taking turns, so that a slow minute hits them all."""
    for run in runs:
        timed(run)  # packs weights, captures steps
    turns = [[timed(run) for run in runs] for _ in range(options.repeats)]
    return [min(seconds) for seconds in zip(*turns)]


def timed(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def build(options: Options) -> LlamaGen:
    """Random weights of the true architecture, with logits of a realistic spread."""
    dim, layers, heads = SIZES[options.size]
    config = LlamaGenConfig(dim=dim, num_layers=layers, num_heads=heads, grid=options.grid)
    policy = LlamaGen(config)
    for name, parameter in policy.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.08 if name == "output.weight" else 0.02)
    cast = policy.to(options.device, getattr(torch, options.dtype))
    return cast.eval().requires_grad_(False)


def run_ours(options: Options, policy: LlamaGen, scale: float) -> Callable[[], None]:
    spec = SamplingSpec(cfg_scale=scale, guidance="none" if scale == 1 else "guided")
    workspace = Workspace(policy)
    classes = Conditions(torch.arange(options.batch, device=options.device))
    shape = options.batch, policy.num_tokens
    uniforms = torch.rand(shape, dtype=torch.float64, device=options.device)

    def run() -> None:
        decode_tokens(policy, classes, uniforms, spec, workspace)

    return run


def load_official(options: Options, policy: LlamaGen) -> tuple[Any, Any]:
    """The official model with our weights, and its `generate`."""
    assert options.official is not None
    sys.path.insert(0, str(options.official))
    gpt = importlib.import_module("autoregressive.models.gpt")
    generate = importlib.import_module("autoregressive.models.generate").generate
    model = gpt.GPT_models[f"GPT-{options.size}"](
        vocab_size=policy.vocab_size, block_size=policy.num_tokens, cls_token_num=1
    )
    model.load_state_dict(policy.state_dict(), strict=False)
    return model.to(options.device, getattr(torch, options.dtype)).eval(), generate


def run_official(options: Options, official: tuple[Any, Any], scale: float) -> Callable[[], None]:
    model, generate = official
    classes = torch.arange(options.batch, device=options.device)

    def run() -> None:
        with quiet():
            generate(
                model, classes, options.grid**2, cfg_scale=scale, temperature=1.0, top_k=0,
                top_p=1.0, sample_logits=True,
            )  # fmt: skip

    return run


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the deprecation warnings of the code we compare with."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def measure(options: Options) -> Machine:
    """Read bandwidth and matrix product rate of this machine, best of several."""
    dtype = getattr(torch, options.dtype)
    small = options.size == "tiny"
    block = torch.ones(2 ** (20 if small else 26), dtype=torch.float32, device=options.device)
    reading = min(timed(lambda: block.sum()) for _ in range(5))  # type: ignore[arg-type,return-value]
    side = 256 if small else 2048 if options.device == "cpu" else 8192
    a = torch.randn(side, side, dtype=dtype, device=options.device)
    product = min(timed(lambda: a @ a) for _ in range(4))  # type: ignore[arg-type,return-value]
    return Machine(block.numel() * 4 / reading, 2 * side**3 / product)


if __name__ == "__main__":
    main(tyro.cli(Options))

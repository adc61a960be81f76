"""What benches share: clocks, this machine's roofline, a policy with random weights, and the
official code's way of decoding.

On a GPU, work is timed with CUDA events and starts on an idle device; on a CPU by the host's clock.
"""

from __future__ import annotations

import contextlib
import importlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actors.checkpoints.loading import build_policy
from actors.models.llamagen import LlamaGen, LlamaGenConfig

SIZES = {
    "tiny": (64, 2, 2),  # to try a bench; its figures say nothing
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1280, 36, 20),
    "XXL": (1536, 48, 24),
    "3B": (3200, 24, 32),
}
"""Width, layers, heads of LlamaGen's policies."""

READ_ON = {"cpu": 2**28, "cuda": 2**32}  # bytes; a GPU's caches and launches count for little
SIDE_ON = {"cpu": 2048, "cuda": 8192}
Run = Callable[[], object]


def synchronise(device: str) -> None:
    """Wait for the work on all streams of a GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(run: Run, device: str, calls: int = 1) -> float:
    """Seconds of a call.

    Args:
        calls: run it so many times between two readings of the clock: for work that takes less
            than the clock resolves.
    """
    if not device.startswith("cuda"):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls
    torch.cuda.synchronize()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(calls):
        run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3 / calls


def turns(runs: Sequence[Run], device: str, repeats: int, calls: int = 1) -> list[list[float]]:
    """Seconds of each run after one that is not timed (it packs, captures, compiles). They take
    turns, so that a slow minute hits them all."""
    for run in runs:
        run()
    columns = [[timed(run, device, calls) for run in runs] for _ in range(repeats)]
    return [list(seconds) for seconds in zip(*columns)]


def fastest(runs: Sequence[Run], device: str, repeats: int, calls: int = 1) -> list[float]:
    """The least of `turns`."""
    return [min(seconds) for seconds in turns(runs, device, repeats, calls)]


def median(run: Run, device: str, repeats: int, calls: int = 1) -> float:
    """The median of `turns`, of one run."""
    return statistics.median(turns([run], device, repeats, calls)[0])


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


def measure_machine(device: str, dtype: torch.dtype, *, small: bool = False) -> Machine:
    """Bandwidth and matrix product rate, best of several.

    Args:
        small: of sizes that take no time, to try a bench.
    """
    return Machine(bandwidth(device, small=small), product_rate(device, dtype, small=small))


def bandwidth(device: str, *, small: bool = False) -> float:
    """Bytes/s of the device's memory: of a copy, read and written, on a GPU; read on a CPU."""
    nbytes = 2**22 if small else READ_ON[torch.device(device).type]
    block = torch.ones(nbytes // 4, dtype=torch.float32, device=device)
    if device == "cpu":
        return nbytes / fastest([block.sum], device, 5)[0]
    copy = torch.empty_like(block)
    return 2 * nbytes / fastest([lambda: copy.copy_(block)], device, 5)[0]


def product_rate(device: str, dtype: torch.dtype, *, small: bool = False) -> float:
    """FLOP/s of a square product of random numbers: zeros draw less power and run faster."""
    side = 256 if small else SIDE_ON[torch.device(device).type]
    a = torch.randn(side, side, dtype=dtype, device=device)
    calls = 1 if device == "cpu" else 5
    return 2 * side**3 / fastest([lambda: a @ a], device, 4, calls)[0]


def random_llamagen(config: LlamaGenConfig, device: str, dtype: torch.dtype) -> LlamaGen:
    """Random weights of an architecture with logits of a realistic spread, for decoding: without
    gradients, weights in `dtype` and RoPE's tables in fp32, as a sampler has them."""
    policy = build_policy(config, device=device, dtype=dtype)
    assert isinstance(policy, LlamaGen)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.08 if name == "output.weight" else 0.02)
            else:
                parameter.fill_(1)
    return policy.eval().requires_grad_(False)


def size_config(size: str, grid: int = 16, **changes: Any) -> LlamaGenConfig:
    """The architecture of a size in `SIZES`."""
    dim, layers, heads = SIZES[size]
    return LlamaGenConfig(dim=dim, num_layers=layers, num_heads=heads, grid=grid, **changes)


class Official:
    """LlamaGen's own model and `generate`, with our policy's weights.

    Args:
        checkout: of FoundationVision/LlamaGen.
        size: of `SIZES`.
    """

    def __init__(self, checkout: Path, size: str, policy: LlamaGen) -> None:
        if str(checkout) not in sys.path:
            sys.path.insert(0, str(checkout))
        gpt = importlib.import_module("autoregressive.models.gpt")
        self._generate = importlib.import_module("autoregressive.models.generate").generate
        model = gpt.GPT_models[f"GPT-{size}"](
            vocab_size=policy.vocab_size, block_size=policy.num_tokens, cls_token_num=1
        )
        model.load_state_dict(policy.state_dict(), strict=False)
        weight = policy.output.weight
        self._model, self._tokens = model.to(weight.device, weight.dtype).eval(), policy.num_tokens

    def decode(self, classes: torch.Tensor, cfg_scale: float) -> None:
        """Decode one image of each class, without filters."""
        with _quiet():
            self._generate(
                self._model, classes, self._tokens, cfg_scale=cfg_scale, temperature=1.0, top_k=0,
                top_p=1.0, sample_logits=True,
            )  # fmt: skip


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the deprecation warnings of the code we compare with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

"""Which kernels a cache is decoded with: Triton's on CUDA where they work, plain ones elsewhere."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor, nn

from actors.kernels import plain
from actors.kernels.interface import Kernels, Window
from cluster.errors import ConfigError
from cluster.messages import SamplingSpec

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
TOLERANCE = 0.05  # of the trial: tells wrong results, not rounding


def best_kernels(cache: Tensor) -> Kernels:
    """Kernels for a cache (..., E): the fused ones on CUDA, after a trial launch. If they cannot be
    used, one message says why, and plain ones are.

    Raises:
        ConfigError: they cannot be used in a reproducible run, whose other samplers may use them.
    """
    if cache.device.type != "cuda":
        return plain
    return _tried(cache.device, cache.dtype, cache.shape[-1])


@functools.cache
def _tried(device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernels:
    reason = unsupported(device, dtype, head_dim)
    if not reason:
        try:
            from actors.kernels import fused

            reason = trial(fused, device, dtype, head_dim)
        except ImportError as error:
            reason = f"Triton cannot be imported ({error})"
        except Exception as error:  # of its compiler, of the driver: their types are not documented
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # raises if nothing can be computed any more
            reason = f"a trial launch failed with {type(error).__name__}: {error}"
    if not reason:
        return fused
    if torch.are_deterministic_algorithms_enabled():  # the switch of `start_computing`
        raise ConfigError(
            "reproducible: this sampler cannot use Triton's kernels, with which others may round "
            f"differently ({reason}): set --sampler.kernels torch"
        )
    logger.warning("note: decoding without Triton's kernels, which is slower: %s", reason)
    return plain


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why the fused kernels cannot decode such a cache; empty if they can."""
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        return f"the cache is on {device}, not on the current device, where Triton launches"
    if dtype not in DTYPES:
        return f"the cache is in {str(dtype).removeprefix('torch.')}, expected one of " + ", ".join(
            str(each).removeprefix("torch.") for each in DTYPES
        )
    if head_dim > MAX_HEAD_DIM:
        return f"the head dimension is {head_dim}, expected at most {MAX_HEAD_DIM}"
    return ""


@torch.inference_mode(False)
@torch.no_grad()
def trial(kernels: Kernels, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Launch each kernel on small inputs of this dtype; what deviates from the plain ones, or
    nothing."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    slots, slot = 40, 37
    qkv, cache = normal(3, 2, 2, 1, head_dim), normal(2, 2, 2, slots, head_dim)
    turn = torch.randn(1, head_dim, generator=generator).to(device)
    place = torch.full((1,), slot, dtype=torch.int64, device=device)
    live = Window(place, slot + 1)
    biased = Window(place, slot + 1, normal(2, 1, 1, slot + 1).float())
    narrow = tuple(normal(3, 2, 2, 1, head_dim - 4)) if head_dim > 4 else qkv
    x, weight = normal(2, 1, head_dim), normal(head_dim)
    w1, w3 = (nn.Linear(head_dim, 24, bias=False).to(device, dtype) for _ in range(2))
    logits = torch.randn(4, 5000, generator=generator).to(device) * 3
    uniforms = torch.rand(2, dtype=torch.float64, generator=generator).to(device)
    spec = SamplingSpec(cfg_scale=1.5, temperature=0.9, guidance="guided")

    def results(of: Kernels) -> dict[str, tuple[Tensor, ...]]:
        own, other = cache.clone(), cache.clone()
        return {
            "attention": (of.attention(qkv, own, live, (turn, turn)), own),
            "attention with a bias": (of.attention(narrow, other, biased), other),
            "add_rms_norm": of.add_rms_norm(x, x, weight, 1e-5),
            "gated_silu": (of.gated_silu(x, w1, w3),),
            "draw": of.draw(logits, uniforms, spec),
        }

    found, expected = results(kernels), results(plain)
    for name, tensors in expected.items():
        for a, b in zip(found[name], tensors):
            gap = (a.double() - b.double()).abs().max().item()
            if not gap <= TOLERANCE * b.double().abs().max().item():
                return f"{name} deviates by {gap:.3g} from plain PyTorch in a trial launch"
    return ""

"""Triton's kernels against their twins in plain PyTorch at LlamaGen's sizes; and attention over
whole sequences, as the learner uses it, against products in fp32.

On a CPU the kernels run through Triton's interpreter (`TRITON_INTERPRET=1`), in fp32: the
interpreter cuts fp32 off to bf16 instead of rounding it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from actors.kernels import plain
from actors.kernels.attention import full_attention, padded_head_dim
from actors.kernels.choice import best_kernels
from actors.kernels.interface import Kernels, Window
from cluster.messages import SamplingSpec
from tests.bench.gpu.scene import Scene
from tests.bench.measuring import bandwidth, fastest

HEAD_DIMS = (64, 80, 100, 104)
SPECS = (
    SamplingSpec(),
    SamplingSpec(cfg_scale=1.5, guidance="guided"),
    SamplingSpec(cfg_scale=1.5, guidance="guided", temperature=0.9, top_k=200, top_p=0.95),
)
CALLS = 50  # of a kernel between two readings of the clock


def kernels(scene: Scene) -> None:
    """Each kernel of a decoding step, 512 rows; the share of the bandwidth that attention reaches
    at the last token."""
    from actors.kernels import fused

    torch.manual_seed(0)
    if scene.on_gpu:
        cache = torch.zeros(1, 8, device=scene.device, dtype=torch.bfloat16)
        scene.figure("kernels_chosen", float(best_kernels(cache) is not plain))
    dtypes = (torch.float32, torch.bfloat16) if scene.on_gpu else (torch.float32,)
    head_dims = HEAD_DIMS[2:3] if scene.tiny else HEAD_DIMS
    for dtype in dtypes:
        name = "bf16" if dtype == torch.bfloat16 else "fp32"
        # each dimension is compiled anew
        dims = head_dims if name == "bf16" else head_dims[::2]
        gaps = [gap for dim in dims for gap in attention_gaps(scene, fused, dim, dtype)]
        scene.figure(f"kernel_attention_{name}_apart", largest(gaps))
        scene.figure(f"kernel_norm_{name}_apart", norm_gap(scene, fused, dtype))
        scene.figure(f"kernel_gate_{name}_apart", gate_gap(scene, fused, dtype))
    draws = [draw_gaps(scene, fused, spec) for spec in SPECS]
    scene.figure("kernel_draw_tokens_same", min(same for same, _ in draws))
    scene.figure("kernel_draw_apart", max(gap for _, gap in draws))
    if scene.on_gpu:
        attention_speed(scene, fused)


def attention_gaps(scene: Scene, fused: Kernels, dim: int, dtype: torch.dtype) -> Iterator[float]:
    """At the first token, in the middle and at the last; with and without a caption's bias."""
    slots = scene.num_tokens
    for slot in (0, slots // 2, slots - 1):
        for bias in (None, torch.randn(scene.rows, 1, 1, slots, device=scene.device)):
            qkv, cache, rope = step_inputs(scene, dim, dtype)
            found, expected = cache.clone(), cache.clone()
            place = torch.full((1,), slot, dtype=torch.int64, device=scene.device)
            read = None if bias is None else bias[..., : slot + 1]
            mixed = fused.attention(qkv, found, Window(place, slots, bias), rope)
            twin = plain.attention(qkv, expected, Window(slot, slot + 1, read), rope)
            yield max(apart(mixed[..., :dim], twin[..., :dim]), apart(found, expected))


def step_inputs(
    scene: Scene, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Queries, keys and values of one token; a full cache; a row of RoPE's tables."""
    rows, device, width = scene.rows, scene.device, padded_head_dim(dim, scene.device)
    heads = scene.size(16, 1)
    qkv = torch.randn(rows, 1, 3, heads, dim, device=device).to(dtype).permute(2, 0, 3, 1, 4)
    cache = torch.zeros(2, rows, heads, scene.num_tokens, width, dtype=dtype, device=device)
    cache[..., :dim].normal_()
    angle = torch.randn(1, dim // 2, device=device).repeat_interleave(2, -1)
    signs = torch.tensor([-1.0, 1.0], device=device).repeat(dim // 2)
    return qkv, cache, (angle.cos(), angle.sin() * signs)


def norm_gap(scene: Scene, fused: Kernels, dtype: torch.dtype) -> float:
    dim, device = scene.config().dim, scene.device
    x, change = torch.randn(2, scene.rows, 1, dim, device=device).to(dtype)
    weight = torch.rand(dim, device=device).to(dtype)
    pairs = zip(
        fused.add_rms_norm(x, change, weight, 1e-5), plain.add_rms_norm(x, change, weight, 1e-5)
    )
    return max(apart(found, twin) for found, twin in pairs)


@torch.no_grad()
def gate_gap(scene: Scene, fused: Kernels, dtype: torch.dtype) -> float:
    config = scene.config()
    w1, w3 = (
        nn.Linear(config.dim, config.hidden_dim, bias=False).to(scene.device, dtype)
        for _ in range(2)
    )
    x = torch.randn(scene.rows, 1, config.dim, device=scene.device).to(dtype)
    twin = plain.gated_silu(x, w1, w3)
    return apart(fused.gated_silu(x, w1, w3), twin)


def draw_gaps(scene: Scene, fused: Kernels, spec: SamplingSpec) -> tuple[float, float]:
    """Share of equal tokens; largest difference of logprobs of equal tokens, and of entropies."""
    vocab = scene.size(16384, 64)
    logits = torch.randn(2 * scene.rows if spec.guided_sampling else scene.rows, vocab) * 3
    uniforms = torch.rand(scene.rows, dtype=torch.float64).to(scene.device)
    one, other = (each.draw(logits.to(scene.device), uniforms, spec) for each in (fused, plain))
    same = one[0] == other[0]
    gaps = ((one[1] - other[1])[same].abs().max(), (one[2] - other[2]).abs().max())
    return same.double().mean().item(), max(gap.item() for gap in gaps)


def attention_speed(scene: Scene, fused: Kernels) -> None:
    slots = scene.num_tokens
    qkv, cache, rope = step_inputs(scene, 64, torch.bfloat16)
    place = torch.full((1,), slots - 1, dtype=torch.int64, device=scene.device)
    runs = [
        lambda: fused.attention(qkv, cache, Window(place, slots), rope),
        lambda: plain.attention(qkv, cache, Window(slots - 1, slots), rope),
    ]
    ours, twin = fastest(runs, scene.device, 3, CALLS)
    rate = cache.nbytes / ours
    scene.note(f"attention of a step: {ours * 1e6:.0f} us, plain {twin * 1e6:.0f} us")
    share = rate / bandwidth(scene.device, small=scene.tiny)
    scene.figure("kernel_attention_roofline", share)


def backends(scene: Scene) -> None:
    """The learner's attention, output and gradients, at lengths and head dimensions of all
    presets; which backend torch takes, and which it would with cuDNN's on."""
    torch.manual_seed(0)
    dtype = torch.bfloat16
    chosen, outputs, gradients = [], list[float](), list[float]()
    for length in (256, 576) if not scene.tiny else (9, 12):
        for dim in HEAD_DIMS:
            for masked in (False, True):
                shape = scene.size(4, 1), scene.size(16, 2), length, dim
                inputs = [torch.randn(shape, device=scene.device) for _ in range(3)]
                mask = caption_mask(inputs[0], dtype) if masked else None
                chosen.append(choices(inputs, mask, dtype))
                found = gradients_of(inputs, mask, dtype)
                exact = exact_gradients(inputs, mask)
                outputs.append(apart(found[0], exact[0]))
                gradients += [apart(a, b) for a, b in zip(found[1:], exact[1:])]
    used, preferred = zip(*chosen)
    scene.note(f"attention runs in {names(used)}; with cuDNN's on it would in {names(preferred)}")
    scene.figure("cudnn_preferred", preferred.count(SDPBackend.CUDNN_ATTENTION) / len(preferred))
    scene.figure("attention_in_math", used.count(SDPBackend.MATH) / len(used))
    scene.figure("attention_apart", largest(outputs))
    scene.figure("attention_gradient_apart", largest(gradients))


def caption_mask(query: Tensor, dtype: torch.dtype) -> Tensor:
    """Causal, with log n at slot 0: (B, 1, T, T)."""
    batch, _, length, _ = query.shape
    seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    bias = torch.zeros(batch, 1, 1, length, device=query.device)
    bias[..., 0] = torch.arange(1, batch + 1, device=query.device).log().view(-1, 1, 1)
    return bias.expand(-1, -1, length, -1).masked_fill(~seen, -torch.inf).to(dtype)


def gradients_of(inputs: list[Tensor], mask: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of the product's attention, for a gradient of ones."""
    given = [each.to(dtype).requires_grad_() for each in inputs]
    mixed = full_attention(*given, mask=mask, causal=mask is None)
    return [mixed, *torch.autograd.grad(mixed.sum(), given)]


def exact_gradients(inputs: list[Tensor], mask: Tensor | None) -> list[Tensor]:
    """The same by products in fp32 of the rounded inputs."""
    given = [each.to(torch.bfloat16).float().requires_grad_() for each in inputs]
    query, key, value = given
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if mask is None:
        seen = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    else:
        scores = scores + mask.float()
    mixed = scores.softmax(-1) @ value
    return [mixed, *torch.autograd.grad(mixed.sum(), given)]


def choices(
    inputs: list[Tensor], mask: Tensor | None, dtype: torch.dtype
) -> tuple[SDPBackend, SDPBackend]:
    """The backend that torch takes as the product calls it, and with cuDNN's on."""
    missing = padded_head_dim(inputs[0].shape[-1], inputs[0].device.type) - inputs[0].shape[-1]
    # with gradients, as the learner's: torch's choice depends on it
    padded = [nn.functional.pad(e, (0, missing)).to(dtype).requires_grad_() for e in inputs]

    def choice() -> SDPBackend:
        number = torch._fused_sdp_choice(*padded, attn_mask=mask, is_causal=mask is None)
        return SDPBackend(number)

    with cudnn_on():
        preferred = choice()
    return choice(), preferred


@contextmanager
def cudnn_on() -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def names(found: tuple[SDPBackend, ...]) -> str:
    return ", ".join(sorted({each.name for each in found}))


def apart(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value expected; NaN if there is one."""
    wide = expected.double()
    return ((found.double() - wide).abs().max() / wide.abs().max()).item()


def largest(values: list[float]) -> float:
    """The maximum; NaN if there is one."""
    return float(torch.tensor(values, dtype=torch.float64).max())

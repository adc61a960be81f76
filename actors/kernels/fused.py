"""The kernels in Triton: one launch each. Not yet run on a GPU; tests run them through Triton's
interpreter and compile them for one.

No kernel uses atomics or the order of programs: each output is a function of its own row's inputs,
so a row's result does not depend on the others in its batch, and repeats bit for bit. Only a draw
with top-k or top-p, which is the plain one, does not, unless the run is reproducible.

Importing this module imports Triton; `choice` decides whether to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from actors.kernels import plain
from actors.kernels.interface import Rope, Window
from actors.kernels.merged import merged_weight
from cluster.messages import SamplingSpec

live_slots = True

LOWEST = tl.constexpr(-1e30)
"""A running maximum before the first score: finite, so that the exponential of its difference to
-inf is 0."""
CACHE_TILE = 4096  # elements of keys, and of values, that a program reads at once
GATE_BLOCK = 1024
DRAW_BLOCK = 4096


def attention(
    qkv: Tensor | Sequence[Tensor], cache: Tensor, window: Window, rope: Rope | None = None
) -> Tensor:
    query, key, value = _alike(*qkv)
    batch, heads, _, width = query.shape
    place, bias = window.slot, window.bias
    if isinstance(place, int):
        place = torch.full((1,), place, dtype=torch.int64, device=query.device)
    mixed = torch.empty((batch, 1, heads, width), dtype=query.dtype, device=query.device)
    keys, values = cache.unbind()
    stride = keys.shape[3]
    block = triton.next_power_of_2(stride)
    cos, sin = rope or (query, query)  # not read
    _attention[(batch * heads,)](
        query, key, value, keys, values, place, cos, sin, query if bias is None else bias, mixed,
        query.stride(0), query.stride(1), keys.shape[2],
        0 if bias is None or bias.shape[0] == 1 else bias.stride(0), width**-0.5,
        HEADS=heads, WIDTH=width, STRIDE=stride, BLOCK=block, SLOTS=max(CACHE_TILE // block, 16),
        ROTATE=rope is not None, BIAS=bias is not None, num_warps=4,
    )  # fmt: skip
    return mixed.transpose(1, 2)


def _alike(*tensors: Tensor) -> Sequence[Tensor]:
    """Tensors (B, H, 1, E) that have the same strides, the last of them 1."""
    strides = {tensor.stride() for tensor in tensors}
    if len(strides) == 1 and tensors[0].stride(-1) == 1:
        return tensors
    return [tensor.contiguous() for tensor in tensors]


@triton.jit
def _rotated(pointer, column, inside, cos, sin, ROTATE: tl.constexpr):
    """A head's query or key, in its dtype."""
    x = tl.load(pointer + column, mask=inside, other=0.0)
    if ROTATE:
        other = tl.load(pointer + (column ^ 1), mask=inside, other=0.0)  # of its pair
        across = tl.load(cos + column, mask=inside, other=0.0)
        along = tl.load(sin + column, mask=inside, other=0.0)
        turned = x.to(tl.float32) * across + other.to(tl.float32) * along
        x = turned.to(pointer.dtype.element_ty)
    return x


@triton.jit
def _attention(
    query, key, value, keys, values, place, cos, sin, bias, mixed, row_stride, head_stride, slots,
    bias_stride, scale, HEADS: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr, ROTATE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """One program a row and head. Each of SLOTS lanes has a running maximum of its own (online
    softmax), so that the loop has no barrier; they are merged after it, with the new token's score,
    whose keys and values come from registers."""
    program = tl.program_id(0).to(tl.int64)
    row, head = program // HEADS, program % HEADS
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    start = row * row_stride + head * head_stride
    q = _rotated(query + start, column, inside, cos, sin, ROTATE)
    k = _rotated(key + start, column, inside, cos, sin, ROTATE)
    v = tl.load(value + start + column, mask=inside, other=0.0)
    kind = keys.dtype.element_ty
    q, k, v = q.to(kind).to(tl.float32), k.to(kind), v.to(kind)

    slot = tl.load(place)
    keys += program * slots * STRIDE
    values += program * slots * STRIDE
    tl.store(keys + slot * STRIDE + column, k, mask=inside)
    tl.store(values + slot * STRIDE + column, v, mask=inside)
    now = tl.sum(q * k.to(tl.float32), 0) * scale
    if BIAS:
        bias += row * bias_stride
        now += tl.load(bias + slot)

    lane = tl.arange(0, SLOTS)
    highest = tl.full((SLOTS,), LOWEST, tl.float32)
    total = tl.zeros((SLOTS,), tl.float32)
    sums = tl.zeros((SLOTS, BLOCK), tl.float32)
    for first in range(0, slot.to(tl.int32), SLOTS):
        at = first + lane
        live = at < slot
        offsets = at[:, None] * STRIDE + column[None, :]
        both = live[:, None] & (column < STRIDE)[None, :]  # padding is zeros, and aligned
        k_tile = tl.load(keys + offsets, mask=both, other=0.0).to(tl.float32)
        v_tile = tl.load(values + offsets, mask=both, other=0.0).to(tl.float32)
        score = tl.sum(q[None, :] * k_tile, 1) * scale
        if BIAS:
            score += tl.load(bias + at, mask=live, other=0.0)
        score = tl.where(live, score, float("-inf"))
        above = tl.maximum(highest, score)
        shrink, weight = tl.exp(highest - above), tl.exp(score - above)
        total = total * shrink + weight
        sums = sums * shrink[:, None] + weight[:, None] * v_tile
        highest = above

    top = tl.maximum(tl.max(highest, 0), now)
    share, last = tl.exp(highest - top), tl.exp(now - top)
    result = tl.sum(sums * share[:, None], 0) + last * v.to(tl.float32)
    result = result / (tl.sum(total * share, 0) + last)
    tl.store(mixed + program * WIDTH + column, result.to(mixed.dtype.element_ty), mask=inside)


def add_rms_norm(
    x: Tensor, change: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    width = x.shape[-1]
    total = x if change is None else torch.empty_like(x)
    normed = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))
    _add_rms_norm[(x.numel() // width,)](
        x, x if change is None else change.contiguous(), weight, total, normed, width, eps,
        ADD=change is not None, BLOCK=triton.next_power_of_2(width),
        num_warps=8 if width > 2048 else 4,
    )  # fmt: skip
    return total, normed


@triton.jit
def _add_rms_norm(
    x, change, weight, total, normed, width, eps,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = tl.program_id(0).to(tl.int64) * width + column
    h = tl.load(x + at, mask=inside, other=0.0)
    if ADD:
        wide = h.to(tl.float32) + tl.load(change + at, mask=inside, other=0.0).to(tl.float32)
        h = wide.to(x.dtype.element_ty)
        tl.store(total + at, h, mask=inside)
    wide = h.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    result = (wide * scale).to(x.dtype.element_ty).to(tl.float32)
    result *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at, result.to(normed.dtype.element_ty), mask=inside)


def gated_silu(x: Tensor, w1: nn.Module, w3: nn.Module) -> Tensor:
    merged = merged_weight(w1, w3)
    left, right = (w1(x), w3(x)) if merged is None else F.linear(x, merged).chunk(2, -1)
    gated = torch.empty(left.shape, dtype=left.dtype, device=left.device)
    left, right = _alike(left.flatten(0, -2), right.flatten(0, -2))
    rows, width = left.shape
    _gated_silu[(rows, triton.cdiv(width, GATE_BLOCK))](
        left, right, gated, width, left.stride(0), BLOCK=GATE_BLOCK, num_warps=4
    )
    return gated


@triton.jit
def _gated_silu(
    left, right, gated, width, stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a block of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(left + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    silu = (x / (1 + tl.exp(-x))).to(left.dtype.element_ty).to(tl.float32)
    result = silu * tl.load(right + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(gated + row * width + column, result.to(gated.dtype.element_ty), mask=inside)


def draw(logits: Tensor, uniforms: Tensor, spec: SamplingSpec) -> tuple[Tensor, Tensor, Tensor]:
    if spec.filters:  # a threshold over the whole row: sorting is not worth a kernel of our own
        return plain.draw(logits, uniforms, spec)
    logits, guided = logits.contiguous(), spec.guided_sampling
    rows, vocabulary = logits.shape
    rows = rows // 2 if guided else rows
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    entropies = torch.empty_like(logprobs)
    _draw[(rows,)](
        logits, logits[rows:] if guided else logits, uniforms.contiguous(), tokens, logprobs,
        entropies, vocabulary, float(spec.cfg_scale), float(spec.temperature), GUIDED=guided,
        TEMPERED=spec.temperature != 1, BLOCK=min(DRAW_BLOCK, triton.next_power_of_2(vocabulary)),
        num_warps=8,
    )  # fmt: skip
    return tokens, logprobs, entropies


@triton.jit
def _mixed(
    conditional, unconditional, at, inside, scale, temperature,
    GUIDED: tl.constexpr, TEMPERED: tl.constexpr,
):  # fmt: skip
    """Guided and tempered logits; -inf outside."""
    logits = tl.load(conditional + at, mask=inside, other=float("-inf"))
    if GUIDED:
        free = tl.load(unconditional + at, mask=inside, other=0.0)
        logits = tl.where(inside, free + (logits - free) * scale, float("-inf"))  # 0 * inf
    if TEMPERED:
        logits = logits / temperature
    return logits


@triton.jit
def _draw(
    conditional, unconditional, uniforms, tokens, logprobs,
    entropies, vocabulary, scale, temperature, GUIDED: tl.constexpr,
    TEMPERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row, which reads its logits three times (from the cache but the first): for the
    normaliser, for entropy and total, for the token.

    The cumulative probability of a token is taken in float64: the sums of the blocks before it, in
    order, plus a scan of its own block. The twin adds one by one: they differ by about 1e-16, so
    tokens differ only where rounding decides."""
    row = tl.program_id(0).to(tl.int64)
    conditional += row * vocabulary
    unconditional += row * vocabulary
    lane = tl.arange(0, BLOCK)

    highest = tl.full((BLOCK,), LOWEST, tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, vocabulary, BLOCK):
        at = first + lane
        logits = _mixed(conditional, unconditional, at, at < vocabulary, scale, temperature, GUIDED,
                        TEMPERED)  # fmt: skip
        above = tl.maximum(highest, logits)
        sums = sums * tl.exp(highest - above) + tl.exp(logits - above)
        highest = above
    top = tl.max(highest, 0)
    log_sum = tl.log(tl.sum(sums * tl.exp(highest - top), 0))

    entropy = tl.zeros((BLOCK,), tl.float32)
    mass = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, vocabulary, BLOCK):
        at = first + lane
        inside = at < vocabulary
        logits = _mixed(conditional, unconditional, at, inside, scale, temperature, GUIDED,
                        TEMPERED)  # fmt: skip
        logp = logits - top - log_sum
        p = tl.exp(logp)
        entropy -= p * tl.where(inside, logp, 0.0)
        mass += p.to(tl.float64)

    target = tl.load(uniforms + row) * tl.sum(mass, 0)
    before = tl.sum(mass, 0) * 0
    drawn = tl.max(lane, 0) * 0 + vocabulary
    last = tl.max(lane, 0) * 0
    for first in range(0, vocabulary, BLOCK):
        at = first + lane
        logits = _mixed(conditional, unconditional, at, at < vocabulary, scale, temperature, GUIDED,
                        TEMPERED)  # fmt: skip
        p = tl.exp(logits - top - log_sum).to(tl.float64)
        passed = (before + tl.cumsum(p, 0) > target) & (p > 0)
        drawn = tl.minimum(drawn, tl.min(tl.where(passed, at, vocabulary), 0))
        last = tl.maximum(last, tl.max(tl.where(p > 0, at, 0), 0))
        before += tl.sum(p, 0)
    token = tl.minimum(drawn, last)  # a uniform next to 1 may pass no sum

    logits = _mixed(conditional, unconditional, token, token >= 0, scale, temperature, GUIDED,
                    TEMPERED)  # fmt: skip
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logprobs + row, logits - top - log_sum)
    tl.store(entropies + row, tl.sum(entropy, 0))

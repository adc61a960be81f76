"""Triton's kernels against their twins in plain PyTorch: on a GPU where there is one, through
Triton's interpreter elsewhere."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actors.kernels import plain
from actors.kernels.interface import Window
from actors.kernels.merged import merged_weight
from cluster.messages import SamplingSpec
from cluster.weights import load_weights, pack_weights

pytest.importorskip("triton", reason="Triton exists on Linux only")
pytest.importorskip("hypothesis")  # a machine that is borrowed for its GPU may lack it
from hypothesis import example, given, settings
from hypothesis import strategies as st

from actors.kernels import fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def assert_near(found: Tensor, expected: Tensor) -> None:
    """fp32: 1e-5; bf16: two units in the last place of the largest value."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    scale = max(float(expected.abs().max()), 1e-3)
    limit = 1e-5 * scale
    if expected.dtype == torch.bfloat16:
        limit = 2 * 2.0 ** (math.floor(math.log2(scale)) - 7)
    assert (found.float() - expected.float()).abs().max() <= limit


def heads_of(layout: str, batch: int, heads: int, width: int, dtype: torch.dtype) -> Any:
    """Queries, keys and values (B, H, 1, E), as views of products: one of all three (LlamaGen) or
    one each (taming)."""
    if layout == "merged":
        return normal(batch, 1, 3, heads, width, dtype=dtype).permute(2, 0, 3, 1, 4)
    return [
        normal(batch, 1, heads * width, seed=at, dtype=dtype).unflatten(-1, (heads, -1))
        .transpose(1, 2) for at in range(3)
    ]  # fmt: skip


@EXAMPLES
@example(2, 2, 64, 0, 130, 130, torch.bfloat16, torch.bfloat16, "rope", 2)
@example(2, 2, 80, 0, 70, 75, torch.float32, torch.float32, "rope", 1)
@example(1, 2, 100, 4, 66, 70, torch.bfloat16, torch.bfloat16, "rope", 0)
@example(2, 1, 104, 0, 33, 34, torch.float32, torch.bfloat16, "rope", 0)
@example(2, 3, 64, 0, 0, 1, torch.float32, torch.float32, "apart", 0)
@given(
    batch=st.integers(1, 3), heads=st.integers(1, 3), width=st.sampled_from([4, 12, 20, 64, 100]),
    padding=st.sampled_from([0, 4]), slot=st.integers(0, 90), more=st.integers(1, 9),
    dtype=DTYPES, cache_dtype=DTYPES, layout=st.sampled_from(["rope", "merged", "apart"]),
    biases=st.integers(0, 2),
)  # fmt: skip
def test_attention(
    batch: int, heads: int, width: int, padding: int, slot: int, more: int, dtype: torch.dtype,
    cache_dtype: torch.dtype, layout: str, biases: int,
) -> None:  # fmt: skip
    """biases: none, one for all rows, one a row."""
    slots = slot + more
    qkv = heads_of("apart" if layout == "apart" else "merged", batch, heads, width, dtype)
    rope = (normal(1, width, seed=5), normal(1, width, seed=6)) if layout == "rope" else None
    bias = normal((0, 1, batch)[biases], 1, 1, slots, seed=7) if biases else None
    cache = normal(2, batch, heads, slots, width + padding, seed=8, dtype=cache_dtype)
    cache[..., width:] = 0
    cache[:, :, :, slot:] = torch.nan  # read by nobody
    cache[:, :, :, slot:, width:] = 0
    written, place = cache.clone(), torch.tensor([slot], device=DEVICE)
    found = fused.attention(qkv, written, Window(place, slots, bias), rope)

    exact = cache.float()[..., :width]  # in the cache's dtype the twin would round its scores
    part = None if bias is None else bias[..., : slot + 1]
    if cache_dtype == torch.bfloat16:  # it reads what was written
        rounded = qkv if rope is None else [*plain.rotate(qkv[:2], rope), qkv[2]]
        qkv, rope = [each.to(cache_dtype).to(dtype) for each in rounded], None
    expected = plain.attention(qkv, exact, Window(slot, slot + 1, part), rope)
    assert_near(found, expected)
    assert_near(written[:, :, :, slot, :width], exact[:, :, :, slot].to(cache_dtype))
    written[:, :, :, slot, :width] = cache[:, :, :, slot, :width]
    assert torch.equal(written.isnan(), cache.isnan())
    assert torch.equal(written.nan_to_num(), cache.nan_to_num())


def test_attention_takes_its_slot_as_a_number_and_any_strides() -> None:
    qkv = heads_of("merged", 2, 2, 8, torch.float32)
    mixed_strides = [qkv[0], qkv[1].contiguous(), qkv[2].transpose(0, 1).contiguous().mT.mT]
    mixed_strides[2] = mixed_strides[2].transpose(0, 1)
    caches = [normal(2, 2, 2, 6, 8) for _ in range(2)]
    found = fused.attention(mixed_strides, caches[0], Window(3, 4))
    assert_near(found, plain.attention(qkv, caches[1], Window(3, 4)))
    assert torch.equal(*caches)


@EXAMPLES
@given(rows=st.integers(1, 4), width=st.integers(2, 300), dtype=DTYPES, add=st.booleans())
def test_add_rms_norm(rows: int, width: int, dtype: torch.dtype, add: bool) -> None:
    x, change = normal(rows, 1, width, dtype=dtype), normal(rows, 1, width, seed=1, dtype=dtype)
    weight, wanted = normal(width, seed=2, dtype=dtype), change if add else None
    total, normed = fused.add_rms_norm(x, wanted, weight, 1e-5)
    expected = plain.add_rms_norm(x, wanted, weight, 1e-5)
    assert torch.equal(total, expected[0])
    assert_near(normed, expected[1])


def test_the_norm_rounds_where_the_reference_does() -> None:
    """The sum, and the normalised value before the weight: without either, one value in five or
    more differs in its last bit."""
    x, change, weight = (normal(8, 1, 500, seed=at, dtype=torch.bfloat16) for at in range(3))
    found = fused.add_rms_norm(x, change, weight[0, 0], 1e-5)
    for one, other in zip(found, plain.add_rms_norm(x, change, weight[0, 0], 1e-5)):
        assert (one == other).float().mean() > 0.99


@EXAMPLES
@given(
    rows=st.integers(1, 3), width=st.sampled_from([1, 7, 1024, 1030]), dtype=DTYPES,
    bias=st.booleans(),
)  # fmt: skip
def test_gated_silu(rows: int, width: int, dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    w1, w3 = (nn.Linear(16, width, bias=bias).to(DEVICE, dtype) for _ in range(2))
    x = 8 * normal(rows, 1, 16, dtype=dtype)
    with torch.no_grad():
        expected = plain.gated_silu(x, w1, w3)
        assert_near(fused.gated_silu(x, w1, w3), expected)
    assert (merged_weight(w1, w3) is None) == bias


@EXAMPLES
@example(2, 9000, True, 0.7, 3)
@given(
    rows=st.integers(1, 3), vocabulary=st.sampled_from([2, 20, 300, 4096, 5000]),
    guided=st.booleans(), temperature=st.sampled_from([1.0, 0.5, 3.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_draw(rows: int, vocabulary: int, guided: bool, temperature: float, seed: int) -> None:
    spec = SamplingSpec(temperature=temperature)
    if guided:
        spec = SamplingSpec(temperature=temperature, cfg_scale=2.5, guidance="guided")
    logits = 3 * normal(rows * (1 + guided), vocabulary, seed=seed)
    uniforms = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    uniforms = uniforms.to(DEVICE)
    tokens, logprobs, entropies = fused.draw(logits, uniforms, spec)
    expected = plain.draw(logits, uniforms, spec)
    assert torch.equal(tokens, expected[0])  # of these uniforms, none lies where rounding decides
    assert (logprobs - expected[1]).abs().max() <= 1e-5
    assert (entropies - expected[2]).abs().max() <= 1e-5


def test_a_draw_at_the_edges_takes_a_token_that_is_possible() -> None:
    logits = normal(4, 5000)
    logits[:, :3] = logits[:, 4090:4200] = logits[:, 4990:] = -torch.inf
    edges = torch.tensor([0.0, 1 - 2**-53, 0.5, 0.9], dtype=torch.float64, device=DEVICE)
    found, expected = (kernels.draw(logits, edges, SamplingSpec())[0] for kernels in (fused, plain))
    assert found.tolist() == expected.tolist()
    assert found[:2].tolist() == [3, 4989]
    logits[1, 7] = torch.nan
    tokens, logprobs, _ = fused.draw(logits, edges, SamplingSpec())
    assert 0 <= tokens[1] < 5000
    assert logprobs.isnan().tolist() == [False, True, False, False]


def test_a_filtered_draw_is_the_twins() -> None:
    logits, uniforms = normal(3, 50), torch.full((3,), 0.4, dtype=torch.float64, device=DEVICE)
    for spec in (SamplingSpec(top_k=5), SamplingSpec(top_p=0.5)):
        for found, expected in zip(
            fused.draw(logits, uniforms, spec), plain.draw(logits, uniforms, spec)
        ):
            assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 80, 100, 104])
def test_a_layer_at_full_size(width: int, dtype: torch.dtype) -> None:
    """512 rows of 16 heads and 576 slots; the widths of LlamaGen."""
    qkv, place = heads_of("merged", 512, 16, width, dtype), torch.tensor([570], device=DEVICE)
    rope = normal(1, width, seed=5), normal(1, width, seed=6)
    bias = normal(512, 1, 1, 576, seed=7)
    cache = normal(2, 512, 16, 576, width, seed=8, dtype=dtype)
    exact = cache.float()
    found = fused.attention(qkv, cache, Window(place, 576, bias), rope)
    expected = plain.attention(qkv, exact, Window(570, 571, bias[..., :571]), rope)
    assert_near(found, expected)
    x, weight = normal(512, 1, 16 * width, dtype=dtype), normal(16 * width, seed=1, dtype=dtype)
    for one, other in zip(*(of.add_rms_norm(x, x, weight, 1e-5) for of in (fused, plain))):
        assert_near(one, other)
    w1, w3 = (
        nn.Linear(16 * width, 48 * width, bias=False, device=DEVICE, dtype=dtype) for _ in range(2)
    )
    with torch.no_grad():
        assert_near(fused.gated_silu(x, w1, w3), plain.gated_silu(x, w1, w3))


@pytest.mark.gpu
def test_a_draw_at_full_size() -> None:
    logits, spec = 3 * normal(512, 16384), SamplingSpec(cfg_scale=2.0, guidance="guided")
    uniforms = torch.rand(256, dtype=torch.float64, device=DEVICE)
    tokens, logprobs, entropies = fused.draw(logits, uniforms, spec)
    expected = plain.draw(logits, uniforms, spec)
    same = tokens == expected[0]
    assert same.float().mean() >= 0.98  # of 256, one may lie where rounding decides
    assert (logprobs - expected[1])[same].abs().max() <= 1e-5
    assert (entropies - expected[2]).abs().max() <= 1e-5


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(4, rows, bias=False) for rows in (6, 5))


def assert_merged(gate: Gate) -> Tensor:
    """The merged weight holds both; moving it there changes neither."""
    before = [gate.w1.weight.clone(), gate.w3.weight.clone()]
    with torch.inference_mode():
        merged = merged_weight(gate.w1, gate.w3)
    assert merged is not None
    assert torch.equal(merged, torch.cat(before))
    assert torch.equal(torch.cat([gate.w1.weight, gate.w3.weight]), merged)
    return merged


def test_merged_weights_follow_every_write() -> None:
    gate = Gate()
    merged, parameters = assert_merged(gate), list(gate.parameters())
    assert assert_merged(gate).data_ptr() == merged.data_ptr()
    assert all(a is b for a, b in zip(parameters, gate.parameters()))
    load_weights(gate, pack_weights({name: t * 3 for name, t in gate.state_dict().items()}, 1))
    assert torch.equal(merged, torch.cat([gate.w1.weight, gate.w3.weight]))
    with torch.no_grad():
        gate.w3.weight.mul_(2)
    assert torch.equal(merged[6:], gate.w3.weight)
    F.linear(torch.ones(4), gate.w1.weight).sum().backward()  # still leaves
    assert gate.w1.weight.grad is not None


def test_weights_that_moved_are_merged_again() -> None:
    gate = Gate()
    merged = assert_merged(gate)
    twin = copy.deepcopy(gate)
    with torch.no_grad():
        twin.w1.weight.neg_()
    assert assert_merged(twin).data_ptr() != merged.data_ptr()
    assert assert_merged(gate).data_ptr() == merged.data_ptr()
    gate.to(torch.float64)
    assert assert_merged(gate).dtype == torch.float64
    gate.load_state_dict({name: t + 1 for name, t in gate.state_dict().items()}, assign=True)
    assert_merged(gate)
    assert set(gate.state_dict()) == {"w1.weight", "w3.weight"}


class Adapted(nn.Module):
    """Shows its layer's weight as its own, as peft's do."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.bias = layer, None

    @property
    def weight(self) -> Tensor:
        return self.layer.weight


def test_only_plain_maps_are_merged() -> None:
    gate = Gate()
    assert merged_weight(Adapted(gate.w1), gate.w3) is None
    other = nn.Linear(4, 5, bias=False, dtype=torch.bfloat16)
    assert merged_weight(Gate().w1, other) is None

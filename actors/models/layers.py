"""Layers that decode fast: linear maps over packed weights, attention over a static cache."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from actors.kernels.attention import padded_head_dim
from actors.kernels.interface import Kernels
from actors.kernels.plain import rms_norm
from actors.models.base import DecodeState

MAX_PACKED_ROWS = 128  # above, a plain product is as fast and needs no second copy of the weights
MIN_PACKED_WEIGHTS = 1 << 16  # below, a layer fits the cache and the call costs more than it saves


class _Packed:
    """A weight in oneDNN's blocked layout, and the version of the weight it was packed from.

    Not copied or pickled with its module.
    """

    def __init__(self) -> None:
        self.made_from: tuple[int, int, torch.dtype, torch.dtype] | None = None
        self.weight: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Packed:
        return _Packed()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Packed, ()

    def refresh(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`, packed; packed again if it was written or replaced since."""
        state = weight._version, weight.data_ptr(), weight.dtype, dtype
        if self.weight is None or self.made_from != state:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype))
            self.made_from = state
        return self.weight


class Linear(nn.Linear):
    """A linear map that keeps a packed copy of its weight for decoding on a CPU.

    With few rows a product is bound by reading the weight, and oneDNN reads its blocked layout
    several times faster. In-place writes to the weight are detected by its version counter; writes
    through `.data` are not.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self._packed = _Packed()

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype or not self._packable(x):
            return F.linear(x, self.weight, self.bias)
        return self._packed_product(x)

    def _packed_product(self, x: Tensor) -> Tensor:
        packed = self._packed.refresh(self.weight, x.dtype)
        return torch.ops.mkldnn._linear_pointwise(x, packed, self.bias, "none", [], "")

    def _packable(self, x: Tensor) -> bool:
        return (
            x.device.type == "cpu"
            and not torch.compiler.is_compiling()  # it cannot trace the next question
            and torch.is_inference_mode_enabled()
            and x.numel() <= MAX_PACKED_ROWS * self.in_features
            and self.weight.numel() >= MIN_PACKED_WEIGHTS
            and torch.backends.mkldnn.is_available()
        )


class Head(Linear):
    """The last linear map, without a bias: fp32 logits in any precision.

    In half precision, operands are rounded and the sum is not: among logits of 8 to 16, bf16 has
    steps of 1/16, which guidance multiplies. Weights and hidden states in fp32 take part in a pass
    under autocast as in any other linear map.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features) fp32"""
        dtype = self.weight.dtype
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        if dtype not in (torch.bfloat16, torch.float16):
            return super().forward(x).float()
        if self.weight.dtype == dtype and self._packable(x):
            return self._packed_product(x.to(dtype).float())
        product = _HalfProduct.apply(x.flatten(0, -2), self.weight, dtype)
        return product.unflatten(0, x.shape[:-1])


class _HalfProduct(torch.autograd.Function):
    """x w^T in fp32 of operands rounded to half precision; so are those of its gradients.

    torch's own product with an `out_dtype` exists on accelerators only.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """x (N, D), weight (V, D) -> (N, V) fp32"""
        rounded = x.to(dtype)
        ctx.save_for_backward(rounded, weight)
        ctx.input_dtype = x.dtype
        return wide_product(rounded, weight.to(dtype).t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        rounded = gradient.to(x.dtype)
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = wide_product(rounded, weight.to(x.dtype)).to(ctx.input_dtype)
        if ctx.needs_input_grad[1]:
            of_weight = wide_product(rounded.t(), x).to(weight.dtype)
        return of_x, of_weight, None


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """Product (N, M) fp32 of matrices (N, K) and (K, M) in half precision."""
    if left.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            return left.float() @ right.float()
    return torch.mm(left, right, out_dtype=torch.float32)


class RMSNorm(nn.Module):
    """Statistics in fp32, cast back, then times the weight (the order matters in bf16)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def after(self, x: Tensor, change: Tensor | None, kernels: Kernels) -> tuple[Tensor, Tensor]:
        """The sum of both arguments, and its norm."""
        return kernels.add_rms_norm(x, change, self.weight, self.eps)


def run_block(block: nn.Module, checkpointing: bool, *inputs: Any) -> Tensor:
    """A block's output. With checkpointing, its activations are recomputed in the backward pass; a
    block has no randomness to replay."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return block(*inputs)


def allocate_cache(
    shape: tuple[int, int, int, int, int], like: Tensor, dtype: torch.dtype | None
) -> DecodeState:
    """A zeroed cache of `shape` (L, B, H, S, E) on the device of `like`; with heads padded as
    `padded_head_dim` says.

    Zeroed, because a step reads unwritten slots under a bias of -inf, and 0 * NaN is NaN. fp32 on
    any CPU: attention in bf16 is slower there.
    """
    layers, *rest, head_dim = shape
    width = padded_head_dim(head_dim, like.device.type)
    if dtype is None:
        dtype = torch.float32 if like.device.type == "cpu" else like.dtype
    return DecodeState(torch.zeros((layers, 2, *rest, width), dtype=dtype, device=like.device))

"""Two weights in one storage, so that one matrix product computes both linear maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def merged_weight(first: nn.Module, second: nn.Module) -> Tensor | None:
    """The weights of two linear maps (F, D) and (G, D) as one (F + G, D), of which they are views.

    The first call moves them there. They remain parameters under their names, so that what is
    written into them is written into the merged one, too. Whatever gives them memory of their own
    again (`.to`, a copy of the module, `load_state_dict(assign=True)`) is noticed at the next call,
    which merges them anew.

    Returns:
        None unless both are plain linear maps without a bias: not those of an adapter, not sharded,
        not made in inference mode.
    """
    if not (_is_plain(first) and _is_plain(second)):
        return None
    a, b = first.weight, second.weight
    assert isinstance(a, nn.Parameter) and isinstance(b, nn.Parameter)  # noqa: PT018
    if (a.shape[1], a.dtype, a.device) != (b.shape[1], b.dtype, b.device):
        return None
    if not _adjacent(a, b):
        with torch.inference_mode(False), torch.no_grad():  # later writes may be outside of it
            both = torch.cat([a.detach(), b.detach()])
            a.data, b.data = both[: len(a)], both[len(a) :]
    shape, strides = (len(a) + len(b), a.shape[1]), (a.shape[1], 1)
    return a.detach().as_strided(shape, strides, a.storage_offset())


def _is_plain(module: nn.Module) -> bool:
    linear = isinstance(module, nn.Linear) and module.bias is None
    return linear and type(module.weight) is nn.Parameter and not module.weight.is_inference()


def _adjacent(a: Tensor, b: Tensor) -> bool:
    """Whether b follows a in one storage."""
    return (
        a.is_contiguous()
        and b.is_contiguous()
        and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        and b.storage_offset() == a.storage_offset() + a.numel()
    )

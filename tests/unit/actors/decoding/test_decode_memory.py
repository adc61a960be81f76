"""Memory of decoding at full size, without the memory: on the meta device."""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from actors.decoding.decode import decode_tokens
from actors.decoding.steps import Workspace
from actors.models.base import Conditions
from actors.models.llamagen import LlamaGen, LlamaGenConfig
from cluster.messages import SamplingSpec

XL = LlamaGenConfig(dim=1280, num_layers=36, num_heads=20, grid=16)
VALUES = (torch.ops.aten.is_nonzero.default, torch.ops.aten._local_scalar_dense.default)
BATCH = 256  # images: with guidance, 512 rows


class LiveMemory(TorchDispatchMode):
    """Bytes of all storages made while it is on and alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._views: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in VALUES:
            return True  # the meta device has none
        result = func(*args, **(kwargs or {}))
        known = {id(leaf) for leaf in tree_leaves((args, kwargs))}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and id(leaf) not in known:
                self._add(leaf)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not self._views[key]:
            self.now += size
            self.peak = max(self.peak, self.now)
        self._views[key] += 1
        weakref.finalize(tensor, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._views[key] -= 1
        if not self._views[key]:
            self.now -= size


def test_the_tracker_counts_what_lives() -> None:
    with LiveMemory() as memory:
        a = torch.zeros(1000, device="meta")
        b = a.view(10, 100)
        del a
        c = b + 1
        assert memory.now == 8000
        del b, c
    assert memory.now == 0
    assert memory.peak == 8000


def memory_of(config: LlamaGenConfig) -> tuple[int, int, int]:
    """Bytes of the weights, of the cache, and of what else lives at the peak of decoding."""
    with torch.device("meta"):
        policy = LlamaGen(config).to(torch.bfloat16).eval().requires_grad_(False)
        classes = Conditions(torch.zeros(BATCH, dtype=torch.int64))
        uniforms = torch.zeros(BATCH, config.num_tokens, dtype=torch.float64)
    spec = SamplingSpec(cfg_scale=2.0, guidance="guided")
    with LiveMemory() as memory:
        decode_tokens(policy, classes, uniforms, spec, Workspace(policy, static=True))
    weights = sum(p.numel() * p.element_size() for p in policy.parameters())
    cache = 2 * config.num_layers * 2 * BATCH * config.dim * config.num_tokens * 2
    return weights, cache, memory.peak - cache


def test_decoding_xl_at_512_rows_takes_weights_and_cache_and_little_else() -> None:
    """Measured with one layer and with two: all of XL's 36 take the first and 35 differences."""
    one, two = (memory_of(dataclasses.replace(XL, num_layers=layers)) for layers in (1, 2))
    weights, cache, rest = (a + (XL.num_layers - 1) * (b - a) for a, b in zip(one, two))
    print(f"weights {weights:.3g}, cache {cache:.3g}, rest / both {rest / (weights + cache):.4f}")
    assert rest <= 0.15 * (weights + cache)

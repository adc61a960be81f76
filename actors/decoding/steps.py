"""One decoding step: static KV cache, and CUDA graphs of the step on a GPU.

A step is policy, guidance, filters, draw. On a CPU it reads the filled slots of the cache. On a
GPU, where launching kernels costs more than running them, it is captured as a CUDA graph, with
tokens, uniforms and slot in static buffers: one for all positions where the kernels read the filled
slots alone, else one for each window of `WINDOW` slots.

Shapes: B batch, V vocabulary, S slots of the cache.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from actors.kernels.choice import best_kernels
from actors.kernels.interface import Kernels
from actors.models.base import Conditions, DecodeState, Policy, Window
from cluster.messages import SamplingSpec

WINDOW = 64  # slots: a captured step reads at most this many empty ones
WARM_UP = 3  # eager steps before a capture, as PyTorch asks for
KEPT = 16  # pairs (rows, spec): groups decoded together in training and evaluation, and galleries


class Sampled(NamedTuple):
    """One token of each rollout."""

    tokens: Tensor
    """(B,) int64"""
    logprobs: Tensor
    """(B,) fp32"""
    entropies: Tensor
    """(B,) fp32, nats"""


def with_null_conditions(policy: Policy, conditions: Conditions, spec: SamplingSpec) -> Conditions:
    """The batch of a pass: B conditions; under guidance 2B, the null ones last."""
    if not spec.guided_sampling:
        return conditions
    return conditions.concat(policy.null_conditions(conditions))


def decode_one_token(
    policy: Policy,
    state: DecodeState,
    tokens: Tensor,
    uniforms: Tensor,
    spec: SamplingSpec,
    window: Window | None = None,
) -> Sampled:
    """Append tokens (B,) and draw the next ones with uniforms (B,)."""
    inputs = tokens.repeat(2) if spec.guided_sampling else tokens
    return Sampled(*state.kernels.draw(policy.decode_step(state, inputs, window), uniforms, spec))


class StaticStep:
    """A step with static input buffers, for one window of slots."""

    def __init__(
        self, policy: Policy, state: DecodeState, spec: SamplingSpec, size: int, batch: int
    ) -> None:
        device = state.cache.device
        self._policy, self._state, self._spec, self._size = policy, state, spec, size
        self._tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self._uniforms = torch.zeros(batch, dtype=torch.float64, device=device)
        self._slot = torch.zeros(1, dtype=torch.int64, device=device)
        self._slots = torch.arange(size, device=device)
        self._sampled: Sampled | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, tokens: Tensor, uniforms: Tensor, slot: int) -> Sampled:
        self.load(tokens, uniforms, slot)
        if self._graph is None or self._sampled is None:
            return self._run()
        self._graph.replay()
        return Sampled(*(output.clone() for output in self._sampled))

    def capture(self, pool: Any, stream: torch.cuda.Stream) -> None:
        """Record the step as a CUDA graph. It runs on the current contents of the buffers.

        Args:
            pool: memory that all graphs share.
            stream: to warm up and to record on, one for all captures. The allocator keeps memory
                for each stream; and torch hands out 32 streams in turn, so a new one per capture
                could be the images' stream.
        """
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread may decode images meanwhile, which is no error here
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._sampled = self._run()
        self._graph = graph

    def load(self, tokens: Tensor, uniforms: Tensor, slot: int) -> None:
        """Fill the buffers without running."""
        self._tokens.copy_(tokens)
        self._uniforms.copy_(uniforms)
        self._slot.fill_(slot)

    def _run(self) -> Sampled:
        position = self._state.position
        bias = None if self._state.bias is None else self._state.bias[..., : self._size]
        if not self._state.kernels.live_slots:
            empty = (self._slots > self._slot).view(1, 1, 1, -1)
            mask = torch.zeros(empty.shape, device=empty.device).masked_fill(empty, -torch.inf)
            bias = mask if bias is None else mask + bias
        window = Window(self._slot, self._size, bias)
        sampled = decode_one_token(
            self._policy, self._state, self._tokens, self._uniforms, self._spec, window
        )
        self._state.position = position  # the caller counts: a replay could not
        return sampled


class Workspace:
    """What successive decodings share: memory for the KV cache and, on a GPU, captured steps.

    Batches of all sizes use the same memory, as large as the largest of them needs, and each keeps
    its captured steps: training, evaluation and galleries take turns without capturing anew. A
    batch larger than all before replaces the memory and drops the steps. Of pairs (rows, spec) at
    most `KEPT` have steps; the least recently used are dropped. All graphs share one pool.

    Weights may be written in place between steps, and replaced between decodings.
    """

    def __init__(
        self, policy: Policy, *, static: bool | None = None, kernels: Kernels | None = None
    ) -> None:
        """
        Args:
            static: use `StaticStep`; None is on a GPU only.
            kernels: None is `best_kernels`.
        """
        self._policy, self._kernels = policy, kernels
        self._static = static
        self._largest: DecodeState | None = None
        self._states: dict[int, DecodeState] = {}  # by rows; their caches are parts of the largest
        self._state: DecodeState | None = None  # of the present decoding
        self._steps: dict[tuple[int, SamplingSpec], dict[int, StaticStep]] = {}  # by size of window
        self._addresses: list[int] = []  # of the weights that the steps read
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None  # of captures

    def prefill(self, conditions: Conditions, uniforms: Tensor, spec: SamplingSpec) -> Sampled:
        """Draw the first token of each rollout; conditions from `with_null_conditions`."""
        state = self._state = self._state_of(len(conditions))
        if self._steps and self._addresses != addresses(self._policy):
            self._steps, self._pool = {}, None  # a pool whose graphs are gone is of no use
        before = state.bias
        logits = self._policy.prefill(state, conditions)
        if before is not None and state.bias is not None and before.shape == state.bias.shape:
            before.copy_(state.bias)  # captured steps read the first bias's memory
            state.bias = before
        return Sampled(*state.kernels.draw(logits, uniforms, spec))

    def step(self, tokens: Tensor, uniforms: Tensor, spec: SamplingSpec) -> Sampled:
        """Append tokens (B,) and draw the next ones."""
        state = self._state
        if state is None:
            raise RuntimeError("step() before prefill()")
        if not (state.cache.is_cuda if self._static is None else self._static):
            return decode_one_token(self._policy, state, tokens, uniforms, spec)
        slots = state.cache.shape[4]
        size = slots
        if not state.kernels.live_slots:
            size = min(-(-(state.position + 1) // WINDOW) * WINDOW, slots)
        steps = self._steps_of(state, spec)
        static = steps.get(size)
        known = static is not None
        if static is None:
            static = StaticStep(self._policy, state, spec, size, len(tokens))
            if state.cache.is_cuda:
                static.load(tokens, uniforms, state.position)
                self._pool = self._pool or torch.cuda.graph_pool_handle()
                self._stream = self._stream or torch.cuda.Stream()
                static.capture(self._pool, self._stream)
            steps[size] = static  # not before: a capture that failed is tried again, not left out
        sampled = static(tokens, uniforms, state.position)
        if not known:  # kernels may merge weights when they first run
            self._addresses = addresses(self._policy)
        state.position += 1
        return sampled

    def clear(self) -> None:
        """Zero the cache: steps with a fixed window read slots of earlier decodings under a bias of
        -inf, which does not hide NaN."""
        if self._largest is not None:
            self._largest.cache.zero_()

    def _state_of(self, rows: int) -> DecodeState:
        """The cache of so many rows, a part of the largest one."""
        if self._largest is None or self._largest.cache.shape[2] < rows:
            self._drop()
            self._largest = self._policy.allocate(rows)
        if rows not in self._states:
            layers, halves, _, *rest = self._largest.cache.shape
            shape = (layers, halves, rows, *rest)
            cache = self._largest.cache.view(-1)[: math.prod(shape)].view(shape)
            kernels = self._kernels or best_kernels(cache)
            self._states[rows] = DecodeState(cache, kernels=kernels)
        return self._states[rows]

    def _drop(self) -> None:
        """Free all memory, before a larger cache is allocated."""
        self._largest, self._state, self._states = None, None, {}
        self._steps, self._pool = {}, None  # as in prefill
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # the old cache's memory is of no use to the new one

    def _steps_of(self, state: DecodeState, spec: SamplingSpec) -> dict[int, StaticStep]:
        """Steps of a number of rows and a spec, which become the most recently used."""
        key = state.cache.shape[2], spec
        self._steps[key] = self._steps.pop(key, {})
        while len(self._steps) > KEPT:
            del self._steps[next(iter(self._steps))]
        return self._steps[key]


def addresses(policy: Policy) -> list[int]:
    """Where the weights lie: a captured step reads them there, whatever becomes of the module."""
    return [tensor.data_ptr() for tensor in policy.state_dict().values()]

"""One decoding step after another: static caches, and on a GPU captured steps.

A step is the same function everywhere: policy, guidance, filters, draw. On a CPU it reads the live
slots of the cache. On a GPU, where launching its kernels costs more than running them, it is
captured as a CUDA graph for each window of `WINDOW` slots, and reads what it needs (tokens,
uniforms, place) from static buffers.

Shapes: B batch, V vocabulary, S slots of the cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from actors.decoding.distribution import log_distribution, mixed_logits, sample_tokens
from actors.models.base import Conditions, DecodeState, Policy, Window
from cluster.messages import SamplingSpec

WINDOW = 64  # slots: a captured step reads at most this many dead ones
WARM_UP = 3  # eager steps before a capture, as PyTorch asks for


class Sampled(NamedTuple):
    """One token of each rollout."""

    tokens: Tensor
    """(B,) int64"""
    logprobs: Tensor
    """(B,) fp32"""
    entropies: Tensor
    """(B,) fp32, nats"""


def with_null_conditions(policy: Policy, conditions: Conditions, spec: SamplingSpec) -> Conditions:
    """The rows a pass needs: the conditions, and under guidance the null ones after them."""
    if not spec.guided_sampling:
        return conditions
    return conditions.concat(policy.null_conditions(conditions))


def draw(logits: Tensor, uniforms: Tensor, spec: SamplingSpec) -> Sampled:
    """Guidance, filters, draw; logits (B or 2B, V), uniforms (B,). The probabilities are not kept:
    a whole image's would be 16 MB."""
    logp, entropies = log_distribution(mixed_logits(logits, spec), spec)
    tokens = sample_tokens(logp, uniforms)
    return Sampled(tokens, logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), entropies)


def step(
    policy: Policy,
    state: DecodeState,
    tokens: Tensor,
    uniforms: Tensor,
    spec: SamplingSpec,
    window: Window | None = None,
) -> Sampled:
    """Append tokens (B,) and draw the next ones with uniforms (B,)."""
    rows = tokens.repeat(2) if spec.guided_sampling else tokens
    return draw(policy.decode_step(state, rows, window), uniforms, spec)


class StaticStep:
    """A step whose every changing input lies in a buffer, for one window of slots."""

    def __init__(
        self, policy: Policy, state: DecodeState, spec: SamplingSpec, size: int, batch: int
    ) -> None:
        device = state.cache.device
        self._policy, self._state, self._spec, self._size = policy, state, spec, size
        self._tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self._uniforms = torch.zeros(batch, dtype=torch.float64, device=device)
        self._place = torch.zeros(1, dtype=torch.int64, device=device)
        self._slots = torch.arange(size, device=device)
        self._sampled: Sampled | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, tokens: Tensor, uniforms: Tensor, place: int) -> Sampled:
        self.load(tokens, uniforms, place)
        if self._graph is None or self._sampled is None:
            return self._run()
        self._graph.replay()
        return Sampled(*(output.clone() for output in self._sampled))

    def capture(self, pool: Any) -> None:
        """Record the step. It runs on what the buffers hold, and writes where it will write."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # another thread may decode images meanwhile: its calls are no error of this capture
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self._sampled = self._run()
        self._graph = graph

    def load(self, tokens: Tensor, uniforms: Tensor, place: int) -> None:
        """Fill the buffers without running."""
        self._tokens.copy_(tokens)
        self._uniforms.copy_(uniforms)
        self._place.fill_(place)

    def _run(self) -> Sampled:
        position = self._state.position
        dead = (self._slots > self._place).view(1, 1, 1, -1)
        bias = torch.zeros(dead.shape, device=dead.device).masked_fill(dead, -torch.inf)
        if self._state.bias is not None:
            bias = bias + self._state.bias[..., : self._size]
        window = Window(self._place, self._size, bias)
        drawn = step(self._policy, self._state, self._tokens, self._uniforms, self._spec, window)
        self._state.position = position  # the caller counts: a replay could not
        return drawn


class Workspace:
    """What one decoding after another uses again: the cache, and on a GPU the captured steps.

    Weights may be written to in place between steps; they must not be replaced.
    """

    def __init__(self, policy: Policy, *, static: bool | None = None) -> None:
        """static: steps of fixed shape over windows; None is on a GPU only."""
        self._policy = policy
        self._static = static
        self._state: DecodeState | None = None
        self._steps: dict[tuple[SamplingSpec, int], StaticStep] = {}
        self._pool: Any = None

    def prefill(self, rows: Conditions, uniforms: Tensor, spec: SamplingSpec) -> Sampled:
        """Draw the first token of each rollout; rows as `with_null_conditions` gives them."""
        state = self._allocated(len(rows))
        before = state.bias
        logits = self._policy.prefill(state, rows)
        if before is not None and state.bias is not None and before.shape == state.bias.shape:
            before.copy_(state.bias)  # captured steps read the first one's memory
            state.bias = before
        return draw(logits, uniforms, spec)

    def step(self, tokens: Tensor, uniforms: Tensor, spec: SamplingSpec) -> Sampled:
        """Append tokens (B,) and draw the next ones."""
        state = self._state
        if state is None:
            raise RuntimeError("step() before prefill()")
        if not self._is_static(state):
            return step(self._policy, state, tokens, uniforms, spec)
        slots = state.cache.shape[4]
        size = min(-(-(state.position + 1) // WINDOW) * WINDOW, slots)
        static = self._steps.get((spec, size))
        if static is None:
            static = StaticStep(self._policy, state, spec, size, len(tokens))
            self._steps[spec, size] = static
            if state.cache.is_cuda:
                static.load(tokens, uniforms, state.position)
                self._pool = self._pool or torch.cuda.graph_pool_handle()
                static.capture(self._pool)
        drawn = static(tokens, uniforms, state.position)
        state.position += 1
        return drawn

    def _is_static(self, state: DecodeState) -> bool:
        return state.cache.is_cuda if self._static is None else self._static

    def _allocated(self, rows: int) -> DecodeState:
        """The cache for a batch of `rows`; another batch size gives the old one's memory back."""
        if self._state is None or self._state.cache.shape[2] != rows:
            self._state, self._steps, self._pool = None, {}, None
            self._state = self._policy.allocate(rows)
        return self._state

"""Comparisons that several reference families share; tolerances and margins of the data's README.

Each check asserts, and returns the largest deviation that it saw.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.distribution import filtered_logits, log_distribution
from cluster.messages import SamplingSpec
from tests.parity.reference import Reference

SHIPPED = Path(__file__).parent / "data"
DECIDED = 1e-4  # a top-k or nucleus decision closer than this may flip
SURE = 1e-3  # margin above which a greedy token or a code is beyond rounding
GAPS = ("topk_gap", "nucleus_gap")
TABLES = ("logp", "entropy", "support", *GAPS)


def check_close(found: Tensor, expected: Tensor, bound: float, what: str) -> float:
    assert found.shape == expected.shape, what
    apart = float((found - expected).abs().max())
    assert apart <= bound, f"{what}: {apart:.1e} apart, allowed {bound:.0e}"
    return apart


def sampling_specs(reference: Reference) -> Iterator[tuple[int, SamplingSpec]]:
    """The specs of a file, with their row in its tables."""
    for index, fields in enumerate(reference.part("specs")):
        scale = fields["cfg_scale"]
        yield (
            index,
            SamplingSpec(
                temperature=fields["temperature"],
                top_k=fields["top_k"],
                top_p=fields["top_p"],
                cfg_scale=scale,
                guidance="none" if scale == 1 else "guided",
            ),
        )


def check_distribution(
    reference: Reference,
    given: str,
    row: tuple[int, SamplingSpec],
    logits: Tensor,
    bound: float,
) -> tuple[int, float]:
    """Logprobs, entropies and supports of the tokens `given` under one spec.

    Where a filter's decision is closer than rounding, a position is left out; where the given token
    itself ties with the edge of the support, its logprob is: which of the tied tokens belongs to
    the support is then undecided, though how many do is not.

    Args:
        logits: (B, T, V), guided as the spec says.
        bound: tolerance of the logits.

    Returns:
        how many logprobs were compared, and the largest deviation.
    """
    index, spec = row
    arrays = {name: reference.arrays[f"{given}/{name}"][index] for name in TABLES}
    sure = max(DECIDED, bound / spec.temperature)
    decided = np.all([np.isnan(arrays[gap]) | (arrays[gap] > sure) for gap in GAPS], axis=0)
    logp, entropy = log_distribution(logits, spec)
    tokens = reference.tensor(given)
    picked = logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).numpy()
    support = (logp > -torch.inf).sum(-1).numpy()
    np.testing.assert_array_equal(support[decided], arrays["support"][decided])
    known = decided & ~at_the_edge(logits, tokens, spec, bound).numpy()
    assert (np.isfinite(picked) == np.isfinite(arrays["logp"]))[known].all()
    inside = known & np.isfinite(arrays["logp"])
    apart = max(
        np.abs(picked[inside] - arrays["logp"][inside]).max(initial=0),
        np.abs(entropy.numpy() - arrays["entropy"])[decided].max(initial=0),
    )
    assert apart <= bound / spec.temperature, f"{given} under {spec}: {apart:.1e} apart"
    return int(inside.sum()), float(apart)


def at_the_edge(logits: Tensor, tokens: Tensor, spec: SamplingSpec, bound: float) -> Tensor:
    """Which of the given tokens (B, T) lie within rounding of the edge of the support: kept, and
    no more than `bound` above the best token that is dropped, or dropped, and no more than that
    below the worst that is kept. (Between equal logits a filter may choose either.)"""
    kept = filtered_logits(logits, spec) > -torch.inf
    best_dropped = logits.masked_fill(kept, -torch.inf).amax(-1)
    worst_kept = logits.masked_fill(~kept, torch.inf).amin(-1)
    own = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return (own <= best_dropped + bound) & (own >= worst_kept - bound)


def check_compared(reference: Reference, compared: int, least: float) -> None:
    """Whether enough could be compared: `least` in the shipped files; in others, which may hold
    nothing but ties, anything at all."""
    if not compared:
        pytest.skip(f"{reference.path.name}: nothing is decided beyond rounding")
    if reference.path.parent == SHIPPED:
        assert compared >= least


def greedy_runs(reference: Reference) -> dict[str, dict[str, Any]]:
    """Greedy decodings of a file with their settings, those that it holds; skipped by name where
    it holds none."""
    named = reference.part("greedy")
    needed = {name: (f"{name}/tokens", f"{name}/margin") for name in named}
    there = {name for name, entries in needed.items() if reference.arrays.keys() >= set(entries)}
    if not there:
        pytest.skip(f"{reference.path.name} has none of {needed}")
    return {name: fields for name, fields in named.items() if name in there}


def check_greedy(reference: Reference, name: str, tokens: Tensor) -> int:
    """Greedy tokens (B, T), T the first ones at least, up to the first that rounding could turn;
    returns how many were compared."""
    expected, compared = reference.tensor(f"{name}/tokens"), 0
    for row, margins in enumerate(reference.arrays[f"{name}/margin"]):
        close = np.flatnonzero(margins <= SURE)
        sure = min(int(close[0]) if len(close) else len(margins), tokens.shape[1])
        assert torch.equal(tokens[row, :sure], expected[row, :sure]), name
        compared += sure
    return compared


def check_images(reference: Reference, images: Tensor, bound: float) -> float:
    """Decoded images (B, 3, H, W): values, or a grid and a crop of large ones; means and stds."""
    size = images.shape[-1]
    middle = slice(size // 2 - 16, size // 2 + 16)
    wide = images.double()
    whole = 1e-5 if bound == 5e-5 else 5e-5
    views: dict[str, tuple[Tensor, float]] = {
        "decode/image": (images, bound),
        "decode/image_grid": (images[..., ::8, ::8], bound),
        "decode/image_crop": (images[..., middle, middle], bound),
        "decode/image_mean": (wide.mean((2, 3)), whole),
        "decode/image_std": (wide.std((2, 3), correction=0), whole),
    }
    there = [name for name in views if name in reference.arrays] or ["decode/image"]
    return max(
        check_close(views[name][0], reference.tensor(name), views[name][1], name) for name in there
    )


def check_levels(reference: Reference, levels: Tensor) -> float:
    """uint8 images (B, H, W, 3); returns the share of values that are equal."""
    assert levels.dtype == torch.uint8
    apart = np.abs(levels.numpy().astype(int) - reference.arrays["decode/image_uint8"])
    assert apart.max() <= 1
    equal = float((apart == 0).mean())
    assert equal >= 0.999
    return equal


def check_codes(reference: Reference, codes: Tensor, expected: str, margin: str) -> int:
    """Codes where the margin is beyond rounding; returns how many were compared."""
    sure = reference.tensor(margin) > SURE
    assert torch.equal(codes[sure], reference.tensor(expected)[sure])
    return int(sure.sum())

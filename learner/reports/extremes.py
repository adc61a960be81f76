"""Best and worst images of a run by each reward, decoded from its rollouts.

They are chosen among the last fifth of the iterations, and decoded as far as a time limit allows: a
VQ-16 tokenizer takes seconds an image on a CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import DataError, TesseraError
from cluster.program.streams import printable
from learner.reports.images import encode_single
from learner.reports.reading import RunData
from learner.reports.summary import figure_text
from learner.rollouts.images import RolloutDecoder, read_rollouts, rollout_files
from learner.rollouts.parquet import REWARD, reward_names

LAST_SHARE = 0.2
MOST_FILES = 40
EACH = 6
"""Best images, and as many worst ones, of each reward."""
MOST_REWARDS = 8
LARGEST = 20_000
"""Bytes of one image."""
FIRST_CHUNK = 1
Key = tuple[int, int, int]
"""Iteration, group, rollout."""
Decoder = Callable[[np.ndarray], np.ndarray]
"""Tokens (N, T) -> images (N, H, W, 3) uint8."""


@dataclass(frozen=True)
class Decoding:
    """How images are decoded, and how much of a long trace is read."""

    seconds: float
    """Longest time for it; 0: no image is decoded."""
    device: str = "auto"
    trace_bytes: int = 128 << 20
    """From the end of trace.json."""


AT_END = Decoding(10.0, "cpu", 16 << 20)
"""At a run's end: learner and samplers still have the GPUs."""
AT_STOP = Decoding(0.0, "cpu", 16 << 20)
"""At a stop or failure, which a scheduler may give only seconds: none is decoded."""
BY_COMMAND = Decoding(120.0)


@dataclass(frozen=True)
class Pick:
    """An image: which rollout it is, and its scores."""

    key: Key
    label: str
    scores: dict[str, float]


@dataclass(frozen=True)
class Extremes:
    """Best and worst rollouts of each reward, best and worst first."""

    best: dict[str, list[Pick]]
    worst: dict[str, list[Pick]]
    iterations: tuple[int, int]
    """First and last of those they were chosen among."""

    def in_order(self) -> list[Key]:
        """Every rollout once: the most extreme ones of all rewards first."""
        ranked = [
            pick.key
            for rank in range(EACH)
            for picks in (*self.best.values(), *self.worst.values())
            for pick in picks[rank : rank + 1]
        ]
        return list(dict.fromkeys(ranked))


def find_extremes(data: RunData) -> Extremes | None:
    """Choose among the rollouts of the last iterations; None if none were recorded.

    Raises:
        DataError: none of the files is whole.
    """
    files = rollout_files(data.run)
    count = min(max(math.ceil(len(files) * LAST_SHARE), 1), MOST_FILES)
    chosen = list(files)[-count:]
    if not chosen:
        return None
    names = _reward_names(files[number] for number in reversed(chosen))
    columns = ["iteration", "group", "rollout", "class_index", "text", "error"]
    table = read_rollouts(data.run, chosen, [*columns, *(REWARD + name for name in names)])
    rows = table.to_pylist()
    best, worst = {}, {}
    for name in names[:MOST_REWARDS]:
        scored = [row for row in rows if not row["error"] and _finite(row[REWARD + name])]
        ranked = sorted(scored, key=lambda row: row[REWARD + name], reverse=True)
        if ranked:
            best[name] = [_pick(row, names) for row in ranked[:EACH]]
            worst[name] = [_pick(row, names) for row in ranked[-EACH:][::-1]]
    return Extremes(best, worst, (chosen[0], chosen[-1])) if best else None


def _reward_names(files: Iterable[Any]) -> list[str]:
    """Rewards of the newest readable file."""
    for file in files:
        try:
            return reward_names(pq.read_schema(file).names)
        except (OSError, ValueError, pa.ArrowException):
            continue
    raise DataError("none of the newest files of rollouts can be read")


def _finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _pick(row: dict[str, Any], names: list[str]) -> Pick:
    label = printable(row["text"] or "") or f"class {row['class_index']}"
    scores = {name: row[REWARD + name] for name in names if _finite(row[REWARD + name])}
    return Pick((row["iteration"], row["group"], row["rollout"]), label, scores)


def decoded(data: RunData, keys: list[Key], how: Decoding) -> dict[Key, np.ndarray]:
    """Images (H, W, 3) uint8 of rollouts: of as many, in order, as the time limit allows.

    Raises:
        TesseraError: the tokenizer or the rollouts cannot be read.
    """
    settings = data.settings
    if settings is None:
        raise DataError("the configuration, which names the tokenizer, cannot be read")
    tokens = read_rollouts(
        data.run, sorted({key[0] for key in keys}), ["iteration", "group", "rollout", "tokens"]
    )
    wanted = set(keys)
    found = {
        key: row["tokens"]
        for row in tokens.to_pylist()
        if (key := (row["iteration"], row["group"], row["rollout"])) in wanted
    }
    there = [key for key in keys if key in found]
    decoder = RolloutDecoder(settings, how.device)
    images = within(
        decoder.images,
        [found[key] for key in there],
        how.seconds,
    )
    return dict(zip(there, images))


def within(decode: Decoder, tokens: list[list[int]], seconds: float) -> list[np.ndarray]:
    """Decode in chunks of doubling size while the next is expected to end in time; the first is one
    image, whatever it takes."""
    images: list[np.ndarray] = []
    started, size, each = time.monotonic(), FIRST_CHUNK, 0.0
    while len(images) < len(tokens):
        left = seconds - (time.monotonic() - started)
        if images:
            size = min(2 * size, int(left / each)) if each > 0 else 2 * size
        if size < 1:
            break
        chunk, begun = tokens[len(images) : len(images) + size], time.monotonic()
        images += list(decode(np.asarray(chunk, np.int64)))
        each = (time.monotonic() - begun) / len(chunk)
    return images


def section(data: RunData, how: Decoding, budget: float) -> tuple[dict[str, Any] | None, str]:
    """Rewards with their best and worst images for the page, and a line on what is missing.

    Args:
        budget: bytes on the page.
    """
    try:
        extremes = find_extremes(data)
        if extremes is None:
            return None, "rollouts are recorded with --output.rollouts, which this run had off"
        if not how.seconds:
            return None, "a run that stops does not wait for them; the command learner.report does"
        keys = extremes.in_order()
        images = decoded(data, keys, how)
    except (TesseraError, RuntimeError, MemoryError, OSError) as error:  # torch's among them
        return None, str(error)
    if not images:
        return None, "their tokens are not in the rollouts"
    limit = min(LARGEST, budget / max(len(images), 1) / 4 * 3)
    sources = {key: encode_single(image, limit) for key, image in images.items()}
    small = max(next(iter(images.values())).shape[:2]) <= 64
    rewards = [
        {"name": name,
         "best": [_shown(pick, name, sources) for pick in extremes.best[name]],
         "worst": [_shown(pick, name, sources) for pick in extremes.worst[name]]}
        for name in extremes.best
    ]  # fmt: skip
    lacking = len(keys) - len(images)
    note = (
        f"{lacking} of {len(keys)} are not shown, since decoding them here would take more than "
        f"{how.seconds:g} s (the command learner.report allows more than a run's end, and a GPU is "
        "faster)"
        if lacking
        else ""
    )
    first, last = extremes.iterations
    return {"rewards": rewards, "first": first, "last": last, "art": small}, note


def _shown(pick: Pick, name: str, sources: dict[Key, str]) -> dict[str, Any]:
    iteration, group, rollout = pick.key
    scores = [f"{other} {figure_text(value)}" for other, value in pick.scores.items()]
    where = f"iteration {iteration}, group {group}, rollout {rollout}"
    return {
        "src": sources.get(pick.key, ""),
        "score": figure_text(pick.scores[name]),
        "label": pick.label,
        "tip": "\n".join([pick.label, *scores, where]),
    }

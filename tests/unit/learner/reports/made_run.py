"""A run directory with everything that a run writes, made in a moment: records by formulas, real
files by the code that writes them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.io.run_layout import rollout_name
from cluster.io.strict_json import dumps
from cluster.messages import Condition
from cluster.spans import Span
from learner.monitoring.gallery import Gallery, contact_sheet, save_gallery
from learner.monitoring.timeline import Trace, Usage
from learner.rollouts.parquet import rollout_schema, write_rollouts
from learner.runs.run_dir import RunDirectory
from tests.small_run import small_config

REWARDS = ("clip", "hps", "loo_fid")
COLUMNS, ROWS = 4, 3  # of a gallery
TOKENS, CODES = 16, 64  # the miniature's
FIGURES = {"fid": 25.0, "density": 0.4, "coverage": 0.45, "precision": 0.75, "recall": 0.6,
           "accuracy": 0.7, "clip": 0.5, "entropy": 2.6, "second/fid": 0.8,
           "second/coverage": 0.7, "images": 1000.0}  # fmt: skip


def made_run(path: Path, iterations: int = 60, **changes: Any) -> RunDirectory:
    """A finished run of an earlier version: without starts.jsonl."""
    run = RunDirectory.create(str(path), small_config(iterations=iterations, **changes))
    lines = [dumps(metrics(number)) for number in range(1, iterations + 1)]
    run.metrics.write_text("\n".join(lines) + "\n")
    every = max(iterations // 3, 1)
    steps = range(every, iterations + 1, every)
    run.evaluations.write_text("".join(dumps(evaluation(step)) + "\n" for step in steps))
    run.write_evaluation(
        {"base": FIGURES, "base, CFG 2": FIGURES | {"fid": 17.5, "recall": 0.5},
         "tuned": {k: v for k, v in evaluation(iterations).items() if k != "step"}}
    )  # fmt: skip
    for name, step in (("base", 0), (f"step_{every:06d}", every), ("tuned", iterations)):
        write_gallery(run.gallery / f"{name}.png", step)
    for number in range(max(iterations - 2, 1), iterations + 1):
        write_rollouts(run.rollouts / rollout_name(number), rollouts(number))
    write_trace(run, min(iterations, 5))
    run.log.write_text(
        "2026-11-29 00:27:33+0000 INFO learner.run: starting: every role in this process\n"
        "2026-11-29 00:27:34+0000 WARNING learner.experiment: note: iteration 9: for 5 iterations, "
        "all rewards are equal within every group\n"
        "2026-11-29 00:27:35+0000 ERROR learner.run: error: it <b>broke</b>\n"
    )
    return run


def metrics(number: int) -> dict[str, Any]:
    part = 1 - math.exp(-number / 20)
    found: dict[str, Any] = {"iteration": number, "version": number}
    for at, name in enumerate(REWARDS):
        mean = 0.4 + 0.1 * at + 0.2 * part
        found |= {f"reward/{name}": mean, f"reward_std/{name}": 0.2 - 0.1 * part,
                  f"reward_p05/{name}": mean - 0.3, f"reward_p95/{name}": mean + 0.3}  # fmt: skip
    return found | {
        "fid/ema": 9 - 6 * part, "fid/batch": 9.5 - 6 * part, "policy/entropy": 2.6 - 0.2 * part,
        "policy/base_entropy": 2.6, "policy/entropy_coef": 0.001 * part,
        "policy/mismatch_kl": 1e-6 * number, "policy/clip_fraction": 0.01 * part,
        "policy/staleness": float(number > 1), "policy/reference_kl": 0.1 * part,
        "groups/flat": 0, "images/failed": 0, "loss/grad_norm": 3.0 - part, "loss/lr": 1e-4,
        "time/iteration": 1.0 + 0.1 * part, "time/images_per_s": 160 / (1 + 0.1 * part),
        "time/wait_groups": 0.6, "fleet/restarts": 0,
    }  # fmt: skip


def evaluation(step: int) -> dict[str, float]:
    part = 1 - math.exp(-step / 20)
    better = {"fid": 25 - 15 * part, "recall": 0.6 - 0.3 * part, "coverage": 0.45 + 0.2 * part}
    return {"step": step, **FIGURES, **better}


def images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (count, 8, 8, 3), np.uint8)


def write_gallery(path: Path, step: int) -> None:
    """A sheet with the sidecar that says where its cells are and their rewards."""
    rows = [(row, Condition(text=f"digit {row} <script>", class_index=row)) for row in range(ROWS)]
    pictures = [images(COLUMNS, step + row) for row in range(ROWS)]
    clip = 0.1 * np.arange(ROWS)[:, None] + 0.01 * np.arange(COLUMNS) + step / 1000
    gallery = Gallery(rows, pictures, {"clip": clip, "hps": np.full((ROWS, COLUMNS), np.nan)})
    save_gallery(gallery, contact_sheet(pictures), step, path)


def rollouts(number: int) -> pa.Table:
    """16 rollouts in 2 groups; the last could not be scored."""
    rng = np.random.default_rng(number)
    rows = []
    for at in range(16):
        scores = {f"reward_{name}": float(rng.normal()) for name in REWARDS}
        failed = at == 15
        rows.append(
            {"iteration": number, "group": at // 8, "rollout": at % 8, "class_index": at // 8,
             "text": "a <script>alert(1)</script>" if at < 8 else "one",
             "tokens": rng.integers(0, CODES, TOKENS).tolist(), "advantage": 0.0,
             "error": "it failed" if failed else None,
             **(dict.fromkeys(scores, math.nan) if failed else scores)}
        )  # fmt: skip
    return pa.Table.from_pylist(rows, schema=rollout_schema(REWARDS))


def write_trace(run: RunDirectory, iterations: int) -> None:
    trace, usage = Trace(run.trace, resume=False), Usage(1000.0)
    for number in range(iterations):
        start = 1000.0 + number
        spans = [
            Span("sampler-0", "sample", start, start + 0.4),
            Span("sampler-0", "decode", start + 0.3, start + 0.5),
            Span("sampler-1", "sample", start, start + 0.2),
            Span("reward-server", "score", start + 0.5, start + 0.6),
            Span("learner", "learn", start + 0.6, start + 0.9),
            Span("driver", "wait_groups", start, start + 0.6),
        ]
        trace.add(spans)
        usage.add(spans)
        event = {"name": "idle share", "ph": "C", "ts": round((start + 1) * 1e6), "pid": 1}
        shares = {use.role: round(use.idle, 4) for use in usage.shares()}
        trace._write(event | {"args": shares})  # `idle` takes the time now
    trace.close()

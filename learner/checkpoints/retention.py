"""Which checkpoints stay: the newest, some for their age, the best."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from learner.output import OutputConfig


def retained_steps(steps: Iterable[int], output: OutputConfig, best: int | None) -> set[int]:
    """The steps that stay, of all there are."""
    ordered = sorted(steps)
    every = output.keep_every
    staying = {*ordered[-output.keep_checkpoints :]}
    staying |= {step for step in ordered if every and step % every == 0}
    return staying | ({best} & {*ordered} if best is not None else set())


def best_step(figure: str, figures_of: Mapping[int, Mapping[str, float]]) -> int | None:
    """The step with the best value of a figure (distances: the least; the earlier of equals); None
    where none was evaluated.

    Args:
        figures_of: step -> figures of its evaluation.
    """
    sign = 1 if figure.rpartition("/")[2] == "fid" else -1
    found = [
        (sign * values[figure], step)
        for step, values in figures_of.items()
        if math.isfinite(values.get(figure, math.nan))
    ]
    return min(found)[1] if found else None

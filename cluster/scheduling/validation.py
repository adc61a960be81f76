"""Checks answers of workers against their requests. Pure, the same on every fleet.

A wrong shape is a bug of a scorer or sampler that a retry would not fix: it ends the run, with the
worker, what was expected and what was found.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from cluster.errors import DataError, FleetError
from cluster.messages import GroupScores, RolloutGroup, SampleRequest
from cluster.roles import Pictures

SLACK = 1e-4  # rounding: a logprob may exceed 0 by this, an entropy fall below it


class ScoreChecks:
    """Checks the scores of a run: each by itself, and that features keep their length."""

    def __init__(self) -> None:
        self._dims: dict[tuple[str, str, str], int] = {}

    def __call__(
        self,
        scores: GroupScores,
        request: SampleRequest,
        *,
        pool: str,
        worker: str,
        scorers: Collection[str] | None = None,
        spaces: Collection[str] | None = None,
    ) -> None:
        """Check one answer of a reward server.

        Args:
            pool: role of the server.
            worker: name of the server, for the error.
            scorers, spaces: the exact sets of names expected, of scores and of features; None: any.

        Raises:
            FleetError: names server, scorer and fault.
        """
        check_scores(scores, request, worker, scorers, spaces)
        for space, values in scores.features.items():
            if not scores.valid.any():
                continue  # nothing was extracted, so there is no length
            key = (pool, request.panel, space)
            dim = self._dims.setdefault(key, values.shape[1])
            if values.shape[1] != dim:
                raise _wrong(worker, f"features {space!r}", f"{dim} columns", values)


def check_scores(
    scores: GroupScores,
    request: SampleRequest,
    worker: str,
    scorers: Collection[str] | None,
    spaces: Collection[str] | None = None,
) -> None:
    """Check one answer of a reward server by itself; see `ScoreChecks`."""
    count = request.num_rollouts
    if not isinstance(scores, GroupScores):
        raise FleetError(f"{worker} answered with {type(scores).__name__}, expected GroupScores")
    if scores.key != request.key:
        raise FleetError(f"{worker} was asked for {request.key}, and answered {scores.key}")
    if len(scores.errors) != count:
        raise FleetError(
            f"{worker} was given {count} images, and answered for {len(scores.errors)}"
        )
    for what, found, expected in (
        ("scores of", scores.scores, scorers),
        ("features of the spaces", scores.features, spaces),
    ):
        if expected is not None and set(found) != set(expected):
            raise FleetError(
                f"{worker} answered with {what} {', '.join(sorted(found)) or 'none'}, expected "
                f"{', '.join(sorted(expected)) or 'none'}: does it run another configuration?"
            )
    valid = scores.valid
    for name, values in scores.scores.items():
        what = f"scorer {name!r}"
        _array(values, lambda a: a.shape == (count,), "f", f"({count},) float32", worker, what)
        _finite(values[valid], worker, what)
    for space, values in scores.features.items():
        what = f"features {space!r}"
        shape = f"({count}, D) float32"
        _array(values, lambda a: a.ndim == 2 and len(a) == count, "f", shape, worker, what)
        _finite(values[valid], worker, what)
        if valid.any() and not values.shape[1]:
            raise _wrong(worker, what, "at least one column", values)


def check_images(images: Pictures, request: SampleRequest) -> None:
    """Check images that are to be scored.

    Raises:
        DataError: they do not fit the request.
    """
    if len(images) == request.num_rollouts and all(
        image.dtype == np.uint8 and image.ndim == 3 for image in images
    ):
        return
    found = f"{images.shape} {images.dtype}" if isinstance(images, np.ndarray) else len(images)
    raise DataError(
        f"group {request.group} of {request.stream}: expected images "
        f"({request.num_rollouts}, H, W, 3) uint8, or as many of several sizes, found {found}"
    )


def check_rollouts(group: RolloutGroup, request: SampleRequest, worker: str) -> None:
    """Check one answer of a sampler.

    Raises:
        FleetError: what is wrong, and of which sampler.
    """
    if not isinstance(group, RolloutGroup):
        raise FleetError(f"{worker} answered with {type(group).__name__}, expected RolloutGroup")
    if group.request.key != request.key or group.request.spec != request.spec:
        raise FleetError(
            f"{worker} was asked for {request.key} under {request.spec}, and answered "
            f"{group.request.key} under {group.request.spec}"
        )
    count = request.num_rollouts
    shape = f"({count}, T) int32"
    _array(
        group.tokens,
        lambda a: a.ndim == 2 and len(a) == count and a.shape[1] > 0,
        "i",
        shape,
        worker,
        "tokens",
    )
    if group.tokens.min() < 0:
        raise FleetError(f"{worker}: tokens must be >= 0, found {group.tokens.min()}")
    like, same = group.tokens.shape, f"{group.tokens.shape} float32"
    for name in ("logprobs", "entropies"):
        values = getattr(group, name)
        _array(values, lambda a: a.shape == like, "f", same, worker, name)
        _finite(values, worker, name)
    if group.logprobs.max() > SLACK or group.entropies.min() < -SLACK:
        raise FleetError(
            f"{worker}: expected logprobs <= 0 and entropies >= 0, found up to "
            f"{group.logprobs.max():g} and down to {group.entropies.min():g}"
        )


def _array(
    values: Any,
    fits: Callable[[np.ndarray], bool],
    kind: str,
    expected: str,
    worker: str,
    what: str,
) -> None:
    if not isinstance(values, np.ndarray) or values.dtype.kind != kind or not fits(values):
        raise _wrong(worker, what, expected, values)


def _finite(values: np.ndarray, worker: str, what: str) -> None:
    wrong = int((~np.isfinite(values)).sum())
    if wrong:
        raise FleetError(
            f"{worker}, {what}: {wrong} of {values.size} values are not finite, and no error says "
            "why"
        )


def _wrong(worker: str, what: str, expected: str, values: Any) -> FleetError:
    found = type(values).__name__
    if isinstance(values, np.ndarray):
        found = f"{values.shape} {values.dtype}"
    return FleetError(
        f"{worker}, {what}: expected {expected}, found {found}. That is a bug of its author, "
        "which a retry would not fix"
    )

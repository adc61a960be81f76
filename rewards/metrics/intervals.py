"""Bootstrap intervals and paired differences of figures.

Every figure is reduced to a mean over units plus a constant: a figure of a resampled set is its
value plus the mean of the resampled units' influences. For means and shares that is the bootstrap
itself. For figures that are no means, as the FID, influences are jackknife pseudo-values: what the
figure changes by when one unit is left out, times the number of units. Recomputing such a figure on
resampled sets would be wrong as well as slow: repeated images raise an FID by about as much again
as the finite number of images has raised it already, so percentiles lie far above the figure.
Intervals are therefore of the figure that another set of as many images would have on average, bias
included, as published figures are compared. By Efron and Stein (1981) the jackknife's variance is
never too small on average, for any symmetric figure.

Units are taken to be drawn independently. Conditions in fixed numbers each, as of class-conditional
samples, vary less, so that intervals of a single set are somewhat wide. In paired differences what
conditions have in common cancels.

Shapes: U units, F figures, B resamples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.special

Units = Literal["images", "real", "conditions", ""]
HELD = 1 << 20  # units drawn at a time: 8 MiB
TAIL = 0.025  # outside a 95 % interval, on either side


@dataclass(frozen=True)
class Estimate:
    """A figure, and how much each unit contributes to it."""

    value: float
    units: Units = ""
    """What is resampled: generated images, real images (given the generated ones), or conditions;
    "": nothing, the figure has no interval."""
    influences: np.ndarray | None = None
    """(U,) float64, deviations of zero mean; None where `units` is ""."""


@dataclass(frozen=True)
class Figure:
    """A figure with its 95 % bootstrap interval."""

    value: float
    low: float
    """NaN where the figure has no interval."""
    high: float


@dataclass(frozen=True)
class Difference:
    """The second set's figure minus the first's."""

    value: float
    low: float
    """Of the 95 % bootstrap interval; NaN where the figure has none."""
    high: float
    p_value: float
    """Two-sided: below 0.05 where the interval excludes 0; NaN where the figure has no interval."""
    paired: bool
    """Whether the same units of both sets were resampled together; else each set was on its own,
    and the interval is wider."""


def mean_estimate(values: np.ndarray, units: Units, value: float | None = None) -> Estimate:
    """The mean of (U,) values of units.

    Args:
        value: the mean, where the caller computes it in a particular precision.
    """
    exact = values.astype(np.float64)
    mean = float(exact.mean())
    return Estimate(mean if value is None else value, units, exact - mean)


def intervals(estimates: Mapping[str, Estimate], resamples: int, seed: int) -> dict[str, Figure]:
    """95 % intervals of figures, from `resamples` (0: none) bootstrap resamples."""
    drawn = _resampled(estimates, resamples, (seed, 0))
    figures = {}
    for name, estimate in estimates.items():
        low = high = np.nan
        if name in drawn:
            low, high = _interval(drawn[name], _count(estimate))
        figures[name] = Figure(estimate.value, estimate.value + low, estimate.value + high)
    return figures


def differences(
    first: Mapping[str, Estimate],
    second: Mapping[str, Estimate],
    paired: Mapping[Units, bool],
    resamples: int,
    seed: int,
) -> dict[str, Difference]:
    """Differences of the figures that both have, with intervals.

    Args:
        paired: units -> whether unit i is the same in both sets.
    """
    names = [name for name in first if name in second]
    alike = {name for name in names if paired.get(second[name].units, False)}
    together = {
        name: Estimate(
            second[name].value - first[name].value,
            second[name].units,
            _both(first[name].influences, second[name].influences),
        )
        for name in alike
    }
    drawn = _resampled(together, resamples, (seed, 0))
    apart = [
        _resampled({name: own[name] for name in names if name not in alike}, resamples, (seed, at))
        for at, own in enumerate((first, second))
    ]
    found = {}
    for name in names:
        value = second[name].value - first[name].value
        low = high = p_value = np.nan
        if name in drawn or name in apart[1]:
            units = min(_count(first[name]), _count(second[name]))
            gaps = drawn[name] if name in drawn else apart[1][name] - apart[0][name]
            low, high = _interval(gaps, units)
            p_value = _p_value(value, gaps, units)
        found[name] = Difference(value, value + low, value + high, p_value, name in alike)
    return found


def _both(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    return None if first is None or second is None else second - first


def _count(estimate: Estimate) -> int:
    return 0 if estimate.influences is None else len(estimate.influences)


def _resampled(
    estimates: Mapping[str, Estimate], resamples: int, key: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Name -> (B,) deviations of resampled figures, of those that have units.

    Figures of the same units see the same resamples.
    """
    found: dict[str, np.ndarray] = {}
    of_units: dict[tuple[str, int], dict[str, np.ndarray]] = {}
    for name, estimate in estimates.items():
        if resamples and estimate.influences is not None and len(estimate.influences) > 1:
            alike = of_units.setdefault((estimate.units, len(estimate.influences)), {})
            alike[name] = estimate.influences
    for (units, count), columns in of_units.items():
        generator = np.random.default_rng([*key, *units.encode()])
        influences = np.stack(list(columns.values()), axis=1)
        means, size = np.empty((resamples, len(columns))), max(HELD // count, 1)
        for at in range(0, resamples, size):
            rows = np.arange(min(size, resamples - at))[:, None]
            taken = generator.integers(count, size=(len(rows), count)) + rows * count
            times = np.bincount(taken.ravel(), minlength=len(rows) * count)
            means[at : at + size] = times.reshape(len(rows), count) @ influences / count
        found |= dict(zip(columns, means.T))
    return found


def _interval(deviations: np.ndarray, units: int) -> tuple[float, float]:
    """Quantiles of resampled deviations, expanded for few units (Hesterberg 2015, 1411.5279).

    Resampled means of U units vary less than means of U fresh ones, by (U - 1) / U, and the
    variance is itself estimated: expanded quantiles are those of Student's t.
    """
    quantile = scipy.special.stdtrit(units - 1, TAIL) * (units / (units - 1)) ** 0.5
    share = scipy.special.ndtr(quantile)
    low, high = np.quantile(deviations, [share, 1 - share])
    return float(low), float(high)


def _p_value(value: float, deviations: np.ndarray, units: int) -> float:
    """Twice the smaller share of resampled differences beyond 0, widened as the intervals are."""
    sides = ((value + deviations <= 0).sum(), (value + deviations >= 0).sum())
    share = min((1 + min(sides)) / (1 + len(deviations)), 0.5)
    quantile = scipy.special.ndtri(share) * ((units - 1) / units) ** 0.5
    return float(2 * scipy.special.stdtr(units - 1, quantile))

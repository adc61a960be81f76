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
Sources = Mapping[Units, np.ndarray]
HELD = 1 << 20  # units drawn at a time: 8 MiB
TAIL = 0.025  # outside a 95 % interval, on either side


@dataclass(frozen=True)
class Estimate:
    """A figure, and how much each unit contributes to it."""

    value: float
    units: Units = ""
    """What is resampled: generated images, real images, or conditions; "": nothing, the figure has
    no interval."""
    influences: np.ndarray | None = None
    """(U,) float64, deviations of zero mean; None where `units` is ""."""
    of_images: np.ndarray | None = None
    """Influences of generated images, where `units` is "real" and the figure varies with both."""

    @property
    def sources(self) -> dict[Units, np.ndarray]:
        """Units -> influences; sources are independent, and their deviations add."""
        found: dict[Units, np.ndarray | None] = {"images": self.of_images}
        found[self.units] = self.influences
        return {units: array for units, array in found.items() if array is not None}


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
    and the interval is wider. Where a figure varies with two kinds of units: both."""


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
    sources = {name: estimate.sources for name, estimate in estimates.items()}
    drawn = _resampled(sources, resamples, (seed, 0))
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
    together: dict[str, Sources] = {}
    apart: tuple[dict[str, Sources], dict[str, Sources]] = ({}, {})
    for name in names:
        ours, theirs = first[name].sources, second[name].sources
        alike = [units for units in theirs if units in ours and paired.get(units, False)]
        together[name] = {units: theirs[units] - ours[units] for units in alike}
        for into, sources in zip(apart, (ours, theirs)):
            into[name] = {units: sources[units] for units in sources if units not in alike}
    drawn = _resampled(together, resamples, (seed, 0))
    of_first, of_second = (_resampled(own, resamples, (seed, at)) for at, own in enumerate(apart))
    found = {}
    for name in names:
        value = second[name].value - first[name].value
        low = high = p_value = np.nan
        if name in drawn or name in of_second:
            units = min(_count(first[name]), _count(second[name]))
            none = np.zeros(resamples)
            gaps = drawn.get(name, none) + of_second.get(name, none) - of_first.get(name, none)
            low, high = _interval(gaps, units)
            p_value = _p_value(value, gaps, units)
        all_paired = bool(together[name]) and not apart[1][name]
        found[name] = Difference(value, value + low, value + high, p_value, all_paired)
    return found


def _count(estimate: Estimate) -> int:
    return min((len(influences) for influences in estimate.sources.values()), default=0)


def _resampled(
    estimates: Mapping[str, Sources], resamples: int, key: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Name -> (B,) deviations of resampled figures, of those that have units.

    Figures of the same units see the same resamples.
    """
    found: dict[str, np.ndarray] = {}
    of_units: dict[tuple[Units, int], dict[str, np.ndarray]] = {}
    for name, sources in estimates.items():
        for units, influences in sources.items():
            if resamples and len(influences) > 1:
                of_units.setdefault((units, len(influences)), {})[name] = influences
    for (units, count), columns in of_units.items():
        generator = np.random.default_rng([*key, *units.encode()])
        influences = np.stack(list(columns.values()), axis=1)
        means, size = np.empty((resamples, len(columns))), max(HELD // count, 1)
        for at in range(0, resamples, size):
            rows = np.arange(min(size, resamples - at))[:, None]
            taken = generator.integers(count, size=(len(rows), count)) + rows * count
            times = np.bincount(taken.ravel(), minlength=len(rows) * count)
            means[at : at + size] = times.reshape(len(rows), count) @ influences / count
        for name, deviations in zip(columns, means.T):
            found[name] = found[name] + deviations if name in found else deviations
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

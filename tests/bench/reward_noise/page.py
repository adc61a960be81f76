"""Tables of rewards/window-and-batch.md, from the bench's CSV.

Each stands between `<!-- table NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from rewards.distribution.config import FOR_VARIANCES, PER_DIMENSION
from tests.bench.reward_noise.results import Results

PAGE = Path(__file__).parents[3] / "rewards" / "window-and-batch.md"
SPACES = {
    "full": "full",
    "diagonal": "diagonal",
    "pca-256": "full, 256 dimensions",
    "pca-512": "full, 512 dimensions",
}
PUBLIC = 432  # images: decay .5 at 144 an iteration
DIM = 2048
STRENGTHS = (1.0, 0.5)
SHOWN = (1000, 5000, 10000, 50000)  # windows
PLACE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def write_page(results: Results, page: Path = PAGE) -> None:
    """Replace every table of the page."""
    page.write_text(with_tables(page.read_text(encoding="utf-8"), results), encoding="utf-8")


def with_tables(text: str, results: Results) -> str:
    """The text with its tables made again.

    Raises:
        KeyError: an unknown table, or a row that the CSV lacks.
    """
    return PLACE.sub(lambda found: found[1] + TABLES[found[2]](results) + found[3], text)


class Figures:
    """Of one part of the results, at one number of dimensions and exponent."""

    def __init__(
        self,
        results: Results,
        part: str,
        dim: int = DIM,
        exponent: float = 1.0,
        strength: float = 1.0,
    ) -> None:
        kind = part, dim, exponent, strength
        self._values = {
            (row.job.batch, row.job.window, row.job.iterations, row.space, row.figure): row.value
            for row in results.rows
            if row.job.key[:4] == kind
        }

    def __call__(
        self,
        space: str,
        batch: int,
        window: int,
        iterations: int,
        figure: str = "correlation",
    ) -> float:
        return self._values[batch, window, iterations, space, figure]

    def of_mixture(self, figure: str, space: str = "") -> float:
        return self._values[0, 0, 0, space, figure]

    def settings(self) -> list[tuple[int, int, int]]:
        """Batch, window, run: those with correlations."""
        return sorted({key[:3] for key in self._values if key[4] == "correlation"})

    def windows(self, batch: int) -> list[int]:
        return sorted({window for n, window, _ in self.settings() if n == batch})

    def noise(self, space: str, batch: int, window: int) -> float:
        """noise / (n signal) of a policy that stays."""
        best = self.of_mixture("population_correlation", space)
        return (best / self(space, batch, window, 0)) ** 2 - 1


class Expected:
    """Correlations by arithmetic, with the noise times what simulations show beyond first order."""

    def __init__(self, results: Results) -> None:
        self.first = Figures(results, "arithmetic")
        self.factors = noise_factors(results)

    def __call__(self, space: str, batch: int, window: int, iterations: int) -> float:
        known = self.first(space, batch, window, iterations)
        if space != "full":
            return known
        noise = self.first.noise(space, batch, window)
        factor = np.interp(np.log(window), np.log(list(self.factors)), list(self.factors.values()))
        return float(known * ((1 + noise) / (1 + factor * noise)) ** 0.5)

    def best(self, space: str, batch: int, iterations: int) -> int:
        """The window with the highest correlation."""
        windows = self.first.windows(batch)
        return max(windows, key=lambda w: self(space, batch, w, iterations))

    def nearest(self, batch: int, window: float) -> int:
        return min(self.first.windows(batch), key=lambda w: abs(w - window))


def noise_factors(results: Results) -> dict[int, float]:
    """Window -> noise of the full covariance in simulations of a policy that stays, over that of
    first order: the mean over strengths."""
    found: dict[int, list[float]] = {}
    for strength in STRENGTHS:
        known = Figures(results, "arithmetic", strength=strength)
        simulated = Figures(results, "simulation", strength=strength)
        for batch, window, run in simulated.settings():
            if (batch, run) == (144, 0):
                noise = simulated("full", batch, window, run) ** -2 - 1
                found.setdefault(window, []).append(noise / known.noise("full", batch, window))
    return {window: sum(values) / len(values) for window, values in sorted(found.items())}


def gpus(results: Results) -> str:
    expected = Expected(results)

    def best(space: str, batch: int, run: int) -> str:
        window = expected.best(space, batch, run)
        return f"{window:,}: {share(expected(space, batch, window, run), 3)}"

    rows = []
    for row in results.rows:
        if row.job.part == "plan":
            batch = row.job.batch
            usual = expected.nearest(batch, PER_DIMENSION * DIM)
            rows.append(
                [str(row.job.dim), f"{batch:,}", f"{row.value:.1f}", "full"]
                + [best("full", batch, run) for run in (300, 100, 30)]
                + [share(expected("full", batch, usual, run), 3) for run in (300, 30)]
                + [best("diagonal", batch, 300)]
            )
    return table(
        "GPUs, N, s an iteration, covariance, best window in 300, in 100, in 30, 10\u202f000 in "
        "300, in 30, best diagonal in 300",
        rows,
    )


def windows(results: Results) -> str:
    expected = Expected(results)
    columns = [
        (space, batch, run)
        for space in ("full", "diagonal")
        for batch, run in ((144, 0), (144, 300), (144, 100), (1152, 100), (1152, 30))
    ]
    header = ["window", *(f"{space} {batch} / {run or 'none'}" for space, batch, run in columns)]
    rows = [
        [f"{window:,}"]
        + [
            share(expected(space, batch, window, run), 3) if window >= batch else ""
            for space, batch, run in columns
        ]
        for window in expected.first.windows(144)
    ]
    return table(", ".join(header), rows)


def defaults(results: Results) -> str:
    expected = Expected(results)

    def cell(space: str, batch: int, window: int, run: int) -> str:
        return f"{window:,}: {share(expected(space, batch, window, run), 3)}"

    rows = []
    for batch, run in ((144, 0), (144, 300), (144, 100), (1152, 300), (1152, 100), (1152, 30)):
        best = expected.best("full", batch, run)
        full = expected.nearest(batch, PER_DIMENSION * DIM)
        variances = expected.nearest(batch, FOR_VARIANCES)
        rows.append(
            [f"{batch:,}", str(run or "none")]
            + [cell("full", batch, best, run), cell("full", batch, full, run)]
            + [cell("diagonal", batch, variances, run)]
            + [
                cell(space, batch, PUBLIC, run) if batch <= PUBLIC else ""
                for space in ("diagonal", "full")
            ]
        )
    return table(
        "N, drift, full: best, full: default, diagonal: default, public code's, "
        "with full covariance",
        rows,
    )


def factors(results: Results) -> str:
    found = noise_factors(results)
    rows = [[f"{window:,}", f"{window / DIM:.1f}", f"{f:.1f}"] for window, f in found.items()]
    return table("window, images a dimension, noise over first order", rows)


def simulated(results: Results) -> str:
    rows = []
    expected = Expected(results)
    for strength in STRENGTHS:
        known = Figures(results, "arithmetic", strength=strength)
        found = Figures(results, "simulation", strength=strength)
        for at in sorted(found.settings(), key=lambda s: (s[2], s[0], s[1])):
            batch, window, run = at
            with_factor = share(expected("full", *at)) if strength == 1 else ""
            cells = [f"{strength:.1f}", f"{batch:,}", f"{window:,}", str(run or "none")]
            cells += [
                f"{share(found(space, *at))} ({share(known(space, *at))})"
                for space in ("full", "diagonal", "pca-512")
            ]
            cells.insert(5, with_factor)
            for figure in ("auc_rare", "auc_faulty", "sign_faulty"):
                pair = (found(space, *at, figure) for space in ("full", "diagonal"))
                cells.append(" / ".join(map(share, pair)))
            rows.append(cells)
    return table(
        "strength, N, window, drift, full, with factor, diagonal, full in 512, rare: AUC, "
        "faulty: AUC, faulty: sign",
        rows,
    )


def spaces(results: Results) -> str:
    kinds = {
        (row.job.exponent, row.job.strength)
        for row in results.rows
        if (row.job.part, row.job.dim) == ("arithmetic", DIM)
    }
    rows = []
    for exponent, strength in sorted(kinds):
        known = Figures(results, "arithmetic", exponent=exponent, strength=strength)
        for space, name in SPACES.items():
            best = known.of_mixture("population_correlation", space)
            ratio = known.of_mixture("noise", space) / known.of_mixture("signal", space)
            rows.append(
                [
                    f"{exponent:.1f}",
                    f"{strength:.1f}",
                    f"{known.of_mixture('fid_now'):.1f}",
                    name,
                    share(best),
                    f"{ratio:,.0f}",
                ]
                + [share(known(space, 144, window, 0)) for window in SHOWN]
            )
    columns = ", ".join(f"W = {window}" for window in SHOWN)
    return table(f"exponent, strength, FID, covariance, no noise, noise / signal, {columns}", rows)


def smaller(results: Results) -> str:
    """Simulation less arithmetic at 256 dimensions."""
    known = Figures(results, "arithmetic", 256)
    found = Figures(results, "simulation", 256)
    rows = []
    for space in ("full", "diagonal", "diagonal-aligned", "pca-64"):
        for run in (0, 100):
            gaps = [
                found(space, *at) - known(space, *at)
                for at in found.settings()
                if at[2] == run and at[1] >= 2 * at[0]
            ]
            if not gaps:
                continue
            worst = max(gaps, key=abs)
            mean = sum(gaps) / len(gaps)
            rows.append(
                [space, str(run or "none"), str(len(gaps)), f"{mean:+.3f}", f"{worst:+.3f}"]
            )
    return table("covariance, drift, settings, mean difference, largest", rows)


def share(value: float, digits: int = 2) -> str:
    """.93"""
    return f"{value:.{digits}f}".removeprefix("0")


def table(header: str, rows: Iterable[Sequence[str]]) -> str:
    names = header.split(", ")
    lines = [names, ["---"] * len(names), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


TABLES: dict[str, Callable[[Results], str]] = {
    "gpus": gpus,
    "windows": windows,
    "defaults": defaults,
    "simulated": simulated,
    "spaces": spaces,
    "factors": factors,
    "smaller": smaller,
}

"""Tables of rewards/window-and-batch.md, from the bench's CSV.

Each stands between `<!-- table NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

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

    def best(self, space: str, batch: int, iterations: int) -> int:
        """The window with the highest correlation."""
        return max(self.windows(batch), key=lambda w: self(space, batch, w, iterations))


def gpus(results: Results) -> str:
    known = Figures(results, "arithmetic")
    rows = []
    for row in sorted(
        (row for row in results.rows if row.job.part == "plan"), key=lambda row: row.job.dim
    ):
        batch, cells = row.job.batch, []
        for run in (300, 100):
            space = max(
                ("full", "diagonal"),
                key=lambda s: known(s, batch, known.best(s, batch, run), run),
            )
            window = known.best(space, batch, run)
            cells += [f"{window:,} {space}", share(known(space, batch, window, run))]
        diagonal = known.best("diagonal", batch, 300)
        cells += [f"{diagonal:,}", share(known("diagonal", batch, diagonal, 300))]
        rows.append([str(row.job.dim), f"{batch:,}", f"{row.value:.1f}", *cells])
    return table(
        "GPUs, images an iteration, s an iteration, window in 300 iterations, correlation, "
        "window in 100, correlation, diagonal: window in 300, correlation",
        rows,
    )


def windows(results: Results) -> str:
    known = Figures(results, "arithmetic")
    columns = [
        (space, batch, run)
        for space in ("full", "diagonal")
        for batch, run in ((144, 0), (144, 300), (144, 100), (1152, 100), (1152, 30))
    ]
    header = ["window", *(f"{space} {batch:,}, {run or 'none'}" for space, batch, run in columns)]
    rows = [
        [f"{window:,}"]
        + [
            share(known(space, batch, window, run)) if window >= batch else ""
            for space, batch, run in columns
        ]
        for window in known.windows(144)
    ]
    return table("|".join(header).replace(", ", " / ").replace("|", ", "), rows)


def defaults(results: Results) -> str:
    known = Figures(results, "arithmetic")

    def nearest(batch: int, window: int) -> int:
        return min(known.windows(batch), key=lambda w: abs(w - window))

    rows = []
    for batch, run in ((144, 0), (144, 300), (144, 100), (1152, 300), (1152, 100), (1152, 30)):
        full = nearest(batch, PER_DIMENSION * DIM)
        variances = nearest(batch, FOR_VARIANCES)
        best = known.best("full", batch, run)
        rows.append(
            [
                f"{batch:,}",
                str(run or "none"),
                f"{best:,}: {share(known('full', batch, best, run))}",
                f"{full:,}: {share(known('full', batch, full, run))}",
                f"{variances:,}: {share(known('diagonal', batch, variances, run))}",
                share(known("diagonal", batch, PUBLIC, run)) if batch <= PUBLIC else "",
                share(known("full", batch, PUBLIC, run)) if batch <= PUBLIC else "",
            ]
        )
    return table(
        "N, drift, best full, default full, default diagonal, 432 diagonal, 432 full", rows
    )


def simulated(results: Results) -> str:
    rows = []
    for strength in sorted({row.job.strength for row in results.rows}, reverse=True):
        known = Figures(results, "arithmetic", strength=strength)
        found = Figures(results, "simulation", strength=strength)
        for at in sorted(found.settings(), key=lambda s: (s[2], s[0], s[1])):
            batch, window, run = at
            cells = [f"{strength:.1f}", f"{batch:,}", f"{window:,}", str(run or "none")]
            cells += [
                f"{share(found(space, *at))} ({share(known(space, *at))})"
                for space in ("full", "diagonal", "pca-512")
            ]
            for figure in ("auc_rare", "auc_faulty", "sign_faulty"):
                pair = (found(space, *at, figure) for space in ("full", "diagonal"))
                cells.append(" / ".join(map(share, pair)))
            rows.append(cells)
    return table(
        "strength, N, window, drift, full, diagonal, full in 512, rare: AUC, faulty: AUC, "
        "faulty: sign",
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


def share(value: float) -> str:
    """.93"""
    text = f"{value:.2f}"
    return text.removeprefix("0") if value < 0.995 else text


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
    "smaller": smaller,
}

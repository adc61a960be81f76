"""Orders of the code grid's tokens in taming's transformers.

A permutation is a table `forward` of raster indices in sequence order: `sequence =
raster[forward]`, `raster = sequence[backward]` of its inverse. Names and tables are those of
taming's permuter classes, so that checkpoints fit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cluster.errors import ConfigError

Cells = np.ndarray
"""(T,) int64: raster indices in the order of the sequence."""


def permutation(name: str, grid: int) -> Tensor:
    """The order `name` of a grid x grid raster: (T,) int64 raster indices, in sequence order.

    Raises:
        ConfigError: no such order, or none for this size.
    """
    if name not in ORDERS:
        raise ConfigError(f"permuter {name!r} is unknown: choose one of {', '.join(ORDERS)}")
    if grid < 1:
        raise ConfigError(f"grid must be >= 1, found {grid}")
    return torch.from_numpy(ORDERS[name](grid).astype(np.int64))


def inverse(forward: Tensor) -> Tensor:
    """(T,) the table that undoes `forward`."""
    return forward.argsort()


def _rows(grid: int) -> Cells:
    return np.arange(grid * grid)


def _boustrophedon(grid: int) -> Cells:
    """Row by row, every second one backwards."""
    raster = np.arange(grid * grid).reshape(grid, grid)
    raster[1::2] = raster[1::2, ::-1].copy()
    return raster.ravel()


def _quadrants(grid: int) -> Cells:
    """Morton order: a quadrant after the other, each in the same order inside."""
    return _by_bits(grid, range(_bits(grid, "ZCurve")))


def _coarse_to_fine(grid: int) -> Cells:
    """Every other cell of every other row first: Morton order with the bits of row and column
    reversed, so that cells close in the sequence are far apart in the raster."""
    return _by_bits(grid, range(_bits(grid, "Subsample"))[::-1])


def _spiral_out(grid: int) -> Cells:
    """From the lower left of the four central cells: up, right, down, left, in runs of
    1, 1, 2, 2, 3, 3, ... cells."""
    if grid % 2:
        raise ConfigError(f"the permuters SpiralOut and SpiralIn need an even grid, found {grid}")
    steps = [(-1, 0), (0, 1), (1, 0), (0, -1)]
    cell = np.array([grid // 2, grid // 2 - 1])
    cells = [cell]
    for run in range(2 * grid - 1):
        for _ in range(min(run // 2 + 1, grid - 1)):
            cell = cell + steps[run % 4]
            cells.append(cell)
    rows, columns = np.stack(cells, axis=1)
    return rows * grid + columns


def _spiral_in(grid: int) -> Cells:
    return _spiral_out(grid)[::-1].copy()


def _shuffled(grid: int) -> Cells:
    # NumPy's legacy generator, whose stream is fixed: checkpoints depend on this draw.
    return np.random.RandomState(1).permutation(grid * grid)


def _bits(grid: int, name: str) -> int:
    if grid & (grid - 1):
        raise ConfigError(f"the permuter {name} needs a grid that is a power of two, found {grid}")
    return grid.bit_length() - 1


def _by_bits(grid: int, ranks: range) -> Cells:
    """Cells ordered by the interleaved bits of row and column.

    Args:
        ranks: the weight of each bit, lowest bit first; at equal rank the row's counts more.
    """
    rows, columns = np.divmod(np.arange(grid * grid), grid)
    places = np.zeros(grid * grid, dtype=np.int64)
    for bit, rank in enumerate(ranks):
        places |= (rows >> bit & 1) << (2 * rank + 1) | (columns >> bit & 1) << (2 * rank)
    return places.argsort()


ORDERS: dict[str, Callable[[int], Cells]] = {
    "Identity": _rows,
    "Subsample": _coarse_to_fine,
    "ZCurve": _quadrants,
    "SpiralOut": _spiral_out,
    "SpiralIn": _spiral_in,
    "Random": _shuffled,
    "AlternateParsing": _boustrophedon,
}

"""Files of chosen rollouts: contact sheets labelled with their figures, PNGs, tables."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw, ImageFont

from cluster.io.strict_json import dumps
from cluster.program.streams import printable
from learner.rollouts.selection import column_of, figure_names
from learner.rollouts.shown import name_of, number, shown_condition

COLUMNS, ROWS = 8, 6
"""Most images of a sheet, across and down."""
SHEET = COLUMNS * ROWS
CELL = 120  # pixels: least width, which the labels need; small images are enlarged
LARGEST = 256  # pixels, of an image; larger ones are reduced
LINE, GAP = 14, 6
LETTERS = CELL // 7
JSON, CSV = "rollouts.json", "rollouts.csv"


def write_sheets(folder: Path, rows: pa.Table, images: np.ndarray, before: int = 0) -> int:
    """Write sheet_001.png and so on; returns how many.

    Args:
        images: (N, H, W, 3) uint8, of the rows.
        before: sheets that are there.
    """
    labels = [_labels(rows, row) for row in rows.to_pylist()]
    starts = range(0, len(images), SHEET)
    for sheet, start in enumerate(starts, before + 1):
        part = slice(start, start + SHEET)
        _sheet(images[part], labels[part]).save(folder / f"sheet_{sheet:03d}.png")
    return len(starts)


def _labels(rows: pa.Table, row: Mapping[str, Any]) -> list[str]:
    """Lines below an image: which rollout, its condition, its figures."""
    figures = [f"{name} {number(row[column_of(rows, name)])}" for name in figure_names(rows)]
    failed = ["not scored"] if row["error"] else []
    return [name_of(row), shown_condition(row, LETTERS), *failed, *figures]


def _sheet(images: np.ndarray, labels: Sequence[Sequence[str]]) -> Image.Image:
    _, height, width, _ = images.shape
    scale = max(1, -(-CELL // width)) if width < CELL else min(1.0, LARGEST / max(height, width))
    shown = (max(1, round(width * scale)), max(1, round(height * scale)))
    lines = max(map(len, labels))
    cell = max(shown[0], CELL) + GAP, shown[1] + lines * LINE + 2 * GAP
    columns = min(COLUMNS, len(images))
    down = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * cell[0] + GAP, down * cell[1] + GAP), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    for at, (pixels, texts) in enumerate(zip(images, labels)):
        left, top = GAP + at % columns * cell[0], GAP + at // columns * cell[1]
        canvas.paste(Image.fromarray(pixels).resize(shown, how), (left, top))
        for line, text in enumerate(texts):
            place = left, top + shown[1] + 2 + line * LINE
            draw.text(place, printable(text), fill="black", font=font)
    return canvas


def write_images(folder: Path, rows: pa.Table, images: np.ndarray) -> None:
    """Write each image as ITERATION.GROUP.ROLLOUT.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for row, pixels in zip(rows.to_pylist(), images, strict=True):
        Image.fromarray(pixels).save(folder / f"{name_of(row)}.png")


def write_tables(folder: Path, rows: pa.Table, run: Path) -> None:
    """Write the rows as CSV and as JSON; the JSON comes last, and marks the folder as complete."""
    listed = rows.to_pylist()
    with (folder / CSV).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows.column_names)
        writer.writeheader()
        writer.writerows(listed)
    text = dumps({"run": str(run), "rollouts": listed}, indent=1, ensure_ascii=False)
    (folder / JSON).write_text(printable(text) + "\n", encoding="utf-8")

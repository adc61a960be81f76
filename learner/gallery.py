"""Contact sheets: one row a class, always from the same random numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from actors.sample_files import Grid
from cluster.fleet import Fleet
from cluster.messages import SampleRequest
from learner.config import RunConfig

SMALLEST_CELL = 32  # pixels: small images are enlarged to be seen
LARGEST_SHEET = 1600  # pixels: large ones are reduced
MAX_ROWS = 16
MARGIN = 12
TITLE = 20


def sample_gallery(config: RunConfig, fleet: Fleet) -> list[np.ndarray]:
    """Rows of images (K, H, W, 3) uint8 of the policy that the fleet now holds."""
    requests = [
        SampleRequest(
            stream="gallery",
            iteration=0,
            group=group,
            condition=condition,
            num_rollouts=config.output.gallery_columns,
            seed=config.seed,
            spec=config.sampling,
        )
        for group, condition in enumerate(config.conditions.conditions()[:MAX_ROWS])
    ]
    return fleet.sample_images(requests)


def contact_sheet(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of images (K, H, W, 3) uint8 -> one image (R, C, 3) uint8."""
    columns, height, width, _ = rows[0].shape
    grid = Grid(len(rows), columns, height, width, SMALLEST_CELL)
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            grid.put(row, column, image)
    return grid.pixels


def save_sheet(sheet: np.ndarray, path: Path) -> None:
    """Write a contact sheet, reduced if it is very large."""
    image = Image.fromarray(sheet)
    image.thumbnail((LARGEST_SHEET, LARGEST_SHEET))
    image.save(path)


def save_side_by_side(sheets: Mapping[str, Path], path: Path) -> None:
    """Contact sheets next to each other, each under its title."""
    images = {title: Image.open(sheet) for title, sheet in sheets.items()}
    width = sum(image.width for image in images.values()) + MARGIN * (len(images) - 1)
    height = max(image.height for image in images.values()) + TITLE
    canvas = Image.new("RGB", (width, height), "white")
    draw, left = ImageDraw.Draw(canvas), 0
    for title, image in images.items():
        draw.text((left + 4, 3), title, fill="black", font=ImageFont.load_default(13))
        canvas.paste(image, (left, TITLE))
        left += image.width + MARGIN
    canvas.save(path)

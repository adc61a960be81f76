"""Galleries: contact sheets with one row a class or caption, always from the same random numbers.

With more conditions than rows, a sheet says how many it shows, and labels its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from actors.sample_files import Grid
from cluster.errors import ConfigError
from cluster.fleet import Fleet
from cluster.messages import Condition, SampleRequest
from learner.config import RunConfig

Row = tuple[int, Condition]
"""Class index, or number of the caption in its file, and the condition."""
SMALLEST_CELL = 32  # pixels: small images are enlarged to be seen
LARGEST_SHEET = 1600  # pixels: large ones are reduced
MAX_ROWS = 16
MARGIN = 12
TITLE = 20
LABEL = 180  # pixels, of a row's label
LETTERS = 26  # of it


def gallery_rows(config: RunConfig) -> list[Row]:
    """Rows of the galleries: those of `output.gallery_rows`, or up to 16 evenly spaced conditions.

    Raises:
        ConfigError: no such class or caption.
    """
    conditions = config.conditions.conditions()
    numbers = [at if c.class_index is None else c.class_index for at, c in enumerate(conditions)]
    there = dict(zip(numbers, conditions))
    if chosen := config.output.gallery_rows:
        if absent := [number for number in chosen if number not in there]:
            what = "captions" if config.conditions.captions else "classes"
            raise ConfigError(
                f"output.gallery_rows: expected {what} of the run, from {min(there)} to "
                f"{max(there)}, found {', '.join(map(str, absent))}"
            )
        return [(number, there[number]) for number in chosen]
    step = max(len(numbers) / MAX_ROWS, 1.0)
    shown = [numbers[int(row * step)] for row in range(min(len(numbers), MAX_ROWS))]
    return [(number, there[number]) for number in shown]


def shown_note(config: RunConfig) -> str:
    """'16 of 1000 classes', or empty if galleries show all conditions."""
    shown, there = len(gallery_rows(config)), len(config.conditions.conditions())
    what = "captions" if config.conditions.captions else "classes"
    return f"{shown} of {there} {what}" if shown < there else ""


def sample_gallery(config: RunConfig, fleet: Fleet) -> list[np.ndarray]:
    """Rows of images (K, H, W, 3) uint8 of the current policy."""
    rows = gallery_rows(config)
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
        for group, (_, condition) in enumerate(rows)
    ]
    return fleet.sample_images(requests)


def gallery_sheet(config: RunConfig, images: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of `sample_gallery` as one image (R, C, 3) uint8, labelled if some are not shown."""
    sheet, note = contact_sheet(images), shown_note(config)
    return labelled(sheet, note, [label(*row) for row in gallery_rows(config)]) if note else sheet


def label(number: int, condition: Condition) -> str:
    """Label of a row: its number for `output.gallery_rows`, and its text."""
    text = f"{number} {condition.text}"
    return text if len(text) <= LETTERS else f"{text[: LETTERS - 3]}..."


def labelled(sheet: np.ndarray, title: str, labels: Sequence[str]) -> np.ndarray:
    """A contact sheet with a title, and a label at the left of each row."""
    height, width, _ = sheet.shape
    canvas = Image.new("RGB", (width + LABEL, height + TITLE), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    draw.text((4, 3), title, fill="black", font=font)
    for row, text in enumerate(labels):
        middle = TITLE + (row + 0.5) * height / len(labels)
        draw.text((4, middle), text, fill="black", font=font, anchor="lm")
    canvas.paste(Image.fromarray(sheet), (LABEL, TITLE))
    return np.asarray(canvas)


def contact_sheet(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of images (K, H, W, 3) uint8 -> one image (R, C, 3) uint8."""
    columns, height, width, _ = rows[0].shape
    grid = Grid(len(rows), columns, height, width, SMALLEST_CELL)
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            grid.put(row, column, image)
    return grid.pixels


def save_sheet(sheet: np.ndarray, path: Path) -> None:
    """Write a contact sheet, downscaled if it is very large."""
    image = Image.fromarray(sheet)
    image.thumbnail((LARGEST_SHEET, LARGEST_SHEET))
    image.save(path)


def save_side_by_side(sheets: Mapping[str, Path], path: Path) -> None:
    """Write contact sheets side by side, each under its title."""
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

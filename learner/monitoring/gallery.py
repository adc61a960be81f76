"""Galleries: contact sheets with one row a class or caption, always from the same random numbers.

With more conditions than rows, a sheet says how many it shows, and labels its rows. Beside each
sheet, NAME.json says where its images are, what they show, and their rewards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from actors.sample_files import GAP, Grid
from cluster.errors import ConfigError
from cluster.fleet import Fleet
from cluster.io.files import replacing
from cluster.io.strict_json import dumps
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


@dataclass(frozen=True)
class Gallery:
    """R rows of K images of one policy."""

    rows: Sequence[Row]
    images: Sequence[np.ndarray]
    """Of each row: (K, H, W, 3) uint8."""
    scores: Mapping[str, np.ndarray]
    """Scorer of the rewards -> (R, K) float32; NaN for an image that could not be scored."""


@dataclass(frozen=True)
class Sheet:
    """A contact sheet, and where its images are."""

    pixels: np.ndarray
    """(height, width, 3) uint8."""
    left: float
    top: float
    """Of the first cell, pixels."""
    cell: tuple[float, float]
    """Width and height of a cell, an image with half of the gaps around it, pixels."""


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


def gallery_requests(config: RunConfig) -> list[SampleRequest]:
    """One request a row, always with the same random numbers."""
    return [
        SampleRequest(
            stream="gallery",
            iteration=0,
            group=group,
            condition=condition,
            num_rollouts=config.output.gallery_columns,
            seed=config.seed,
            spec=config.sampling,
        )
        for group, (_, condition) in enumerate(gallery_rows(config))
    ]


def sample_gallery(config: RunConfig, fleet: Fleet) -> Gallery:
    """Images of the current policy, and their rewards."""
    requests = gallery_requests(config)
    images, scores = fleet.sample_images(requests), dict[str, np.ndarray]()
    if config.rewards.scorers():
        scored = [*fleet.score_images(zip(requests, images, strict=True))]
        scores = {name: np.stack([row.scores[name] for row in scored]) for name in scored[0].scores}
    return Gallery(gallery_rows(config), images, scores)


def gallery_sheet(config: RunConfig, gallery: Gallery) -> Sheet:
    """A gallery as one image, labelled if some conditions are not shown."""
    sheet, note = contact_sheet(gallery.images), shown_note(config)
    return labelled(sheet, note, [label(*row) for row in gallery.rows]) if note else sheet


def label(number: int, condition: Condition) -> str:
    """Label of a row: its number for `output.gallery_rows`, and its text."""
    text = f"{number} {condition.text}"
    return text if len(text) <= LETTERS else f"{text[: LETTERS - 3]}..."


def labelled(sheet: Sheet, title: str, labels: Sequence[str]) -> Sheet:
    """A contact sheet with a title, and a label at the left of each row."""
    height, width, _ = sheet.pixels.shape
    canvas = Image.new("RGB", (width + LABEL, height + TITLE), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    draw.text((4, 3), title, fill="black", font=font)
    for row, text in enumerate(labels):
        middle = TITLE + (row + 0.5) * height / len(labels)
        draw.text((4, middle), text, fill="black", font=font, anchor="lm")
    canvas.paste(Image.fromarray(sheet.pixels), (LABEL, TITLE))
    return Sheet(np.asarray(canvas), sheet.left + LABEL, sheet.top + TITLE, sheet.cell)


def contact_sheet(rows: Sequence[np.ndarray]) -> Sheet:
    """Rows of images (K, H, W, 3) uint8 as one image."""
    columns, height, width, _ = rows[0].shape
    grid = Grid(len(rows), columns, height, width, SMALLEST_CELL)
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            grid.put(row, column, image)
    return Sheet(grid.pixels, GAP / 2, GAP / 2, grid.cell)


def save_gallery(gallery: Gallery, sheet: Sheet, step: int, path: Path) -> None:
    """Write the sheet of a gallery after `step` iterations, and the .json beside it."""
    rows = [{"number": number, "text": condition.text} for number, condition in gallery.rows]
    columns = len(gallery.images[0])
    save_sheet(
        sheet,
        path,
        {"step": step, "columns": columns, "rows": rows, "scores": listed(gallery.scores)},
    )


def listed(scores: Mapping[str, np.ndarray]) -> dict[str, list[Any]]:
    """Arrays as lists, ready for JSON."""
    return {name: values.tolist() for name, values in scores.items()}


def save_sheet(sheet: Sheet, path: Path, about: Mapping[str, Any]) -> None:
    """Write a contact sheet, downscaled if it is very large, and beside it as .json `about` with
    the place of the images in the sheet as it is saved."""
    image = Image.fromarray(sheet.pixels)
    image.thumbnail((LARGEST_SHEET, LARGEST_SHEET))
    height, width, _ = sheet.pixels.shape
    across, down = image.width / width, image.height / height
    place = {
        "left": sheet.left * across,
        "top": sheet.top * down,
        "cell": [sheet.cell[0] * across, sheet.cell[1] * down],
    }
    with replacing(path) as partial:
        image.save(partial, format="PNG")
    with replacing(path.with_suffix(".json")) as partial:
        partial.write_text(dumps({**about, **place}), encoding="utf-8")


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

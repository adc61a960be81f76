"""Images of the report: galleries and single images, encoded within a budget of bytes.

Pixel art (magnified small images) stays lossless; photographs become WebP, in fewer bytes the less
there is room for.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cluster.io.run_layout import step_of
from cluster.io.strict_json import MALFORMED
from cluster.program.streams import printable
from learner.reports.reading import plain_number

SMALL = 64
"""Side, pixels, below which an image is shown magnified and kept lossless."""
SIDE = 192
"""Longest side of a single image on the page."""
LEAST_SHEET = 40_000
"""Bytes of a gallery, below which fewer galleries are shown rather than worse ones."""
QUALITIES = (80, 50)
SHEET_SIDE = 1200
"""Longest side of a gallery on the page: a pane has 600 pixels, some screens two for each."""
FLAT_BYTES = 0.4
"""A PNG of fewer bytes a pixel is pixel art."""
MOST_PIXELS = 1 << 26
BASE64 = 4 / 3
NEAREST = "nearest"


@dataclass(frozen=True)
class Sheet:
    """A gallery: a contact sheet with the rewards of its cells."""

    path: Path
    title: str
    step: int
    cells: dict[str, Any]
    """What its sidecar says (columns, left, top, cell, rows, scores); empty without one."""


def gallery_sheets(folder: Path, done: int, problems: list[str]) -> list[Sheet]:
    """Galleries by iteration: base policy, intermediate ones, tuned policy.

    Args:
        done: iterations of the run.
    """
    found: dict[int, Sheet] = {}
    for path in sorted(folder.glob("*.png")) if folder.is_dir() else ():
        step = step_of(path.stem)
        names = {"base": (0, "base policy"), "tuned": (done, "tuned policy")}
        if step is None and path.stem not in names:
            continue
        cells = sidecar(path, problems)
        place, title = names.get(path.stem, (step or 0, f"iteration {step}"))
        if path.stem == "tuned" and cells.get("step", done) != done:  # the run went on
            place = cells["step"]
            title = f"tuned policy, after {place} iterations"
        found[place] = Sheet(path, title, place, cells)
    return [found[step] for step in sorted(found)]


def sidecar(path: Path, problems: list[str]) -> dict[str, Any]:
    """The JSON beside a sheet, checked; empty if there is none or it is damaged."""
    file = path.with_suffix(".json")
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_bytes())
        width, height = (float(side) for side in found["cell"])
        rows, columns = list(found["rows"]), int(found["columns"])
        if not (width > 0 and height > 0 and columns > 0):
            raise ValueError("a cell has no size")
        checked: dict[str, Any] = {
            "columns": columns,
            "left": float(found["left"]),
            "top": float(found["top"]),
            "cell": [width, height],
            "rows": [_row_text(row) for row in rows],
        }
        if "step" in found:
            checked["step"] = int(found["step"])
        checked["scores"] = {
            printable(name): [_numbers(row, columns) for row in list(values)[: len(rows)]]
            for name, values in (found.get("scores") or {}).items()
        }
    except (OSError, IndexError, *MALFORMED) as error:
        problems.append(f"{file.parent.name}/{file.name} is damaged: {error}")
        return {}
    return checked


def _row_text(row: Mapping[str, Any]) -> str:
    text = printable(row.get("text") or "")
    return text or f"{row['number']}"


def _numbers(values: Sequence[Any], columns: int) -> list[float | None]:
    found = [plain_number(value) for value in list(values)[:columns]]
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in found]


def encoded_sheets(
    sheets: Sequence[Sheet], budget: float, problems: list[str]
) -> list[dict[str, Any]]:
    """Sheets for the page, evenly thinned if there is no room for all.

    Args:
        budget: bytes on the page.
    """
    room = max(int(budget / BASE64 / LEAST_SHEET), 2)
    kept = list(sheets)
    if len(kept) > room:
        chosen = np.linspace(0, len(kept) - 1, room).round().astype(int).tolist()
        kept = [kept[at] for at in dict.fromkeys(chosen)]
    limit = budget / BASE64 / max(len(kept), 1)
    found = []
    for sheet in kept:
        try:
            with Image.open(sheet.path) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels are too many")
                image.load()
                size = image.width, image.height
                art = sheet.path.stat().st_size < FLAT_BYTES * image.width * image.height
                source = encode(image.convert("RGB"), limit, art=art)
        except (OSError, ValueError, SyntaxError) as error:
            problems.append(f"{sheet.path.parent.name}/{sheet.path.name} is damaged: {error}")
            continue
        found.append(
            {"step": sheet.step, "title": sheet.title, "src": source, "width": size[0],
             "height": size[1], "cells": sheet.cells,
             "art": art and sheet.cells.get("left", 0) < SMALL}  # letters are no pixel art
        )  # fmt: skip
    return found


def encode(image: Image.Image, limit: float, *, art: bool) -> str:
    """An image as a data URI of at most `limit` bytes before base64, if that is possible at all.

    Args:
        art: pixel art, to be kept lossless if it fits.
    """
    if art:
        data = _bytes(image, "WEBP", lossless=True)
        if len(data) <= limit:
            return _uri(data, "webp")
    image.thumbnail((SHEET_SIDE, SHEET_SIDE))
    while True:
        for quality in QUALITIES:
            data = _bytes(image, "WEBP", quality=quality)
            if len(data) <= limit or min(image.size) <= SMALL:
                return _uri(data, "webp")
        scale = min(max(math.sqrt(limit / len(data)), 0.5), 0.9)
        image = image.resize((int(image.width * scale), int(image.height * scale)))


def encode_single(image: np.ndarray, limit: float) -> str:
    """One image (H, W, 3) uint8 as a data URI: small ones lossless, large ones reduced."""
    picture = Image.fromarray(image)
    if max(picture.size) <= SMALL:
        return _uri(_bytes(picture, "PNG"), "png")
    picture.thumbnail((SIDE, SIDE))
    return encode(picture, limit, art=False)


def _bytes(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def nearest_sheet(folder: Path, budget: float, problems: list[str]) -> dict[str, Any] | None:
    """The sheet of tuned images beside their nearest real images; None if there is none."""
    path = folder / f"{NEAREST}.png"
    if not path.is_file():
        return None
    cells = sidecar(path, problems)
    title = f"after {cells['step']} iterations" if "step" in cells else ""
    found = encoded_sheets([Sheet(path, title, 0, cells)], budget, problems)
    return found[0] if found else None

"""The real images that are nearest to a policy's, in the judge's features: does it copy them?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from cluster.fleet import Fleet
from cluster.messages import MAIN_SPACE
from learner.config import RunConfig
from learner.data.datasets import open_images
from learner.evaluation.held_out import PANEL
from learner.evaluation.real_images import kept_images
from learner.monitoring.gallery import (
    Row,
    contact_sheet,
    gallery_requests,
    gallery_rows,
    label,
    labelled,
    save_sheet,
)
from rewards.metrics.neighbours import nearest
from rewards.metrics.samples import RealImages

SHOWN = 8  # images of the policy, each the first of its row in the gallery
NEIGHBOURS = 3


def no_neighbours(config: RunConfig, real: RealImages | None) -> str:
    """Why nearest images cannot be shown; empty if they can."""
    if not config.evaluation.num_images or real is None:
        return "there is no judge (evaluation.num_images is 0)"
    if MAIN_SPACE not in real.features:
        return f"{config.evaluation.images} has moments alone, and no images"
    return ""


def write_nearest(config: RunConfig, fleet: Fleet, real: RealImages, step: int, path: Path) -> None:
    """Write a sheet with some images of the current policy, each with the real images nearest to
    it, and beside it a .json as of a gallery: its score "distance" is that in the judge's main
    space, `real` in each row has the numbers of the real images.

    Raises:
        StopRequestedError: a stop was requested meanwhile.
    """
    rows, requests = gallery_rows(config), gallery_requests(config)
    step_by = max(len(rows) / SHOWN, 1.0)
    chosen = [int(at * step_by) for at in range(min(len(rows), SHOWN))]
    size = config.evaluation.image_size
    asked = [replace(requests[at], panel=PANEL, image_size=size) for at in chosen]
    images = [row[:1] for row in fleet.sample_images(asked)]
    alone = [replace(request, num_rollouts=1) for request in asked]
    scored = [*fleet.score_images(zip(alone, images, strict=True))]
    there = [at for at, scores in enumerate(scored) if scores.valid.all()]

    def write() -> None:
        ours = np.concatenate([scored[at].features[MAIN_SPACE] for at in there])
        found, distances = nearest(real.features[MAIN_SPACE], ours, NEIGHBOURS)
        pictures = open_images(config.evaluation.images)
        numbers = kept_images(len(pictures))[found]
        cells = [
            np.stack([images[at][0], *(_fitted(pictures.image(n), images[at][0]) for n in near)])
            for at, near in zip(there, numbers, strict=True)
        ]
        _save([rows[chosen[at]] for at in there], cells, numbers, distances, step, path)

    if there:
        fleet.serve_while(write)


def _fitted(image: np.ndarray, like: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) uint8, cropped and resized to the size of another."""
    height, width = like.shape[:2]
    if image.shape == like.shape:
        return image
    return np.asarray(ImageOps.fit(Image.fromarray(image), (width, height)))


def _save(
    rows: Sequence[Row],
    cells: Sequence[np.ndarray],
    numbers: np.ndarray,
    distances: np.ndarray,
    step: int,
    path: Path,
) -> None:
    title = "tuned policy, then the nearest real images"
    sheet = labelled(contact_sheet(cells), title, [label(*row) for row in rows])
    about = [
        {"number": number, "text": condition.text, "real": near.tolist()}
        for (number, condition), near in zip(rows, numbers, strict=True)
    ]
    own = np.full((len(rows), 1), np.nan)  # the first column is the policy's image
    scores = {"distance": np.concatenate([own, distances], axis=1).tolist()}
    columns = len(cells[0])
    save_sheet(sheet, path, {"step": step, "columns": columns, "rows": about, "scores": scores})

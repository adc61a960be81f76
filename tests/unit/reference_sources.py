"""The same thirty small images as every kind of source."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rewards.networks.features import PixelFeatures

COUNT = 30
GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.integers(0, 256, (COUNT, 3, 4, 3), dtype=np.uint8)
CLASSES = np.arange(COUNT) % 3
FEATURES = PixelFeatures()(IMAGES).astype(np.float64)


def png(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def parquet(path: Path, cells: list, labels: list | None = None, **more: list) -> None:
    kinds = {} if labels is None else {"label": labels}
    pq.write_table(pa.table({"image": cells, **kinds, **more}), path, row_group_size=7)


def make_source(kind: str, tmp_path: Path) -> Path:
    """The same thirty images as a source of some kind; class by class in a folder alone."""
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
        for index, pixels in enumerate(IMAGES):
            (path / f"{index:02d}.webp").write_bytes(png(pixels, "WEBP", lossless=True))
        (path / "notes.txt").write_text("no image")
    elif kind == "struct.parquet":
        parquet(path, [{"bytes": png(pixels), "path": None} for pixels in IMAGES])
    elif kind == "shards":
        path.mkdir()
        for shard in range(3):
            cells = [png(pixels) for pixels in IMAGES[shard * 10 : shard * 10 + 10]]
            parquet(path / f"train-{shard}.parquet", cells)
    elif kind == "plain.npy":
        np.save(path, IMAGES)
    elif kind == "stored.npz":
        np.savez(path, arr_0=IMAGES)
    else:
        np.savez_compressed(path, arr_0=IMAGES)
    return path


SOURCES = ["folder", "struct.parquet", "shards", "plain.npy", "stored.npz", "packed.npz"]

"""Embeddings of images' captions, from a Parquet file with their text features.

The file is one of `python -m actors.captions`: columns `caption`, `features` and `shape` ([n, W]),
and the encoder's fingerprint in its metadata.

Shapes: N images, n tokens of a caption, W width of the text encoder, E embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import DataError
from cluster.io.paths import expand_user
from cluster.program.invocation import command_of
from rewards.distribution.joint import CaptionProjection, pooled
from rewards.distribution.moments import MomentSums
from rewards.images.decoding import ImageSource
from rewards.images.parquet import ParquetImages

COLUMNS = ["caption", "features", "shape"]
NAMES = ("caption", "captions", "prompt", "text")  # of a source's own column of captions
ENCODER = b"encoder"
BLOCK = 1024  # captions whose pooled features are added at once
READ_AT_ONCE = 64


def embed_captions(
    path: Path, source: ImageSource, dim: int
) -> tuple[CaptionProjection, np.ndarray]:
    """Principal directions of the captions of all images, and the images' embeddings (N, E) fp32.

    Args:
        path: of the captions' features, in the order of the source.
        dim: E; 0 chooses (`CaptionProjection.of`).

    Raises:
        DataError: not such a file, not one row an image, or other captions than the source's own.
    """
    texts, encoder = _captions(path, len(source))
    if isinstance(source, ParquetImages):
        _check_order(path, texts, source.texts(NAMES))
    sums: MomentSums | None = None
    for block in _blocks(path):
        sums = (sums or MomentSums.about(block.mean(0))).add(block)
    assert sums is not None  # as many rows as images
    moments = sums.moments()
    projection = CaptionProjection.of(moments.mean, moments.cov, dim, encoder)
    rows = [projection(block).astype(np.float32) for block in _blocks(path)]
    return projection, np.concatenate(rows)


def _captions(path: Path, count: int) -> tuple[list[str], str]:
    """All captions, and the encoder's fingerprint."""
    try:
        with pq.ParquetFile(expand_user(path)) as file:
            names = file.schema_arrow.names
            if not set(COLUMNS) <= set(names):
                raise DataError(
                    f"{path}: expected columns {', '.join(COLUMNS)}, found {', '.join(names)}: "
                    f"{command_of('actors.captions')} writes such a file from captions"
                )
            metadata = file.schema_arrow.metadata or {}
            texts = file.read(columns=COLUMNS[:1]).column(0).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error
    if len(texts) != count:
        raise DataError(
            f"{path}: {len(texts)} captions, expected {count}, one an image in the order of the "
            "source"
        )
    return texts, metadata.get(ENCODER, b"").decode("utf-8", "replace")


def _check_order(path: Path, texts: list[str], own: list[str] | None) -> None:
    """Refuse captions that are not those of the images' own column."""
    for row, (text, wanted) in enumerate(zip(texts, own or ())):
        if text != (wanted or "").strip():
            raise DataError(
                f"{path}: row {row} is {text!r:.80}, but the image's own caption is {wanted!r:.80}:"
                f" encode the captions of the images' file, {command_of('actors.captions')} "
                "IMAGES.parquet FEATURES.parquet"
            )


def _blocks(path: Path) -> Iterator[np.ndarray]:
    """Pooled features (at most BLOCK, W) float64."""
    held, row = list[np.ndarray](), 0
    try:
        with pq.ParquetFile(expand_user(path)) as file:
            for batch in file.iter_batches(READ_AT_ONCE, columns=COLUMNS[1:]):
                for features, shape in zip(batch.column(0), batch.column(1).to_pylist()):
                    held.append(_pooled(path, row, features, shape))
                    row += 1
                    if held[-1].shape != held[0].shape:
                        raise DataError(f"{path}: row {row - 1}: features of another width")
                    if len(held) == BLOCK:
                        yield np.stack(held)
                        held = held[:0]
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: damaged after row {row} ({error})") from error
    if held:
        yield np.stack(held)


def _pooled(path: Path, row: int, features: pa.Scalar, shape: list[int] | None) -> np.ndarray:
    numbers = features.values.to_numpy(zero_copy_only=False) if features.is_valid else np.empty(0)
    counted = len(shape or ()) == 2 and min(shape or (0,)) > 0
    fits = counted and shape is not None and numbers.size == shape[0] * shape[1]
    if not fits or shape is None or not np.isfinite(numbers).all():
        raise DataError(
            f"{path}: row {row}: expected [n, W] finite features, found {numbers.size} numbers of "
            f"shape {shape}: encode the captions again with {command_of('actors.captions')}"
        )
    return pooled(numbers.reshape(shape))

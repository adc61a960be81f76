"""Files of captions: text with one a line, and Parquet with their features.

The Parquet file has one row a caption: `caption` (string), `features` (list of float32, the (n, D)
matrix row by row) and `shape` (list of int32, [n, D]). Features of a bf16 encoder have two empty
bytes a number, which the file's compression takes away: nothing would be gained by storing halves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import DataError
from cluster.files import replacing
from cluster.invocation import command_of
from cluster.messages import Condition

ROW_GROUP = 64  # captions: at most 63 MB of flan-t5-xl's features in memory at a time
SCHEMA = pa.schema(
    [
        pa.field("caption", pa.string()),
        pa.field("features", pa.list_(pa.float32())),
        pa.field("shape", pa.list_(pa.int32())),
    ]
)


def read_captions(path: Path) -> list[str]:
    """Captions of a UTF-8 text file, one a line; empty lines are skipped.

    Raises:
        DataError: there is no such file, it is not text, or it holds no caption.
    """
    try:
        lines = path.expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"captions {path}: not a readable UTF-8 text file ({error})") from error
    captions = [line.strip() for line in lines if line.strip()]
    if not captions:
        raise DataError(f"captions {path}: the file holds no caption (one a line is expected)")
    return captions


def write_caption_features(
    path: Path, texts: Iterable[str], features: Iterable[np.ndarray]
) -> None:
    """Write captions and their features, a few at a time: both may be generators.

    The file appears under its name only when it is whole.

    Args:
        features: one (n, D) float array a caption.

    Raises:
        DataError: an array is not (n, D) of finite floats, or there are more of one than the other.
    """
    pairs = enumerate(zip_longest(texts, features))
    with (
        replacing(path) as partial,
        pq.ParquetWriter(
            partial,
            SCHEMA,
            compression="zstd",
            use_dictionary=False,
            use_byte_stream_split=["features.list.element"],
        ) as writer,
    ):
        while rows := [_row(path, at, *pair) for at, pair in islice(pairs, ROW_GROUP)]:
            writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))


def iterate_caption_features(path: Path) -> Iterator[Condition]:
    """The captions of a file as conditions, one after another; see `read_caption_features`."""
    try:
        file = pq.ParquetFile(path.expanduser())
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable Parquet file ({_first_line(error)})") from error
    with file:
        there = file.schema_arrow.names
        for name in SCHEMA.names:
            if name not in there:
                raise DataError(
                    f"{path}: column {name!r} is missing (found {', '.join(there)}); "
                    f"{command_of('actors.captions')} writes such files"
                )
        at = 0
        try:
            for batch in file.iter_batches(batch_size=ROW_GROUP, columns=SCHEMA.names):
                for offset in range(batch.num_rows):
                    yield _condition(path, at + offset, batch, offset)
                at += batch.num_rows
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: damaged after row {at} ({_first_line(error)})") from error


def read_caption_features(path: Path) -> list[Condition]:
    """Captions with their features, as conditions for a caption-conditional policy.

    Returns:
        One condition a row: `text`, and `features` (n, D), unpadded, of the file's precision.

    Raises:
        DataError: names file, column and row (from 0) of the first thing that is wrong: nothing
            readable, a missing column, an empty cell, numbers that do not fill the shape or are not
            finite, rows of different widths; or there are no rows.
    """
    conditions: list[Condition] = []
    for condition in iterate_caption_features(path):
        conditions.append(condition)
        widths = [_width(conditions[0]), _width(condition)]
        if widths[0] != widths[1]:
            raise _wrong(
                path, "shape", len(conditions) - 1, f"width {widths[1]}, but row 0 has {widths[0]}"
            )
    if not conditions:
        raise DataError(f"{path}: the file holds no caption")
    return conditions


def _width(condition: Condition) -> int:
    return 0 if condition.features is None else condition.features.shape[1]


def _row(path: Path, at: int, text: str | None, features: np.ndarray | None) -> dict[str, object]:
    if text is None or features is None:
        lacking = "caption" if text is None else "features"
        raise _wrong(path, lacking, at, "nothing: there are fewer of these than of the others")
    if features.ndim != 2 or not features.size or features.dtype.kind != "f":
        found = f"{features.dtype} of shape {features.shape}"
        raise _wrong(path, "features", at, f"{found}, expected floats (n, D)")
    if not np.isfinite(features).all():
        raise _wrong(path, "features", at, "values that are not finite")
    numbers = features.astype(np.float32).ravel()
    return {"caption": text, "features": numbers, "shape": list(features.shape)}


def _condition(path: Path, at: int, batch: pa.RecordBatch, offset: int) -> Condition:
    cells = {name: batch.column(name)[offset] for name in SCHEMA.names}
    for name, cell in cells.items():
        if not cell.is_valid:
            raise _wrong(path, name, at, "nothing")
    text, shape = cells["caption"].as_py(), cells["shape"].as_py()
    if not isinstance(text, str):
        raise _wrong(path, "caption", at, f"{type(text).__name__}, expected text")
    if not isinstance(shape, list) or len(shape) != 2 or not all(_counts(part) for part in shape):
        raise _wrong(path, "shape", at, f"{shape}, expected [n, D]")
    numbers = _numbers(path, at, cells["features"])
    if numbers.size != shape[0] * shape[1]:
        raise _wrong(path, "features", at, f"{numbers.size} numbers, expected {shape} of them")
    return Condition(text=text, features=numbers.reshape(shape))


def _counts(value: object) -> bool:
    return isinstance(value, int) and value > 0


def _numbers(path: Path, at: int, cell: pa.Scalar) -> np.ndarray:
    if not pa.types.is_list(cell.type) and not pa.types.is_large_list(cell.type):
        raise _wrong(path, "features", at, f"{cell.type}, expected a list of floats")
    values = cell.values
    if not pa.types.is_floating(values.type) or values.null_count:
        raise _wrong(path, "features", at, f"{cell.type} with gaps or not of floats")
    numbers = values.to_numpy(zero_copy_only=False).copy()  # else it keeps the whole batch
    if not np.isfinite(numbers).all():
        raise _wrong(path, "features", at, "values that are not finite")
    return numbers


def _wrong(path: Path, column: str, row: int, found: str) -> DataError:
    return DataError(f"{path}: column {column!r}, row {row}: found {found}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]

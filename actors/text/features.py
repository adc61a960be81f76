"""Parquet files of captions with their features.

Our file has one row per caption: `caption` (string), `features` (list of float32, the (n, D) matrix
row by row) and `shape` (list of int32, [n, D]); the schema's metadata may hold the encoder's
fingerprint. Compression removes the two zero bytes of a bf16 encoder's numbers. Files of other
programs have a column of texts and `features` (lists of n lists of D floats).

Conditions hold a reference to the row (`FeatureRow`); features are read, with their row group, when
used.
"""

from __future__ import annotations

import socket
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actors.text.tables import UNREADABLE_PARQUET
from cluster.errors import DataError
from cluster.io.files import replacing
from cluster.io.paths import expand_user
from cluster.messages import Condition, FeatureRow
from cluster.program.invocation import command_of

ROW_GROUP = 8  # captions, the unit of reading: at most 8 MB of flan-t5-xl's features
LARGEST_ROW_GROUP = 256 << 20  # bytes: most that is read for one caption of other programs' files
READ_AT_ONCE = 64
KEPT_ROWS = 128  # captions whose features a process keeps
FEATURES = "features"
ENCODER = b"encoder"  # key of the fingerprint
SCHEMA = pa.schema(
    [
        pa.field("caption", pa.string()),
        pa.field("features", pa.list_(pa.float32())),
        pa.field("shape", pa.list_(pa.int32())),
    ]
)


def write_caption_features(
    path: Path, texts: Iterable[str], features: Iterable[np.ndarray], encoder: str = ""
) -> None:
    """Write captions and their features, a few at a time: both may be generators. The file appears
    when it is complete.

    Args:
        features: one (n, D) float array per caption.
        encoder: its fingerprint (`CaptionEncoder.fingerprint`).

    Raises:
        DataError: an array is not (n, D) of finite floats, or there are more of one than the other.
    """
    pairs = enumerate(zip_longest(texts, features))
    schema = SCHEMA.with_metadata({ENCODER: encoder}) if encoder else SCHEMA
    with (
        replacing(path) as partial,
        pq.ParquetWriter(
            partial,
            schema,
            compression="zstd",
            use_dictionary=False,
            use_byte_stream_split=["features.list.element"],
        ) as writer,
    ):
        while rows := [_row(path, at, *pair) for at, pair in islice(pairs, ROW_GROUP)]:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def iterate_caption_features(path: Path) -> Iterator[Condition]:
    """The captions of a file as conditions, one after another; see `read_caption_features`."""
    try:
        file = pq.ParquetFile(expand_user(path))
    except UNREADABLE_PARQUET as error:
        raise DataError(f"{path}: not a readable Parquet file ({_first_line(error)})") from error
    with file:
        _check_row_groups(path, file)
        there = file.schema_arrow.names
        for name in SCHEMA.names:
            if name not in there:
                raise DataError(
                    f"{path}: column {name!r} is missing (found {', '.join(there)}); "
                    f"{command_of('actors.captions')} writes such files"
                )
        at = 0
        try:
            for batch in file.iter_batches(batch_size=READ_AT_ONCE, columns=SCHEMA.names):
                for offset in range(batch.num_rows):
                    yield _condition(path, at + offset, batch, offset)
                at += batch.num_rows
        except UNREADABLE_PARQUET as error:
            raise DataError(f"{path}: damaged after row {at} ({_first_line(error)})") from error


def read_caption_features(path: Path) -> list[Condition]:
    """Captions with features, as conditions for a caption-conditional policy. Validates every row,
    keeps none.

    Returns:
        One condition per row: `text`, and a `FeatureRow` for `features` (see `features_of`).
        Repetitions of a caption with the same features are one condition, of the first row.

    Raises:
        DataError: names file, column and row (from 0): unreadable, a missing column, an empty cell,
            numbers that do not fill the shape or are not finite, rows of different widths, no rows.
    """
    conditions, first, known = list[Condition](), 0, dict[tuple[str, int], Condition]()
    for row, condition in enumerate(iterate_caption_features(path)):
        width = condition.features.shape[1] if isinstance(condition.features, np.ndarray) else 0
        first = first or width
        if width != first:
            raise _wrong(path, "shape", row, f"width {width}, but row 0 has {first}")
        fresh = by_row(path, row, condition)
        digest = fresh.features.digest if isinstance(fresh.features, FeatureRow) else 0
        conditions.append(known.setdefault((fresh.text, digest), fresh))
    if not conditions:
        raise DataError(f"{path}: the file holds no caption")
    return conditions


def iterate_text_features(path: Path, column: str) -> Iterator[Condition]:
    """The captions of another program's file: a column of texts, optionally one of `features`.

    Raises:
        DataError: names file, column and row.
        OSError, ArrowException: unreadable.
    """
    with pq.ParquetFile(expand_user(path)) as file:
        columns = [column]
        if FEATURES in file.schema_arrow.names:
            columns.append(FEATURES)
            _check_row_groups(path, file)
        at = 0
        for batch in file.iter_batches(batch_size=READ_AT_ONCE, columns=columns):
            for offset in range(batch.num_rows):
                text = batch.column(column)[offset].as_py()
                if not isinstance(text, str) or not text.strip():
                    raise _wrong_list(path, column, at, f"found {text!r}, not text")
                yield Condition(text=text, features=_listed(path, at, batch, offset))
                at += 1


def by_row(path: Path, row: int, condition: Condition) -> Condition:
    """A condition with a `FeatureRow` in place of its features."""
    features = condition.features
    if not isinstance(features, np.ndarray):
        return condition
    there = FeatureRow(path=str(expand_user(path).absolute()), row=row, digest=_digest(features))
    return replace(condition, features=there)


def features_of(condition: Condition) -> np.ndarray | None:
    """Features (n, D) of a condition, read from its file if it has a `FeatureRow`; None if it has
    none. Read-only.

    Raises:
        DataError: the file is missing, or changed since the condition was made.
    """
    found = condition.features
    return _read_row(found) if isinstance(found, FeatureRow) else found


@lru_cache(maxsize=KEPT_ROWS)
def _read_row(row: FeatureRow) -> np.ndarray:
    path = Path(row.path)
    try:
        with pq.ParquetFile(path) as file:
            features = _features_at(path, file, row.row)
    except FileNotFoundError:
        raise DataError(
            f"captions {path}: not there on {socket.gethostname()}: samplers and learner read "
            "features from it, so that it must be on storage that every node has under this path"
        ) from None
    except UNREADABLE_PARQUET as error:
        raise DataError(f"captions {path}: not readable any more ({_first_line(error)})") from error
    if features is None or _digest(features) != row.digest:
        raise DataError(
            f"captions {path}: row {row.row} is not what it was when the run began: the file was "
            "changed or is another one on this node; put it back and go on with --resume"
        )
    features.flags.writeable = False  # shared by all callers
    return features


def _features_at(path: Path, file: pq.ParquetFile, row: int) -> np.ndarray | None:
    """Features of one row; None if there is no such row, or it has none."""
    names, first = file.schema_arrow.names, 0
    own = set(SCHEMA.names) <= set(names)
    columns = ["features", "shape"] if own else [FEATURES]
    if not set(columns) <= set(names):
        return None
    for group in range(file.metadata.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if row < first + count:
            for batch in file.iter_batches(READ_AT_ONCE, row_groups=[group], columns=columns):
                if row < first + batch.num_rows:
                    read = _matrix if own else _listed
                    return read(path, row, batch, row - first)
                first += batch.num_rows
        first += count
    return None


def _check_row_groups(path: Path, file: pq.ParquetFile) -> None:
    """Refuse large row groups, each of which is read as a whole for one caption.

    Raises:
        DataError: says how to write the file.
    """
    for group in range(file.metadata.num_row_groups):
        found = file.metadata.row_group(group)
        if found.total_byte_size > LARGEST_ROW_GROUP and found.num_rows > 1:
            raise DataError(
                f"captions {path}: row group {group} holds {found.num_rows} captions in "
                f"{found.total_byte_size / 1e6:.0f} MB, which would be read for each of them: "
                f"write the file with {command_of('actors.captions')}, or with "
                f"pyarrow.parquet.write_table(table, file, row_group_size={ROW_GROUP})"
            )


def _digest(features: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(features).data, zlib.crc32(str(features.shape).encode()))


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
    text = cells["caption"].as_py()
    if not isinstance(text, str):
        raise _wrong(path, "caption", at, f"{type(text).__name__}, expected text")
    return Condition(text=text, features=_matrix(path, at, batch, offset))


def _matrix(path: Path, at: int, batch: pa.RecordBatch, offset: int) -> np.ndarray:
    """Features (n, D) of a row of our files."""
    shape = batch.column("shape")[offset].as_py()
    if not isinstance(shape, list) or len(shape) != 2 or not all(_counts(part) for part in shape):
        raise _wrong(path, "shape", at, f"{shape}, expected [n, D]")
    numbers = _numbers(path, at, batch.column("features")[offset])
    if numbers.size != shape[0] * shape[1]:
        raise _wrong(path, "features", at, f"{numbers.size} numbers, expected {shape} of them")
    return numbers.reshape(shape)


def _listed(path: Path, at: int, batch: pa.RecordBatch, offset: int) -> np.ndarray | None:
    """Features (n, D) of a row of other programs' files; None if it has none."""
    there = FEATURES in batch.schema.names
    features = batch.column(FEATURES)[offset].as_py() if there else None
    if features is None:
        return None
    try:
        matrix = np.array(features, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise _wrong_list(path, FEATURES, at, f"not n lists of D floats ({error})") from error
    if matrix.ndim != 2 or not matrix.size or not np.isfinite(matrix).all():
        found = f"found shape {matrix.shape}, expected n lists of D finite floats"
        raise _wrong_list(path, FEATURES, at, found)
    return matrix


def _wrong_list(path: Path, column: str, row: int, what: str) -> DataError:
    return DataError(f"captions {path}: column {column!r}, row {row}: {what}")


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

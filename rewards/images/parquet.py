"""Images in Parquet files, as Hugging Face datasets are stored, one row group at a time."""

from __future__ import annotations

import bisect
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import DataError
from cluster.model_files.file_kinds import image_head
from cluster.program.streams import escaped
from rewards.images.class_labels import DECIMAL, ClassLabels, class_numbers
from rewards.images.decoding import Loaded, decode, digest

LABEL = "label"
LOOKED_AT = 16  # cells that decide whether a column has images
LOOKED_FOR = 1024  # rows that are searched for these
BINARIES = ("binary", "large_binary", "binary_view", "fixed_size_binary")
STRINGS = ("string", "large_string", "string_view")
"""Arrow's types, as its predicates name them."""
HUGGING_FACE = b"huggingface"  # key of the datasets library's description in a schema


@dataclass(frozen=True)
class _RowGroup:
    first: int
    end: int
    """Rows first..end-1 of all files together."""
    file: Path
    file_first: int
    """Number of the file's first row."""
    index: int


class ParquetImages:
    """Rows of Parquet files with encoded images: a column of {bytes, path} or of binary."""

    def __init__(
        self,
        files: list[Path],
        image_column: str = "",
        label_column: str = "",
        remarks: tuple[str, ...] = (),
    ) -> None:
        """
        Raises:
            DataError: not Parquet, without rows, or without such a column.
        """
        self._files, self._label, self._wanted = files, label_column, image_column
        self._groups: list[_RowGroup] = []
        described, end = [], 0
        for number, file in enumerate(files):
            parquet = _opened(file)
            if number == 0:
                self._column = _image_column(file, parquet, image_column)
            elif self._column not in _candidates(parquet.schema_arrow):
                raise DataError(
                    f"{escaped(file)}: no column {self._column!r} of images, as {files[0].name} "
                    f"has: found {parquet.schema_arrow.names}; move it away, or name the files' "
                    "folder alone"
                )
            metadata, start = parquet.metadata, end
            for index in range(metadata.num_row_groups):
                first, end = end, end + metadata.row_group(index).num_rows
                self._groups.append(_RowGroup(first, end, file, start, index))
            described.append(f"{file.name} {metadata.num_rows} {file.stat().st_size}")
        if not end:
            raise DataError(f"{escaped(files[0])}: no rows")
        self._count = end
        self.remarks = (*_listing(files, self._column, end), *remarks)
        self.fingerprint = digest(os.fsencode("\n".join([self._column, *described])))
        self._held: tuple[_RowGroup, list[Any]] | None = None

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": None}

    def read(self, start: int, stop: int) -> Iterator[Loaded]:
        index = bisect.bisect_right(self._groups, start, key=lambda group: group.end)
        for group in itertools.takewhile(lambda g: g.first < stop, self._groups[index:]):
            rows = self._rows(group)
            for row in range(max(start, group.first), min(stop, group.end)):
                name = f"{group.file} row {row - group.file_first}"
                data = _encoded(rows[row - group.first])
                if not data:
                    yield Loaded(escaped(name), None, f"no bytes in column {self._column!r}")
                else:
                    yield decode(name, data)

    def classes(self, names: tuple[str, ...] = ()) -> ClassLabels:
        name, values, known = self._label or LABEL, list[Any](), tuple[str, ...]()
        for number, file in enumerate(self._files):
            parquet = _opened(file)
            columns = parquet.schema_arrow.names
            if name not in columns:
                raise DataError(
                    f"{escaped(file)}: no column {name!r} of labels: name it with "
                    f"--label-column, found {columns}"
                )
            theirs = _class_names(parquet.schema_arrow, name)
            if number and theirs != known:
                raise DataError(
                    f"{escaped(file)}: column {name!r} has other class names than in "
                    f"{self._files[0].name}: {theirs[:3]} and {known[:3]}, ..."
                )
            known = theirs
            values += _labels(file, parquet, name)
        where = f"{escaped(self._files[0])}: column {name!r}"
        if isinstance(values[0], str):
            if not all(isinstance(value, str) for value in values):
                raise DataError(f"{where} holds names in some files, numbers in others")
            numbers, listed = class_numbers(values, where, names)
            return ClassLabels(np.array([numbers[value] for value in values]), listed)
        if any(isinstance(value, str) for value in values):
            raise DataError(f"{where} holds numbers in some files, names in others")
        return _numbered(np.array(values, np.int64), known, where, names)

    def texts(self, names: Sequence[str]) -> list[str] | None:
        """A column of texts, of all images; None unless exactly one of the names is one."""
        found = list[str]()
        for file in self._files:
            parquet = _opened(file)
            columns = [name for name in names if name in parquet.schema_arrow.names]
            kinds = [str(parquet.schema_arrow.field(name).type) for name in columns]
            if len(columns) != 1 or kinds[0] not in STRINGS:
                return None
            with _explained(file):
                found += parquet.read(columns=columns).column(0).to_pylist()
        return found

    def _rows(self, group: _RowGroup) -> list[Any]:
        if self._held is None or self._held[0] != group:
            with _explained(group.file):
                table = _opened(group.file).read_row_group(group.index, columns=[self._column])
                rows = table.column(self._column).to_pylist()
                if len(rows) != group.end - group.first:
                    raise ValueError(f"{group.end - group.first} rows announced, {len(rows)} there")
                self._held = group, rows
        return self._held[1]


def _numbered(
    indices: np.ndarray, known: tuple[str, ...], where: str, given: tuple[str, ...]
) -> ClassLabels:
    """Classes by integer labels.

    Args:
        known: names of the labels 0, 1, ..., as the datasets library stores them. Decimal names
            are the class numbers: its reader of folders sorts 10 before 2.
    """
    check_indices(indices, where)
    if known and indices.max() >= len(known):
        raise DataError(f"{where}: label {indices.max()}, but {len(known)} names of classes")
    if known and (given or all(DECIMAL.fullmatch(name) for name in known)):
        numbers, names = class_numbers(known, where, given)
        if len(set(known)) < len(known):
            raise DataError(f"{where}: a class name occurs twice")
        return ClassLabels(np.array([numbers[name] for name in known])[indices], names)
    if given and indices.max() >= len(given):
        raise DataError(f"{where}: label {indices.max()}, but --class-names has {len(given)}")
    return ClassLabels(indices, given or known)


def check_indices(indices: np.ndarray, where: str) -> None:
    """
    Raises:
        DataError: a number below 0.
    """
    if indices.min() < 0:
        raise DataError(
            f"{where}: classes are numbered from 0, found {indices.min()} (-1 often stands for "
            "images without a label)"
        )


def _labels(file: Path, parquet: Any, name: str) -> list[Any]:
    """Integers or strings of a column."""
    import pyarrow as pa

    with _explained(file):
        column = parquet.read(columns=[name]).column(name)
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        text = any(getattr(pa.types, f"is_{name}")(kind) for name in STRINGS)
        if not (text or pa.types.is_integer(kind)):
            raise DataError(
                f"{escaped(file)}: column {name!r} must hold integers or names, found {kind}"
            )
        values = column.to_pylist()
        if len(values) != parquet.metadata.num_rows:
            raise ValueError(f"{parquet.metadata.num_rows} rows announced, {len(values)} there")
    if None in values:
        raise DataError(
            f"{escaped(file)}: column {name!r} must hold integers or names, all rows: row "
            f"{values.index(None)} has none"
        )
    if not text and values and max(values) > np.iinfo(np.int64).max:
        raise DataError(f"{escaped(file)}: column {name!r}: {max(values)} is no class")
    return values


def _class_names(schema: Any, name: str) -> tuple[str, ...]:
    """Names of a column's integers, if the datasets library wrote them."""
    try:
        features = json.loads((schema.metadata or {})[HUGGING_FACE])["info"]["features"]
        names = features[name]["names"]
    except (KeyError, TypeError, ValueError):
        return ()
    if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
        return ()
    return tuple(names)


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    """Turn pyarrow's errors of a damaged file into a DataError."""
    import pyarrow as pa

    where = escaped(file)
    try:
        yield
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: pyarrow reads no file of such a name ({error})") from error
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        reason = str(error).replace("\n", " ")
        raise DataError(f"{where}: not a whole Parquet file ({reason}): fetch it again") from error


def _opened(file: Path) -> Any:
    import pyarrow.parquet as pq

    with _explained(file):
        return pq.ParquetFile(file)


def holds_images(file: Path) -> bool:
    """Whether a column of a Parquet file begins with images.

    Raises:
        DataError: the file cannot be read.
    """
    parquet = _opened(file)
    return any(
        image_head(cell)
        for name in _candidates(parquet.schema_arrow)
        for cell in _first_cells(file, parquet, name)
    )


def _candidates(schema: Any) -> list[str]:
    """Columns whose type can hold encoded images."""
    import pyarrow as pa

    def fits(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return any(getattr(pa.types, f"is_{name}")(kind) for name in BINARIES)

    return [item.name for item in schema if fits(item.type)]


def _image_column(file: Path, parquet: Any, wanted: str) -> str:
    """The column whose first cells are images."""
    schema, where = parquet.schema_arrow, escaped(file)
    typed = _candidates(schema)
    if wanted and wanted not in typed:
        raise DataError(
            f"{where}: column {wanted!r} holds no encoded images ({{bytes, path}} or binary); "
            f"those that do: {typed}, of {schema.names}"
        )
    if not parquet.metadata.num_rows:
        return wanted or (typed or [""])[0]
    looked = {name: _first_cells(file, parquet, name) for name in ([wanted] if wanted else typed)}
    found = [name for name, cells in looked.items() if any(image_head(cell) for cell in cells)]
    if len(found) == 1:
        return found[0]
    if wanted and not looked[wanted]:
        return wanted  # later rows may have bytes
    if not typed:
        kinds = ", ".join(f"{item.name} ({item.type!s:.40})" for item in schema)
        raise DataError(
            f"{where}: no column of encoded images, {{bytes, path}} or binary, as the datasets "
            f"library writes them: found {kinds}"
        )
    if wanted or not found:
        name = wanted or typed[0]
        begins = "no bytes: are the images in files of their own?"
        if looked[name]:
            begins = f"the first begins with {looked[name][0][:8]!r}"
        raise DataError(
            f"{where}: column {name!r} of {schema.names} holds no encoded images in its first rows "
            f"({begins})"
        )
    raise DataError(
        f"{where}: {len(found)} columns could hold encoded images, {found} of {schema.names}: "
        "name one with --image-column"
    )


def _first_cells(file: Path, parquet: Any, name: str) -> list[bytes]:
    """The first few cells of a column that hold bytes."""
    cells: list[bytes] = []
    with _explained(file):
        batches = parquet.iter_batches(batch_size=LOOKED_AT, columns=[name])
        for batch in itertools.islice(batches, LOOKED_FOR // LOOKED_AT):
            cells += [data for cell in batch.column(0).to_pylist() if (data := _encoded(cell))]
            if len(cells) >= LOOKED_AT:
                break
    return cells[:LOOKED_AT]


def _encoded(cell: Any) -> bytes:
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    return data if isinstance(data, bytes) else b""


def _listing(files: list[Path], column: str, rows: int) -> tuple[str, ...]:
    """A line about the files, since a folder may hold several splits."""
    if len(files) == 1:
        return ()
    first, last = escaped(files[0].name), escaped(files[-1].name)
    return (f"{rows} rows of {len(files)} Parquet files, {first} to {last}, column {column!r}",)

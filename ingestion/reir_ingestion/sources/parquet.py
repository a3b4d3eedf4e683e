"""Images in Parquet tables: their bytes in a column, or in a column of URIs.

Row groups are read one after another, and of them the columns that are needed.
"""

from __future__ import annotations

import datetime
import decimal
import math
import threading
import weakref
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from reir.attributes import BadRow, checked
from reir.errors import ConfigError, ImageError, ImageFailure, SourceError
from reir_ingestion.sources.attributes import IMAGE_COLUMNS, image_column
from reir_ingestion.sources.contract import OnError, Source, SourceFile
from reir_ingestion.sources.held import HeldSource
from reir_ingestion.sources.lists import ListSource
from reir_ingestion.sources.places import Places

ROWS_AT_ONCE = 1024
GROUPS_HELD = 2
"""Row groups of a table that a process keeps: readers ask for rows in nearly their order."""

TABLES_OPEN = 4


def parquet_records(stream: IO[bytes]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the rows of a table, numbered from 1 on, as columns that can be attributes.

    Raises:
        OSError: the table is damaged.
    """
    number = 0
    try:
        table = pq.ParquetFile(stream)
        wanted = attribute_columns(table.schema_arrow)
        for batch in table.iter_batches(ROWS_AT_ONCE, columns=wanted):
            for row in batch.to_pylist():
                number += 1
                yield number, plain(row)
    except pa.ArrowException as error:
        raise OSError(f"row {number}: {error}") from error


@dataclass(frozen=True)
class ParquetSource(HeldSource):
    """The images in the rows of tables; one has changed when its table has and its bytes have.

    Attributes:
        image_column: the column with the bytes.
    """

    image_column: str = ""

    kind: ClassVar[str] = "parquet"

    def images(self, holder: SourceFile, on_error: OnError) -> Iterator[SourceFile]:
        """The rows of a table; those whose columns cannot be used go to `on_error`.

        Raises:
            OSError: it is damaged.
        """
        with self.places.stream(holder.uri) as stream:
            for number, columns in parquet_records(stream):
                try:
                    attributes = checked(columns)
                except BadRow as error:
                    on_error(f"{holder.uri}#{number}", error)
                    continue
                uri = self.uri_of(holder, str(number))
                yield SourceFile(uri, 0, self.time_of(holder), attributes, number - 1)

    def read(self, file: SourceFile) -> bytes:
        """The bytes in a row.

        Raises:
            ImageError: MISSING (also an empty cell), UNREADABLE or UNREACHABLE.
        """
        holder = self.holder_of(file)
        try:
            cells = _cells(self.places, holder, self.image_column, file.mtime_ns)
            cell = cells.at(file.offset)
        except (pa.ArrowException, OSError, SourceError) as error:
            raise ImageError(ImageFailure.UNREADABLE, f"{holder}: {error}") from error
        return cell_bytes(cell, file.uri)


def open_parquet(text: str, tables: Source, places: Places, column: str) -> Source:
    """Return the images of tables; the first one tells whether they hold bytes or URIs.

    Raises:
        SourceError: there is no table, or it is damaged.
        ConfigError: which column has the images must be said.
    """
    first = next(tables.uris(), None)
    if first is None:
        raise SourceError(f"source {text!a} holds no table; looked for files ending in .parquet")
    try:
        with places.stream(first) as stream:
            schema = pq.ParquetFile(stream).schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{first} is no Parquet table: {error}") from error
    found = bytes_column(schema, column)
    if found is None:
        return ListSource(text, tuple(tables.uris()), places, column)
    return ParquetSource(text, tables, places, found)


class _Cells:
    """One column of an open table, by row."""

    def __init__(self, file: IO[bytes], column: str) -> None:
        weakref.finalize(self, file.close)
        self._table = table = pq.ParquetFile(file)
        self._column = column
        if column not in table.schema_arrow.names:
            raise OSError(f"there is no column {column!a}")
        self._held: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()
        self._starts = [0]
        for group in range(table.metadata.num_row_groups):
            self._starts.append(self._starts[-1] + table.metadata.row_group(group).num_rows)

    def at(self, row: int) -> Any:
        """The cell of a row."""
        group = bisect_right(self._starts, row) - 1
        with self._lock:
            if group not in self._held:
                read = self._table.read_row_group(group, columns=[self._column])
                self._held[group] = read.column(0)
                if len(self._held) > GROUPS_HELD:
                    self._held.popitem(last=False)
            return self._held[group][row - self._starts[group]].as_py()


@lru_cache(maxsize=TABLES_OPEN)
def _cells(places: Places, uri: str, column: str, mtime_ns: int) -> _Cells:  # noqa: ARG001
    """Open a table, once while it does not change."""
    return _Cells(places.open(uri), column)


def bytes_column(schema: pa.Schema, wanted: str) -> str | None:
    """Return the column that holds the bytes of images; None if images are in a column of URIs.

    Raises:
        ConfigError: there is no such column, or which one is meant must be said.
    """
    names = [name for name in schema.names if _holds_bytes(schema.field(name).type)]
    if wanted:
        if wanted not in schema.names:
            raise ConfigError(
                f"--image-column {wanted!a} is no column; there are {', '.join(schema.names)}"
            )
        return wanted if wanted in names else None
    if len(names) > 1:
        names = [found] if (found := image_column(names, "")) else names
    if len(names) > 1:
        raise ConfigError(
            f"several columns hold bytes: {', '.join(names)}; name one with --image-column"
        )
    if not names and image_column(schema.names, "") is None:
        raise ConfigError(
            f"no column holds bytes or is called {', '.join(IMAGE_COLUMNS)}; there are "
            f"{', '.join(schema.names)}; name one with --image-column"
        )
    return names[0] if names else None


def cell_bytes(cell: Any, uri: str) -> bytes:
    """Return the bytes of a cell: binary, or a struct that has them under "bytes".

    Raises:
        ImageError: MISSING, the cell is empty.
    """
    value = cell.get("bytes") if isinstance(cell, dict) else cell
    if value is None:
        raise ImageError(ImageFailure.MISSING, f"{uri}: the cell is empty")
    return bytes(value)


def attribute_columns(schema: pa.Schema) -> list[str]:
    """Names of the columns whose values can be compared: numbers, texts, booleans, times."""
    tests = (
        pa.types.is_integer,
        pa.types.is_floating,
        pa.types.is_boolean,
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_decimal,
        pa.types.is_temporal,
        pa.types.is_dictionary,
    )
    return [each.name for each in schema if any(test(each.type) for test in tests)]


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with times as ISO 8601 texts, durations in seconds, and NaN as nothing."""
    return {name: _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, float) and math.isnan(value):
        return None
    return value


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _holds_bytes(kind.field(place).type)
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
    )

"""Images in Parquet tables: in a column of bytes, or named by a column of URIs.

A table is read one row group at a time, and only the columns that are needed.
"""

from __future__ import annotations

import threading
import weakref
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from reir.attributes import BadRow, validate_attributes
from reir.errors import ConfigError, ImageError, ImageFailure, SourceError
from reir_ingestion.sources.columns import IMAGE_COLUMNS, image_column
from reir_ingestion.sources.containers import ContainerSource
from reir_ingestion.sources.contract import OnError, Source, SourceFile
from reir_ingestion.sources.lists import ListSource
from reir_ingestion.sources.parquet_rows import parquet_rows
from reir_ingestion.sources.uri_reader import UriReader

CACHED_GROUPS = 2
"""Row groups of each table that a process keeps in memory. Two are enough, because the readers of a
process ask for rows nearly in order."""

# Each open table holds up to `CACHED_GROUPS` row groups with the bytes of their images.
MAX_OPEN_TABLES = 4


@dataclass(frozen=True)
class ParquetSource(ContainerSource):
    """The images in the rows of tables.

    An image is read again if its table has changed, and encoded again if its own bytes have.

    Attributes:
        image_column: the column with the bytes of the images.
    """

    image_column: str = ""

    kind: ClassVar[str] = "parquet"

    def images(self, container: SourceFile, on_error: OnError) -> Iterator[SourceFile]:
        """Yield the rows of a table; `on_error` is called for rows whose columns cannot be used.

        Raises:
            OSError: the table is damaged.
        """
        with self.reader.stream(container.uri) as stream:
            for number, columns in parquet_rows(stream):
                try:
                    attributes = validate_attributes(columns)
                except BadRow as error:
                    on_error(f"{container.uri}#{number}", error)
                    continue
                uri = self.uri_of(container, str(number))
                # The size stays 0: it would take reading the image. `number` starts at 1, the
                # offset at 0.
                yield SourceFile(uri, 0, self.time_of(container), attributes, number - 1)

    def read(self, file: SourceFile) -> bytes:
        """Return the bytes of an image.

        Raises:
            ImageError: MISSING (also for an empty cell), UNREADABLE or UNREACHABLE.
        """
        container = self.container_of(file)
        try:
            column = _open_column(self.reader, container, self.image_column, file.mtime_ns)
            cell = column.at(file.offset)
        except (pa.ArrowException, OSError, SourceError) as error:
            raise ImageError(ImageFailure.UNREADABLE, f"{container}: {error}") from error
        return cell_bytes(cell, file.uri)


def open_parquet(text: str, tables: Source, reader: UriReader, column: str) -> Source:
    """Open the images of tables; the first table shows whether they contain bytes or URIs.

    Raises:
        SourceError: there is no table, or the first one is damaged.
        ConfigError: the image column has to be given.
    """
    first = next(tables.uris(), None)
    if first is None:
        raise SourceError(
            f"source {text!a} contains no tables; looked for files ending in .parquet"
        )
    try:
        with reader.stream(first) as stream:
            schema = pq.ParquetFile(stream).schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{first} is not a Parquet table: {error}") from error
    found = bytes_column(schema, column)
    if found is None:
        return ListSource(text, tuple(tables.uris()), reader, column)
    return ParquetSource(text, tables, reader, found)


class _CachedColumn:
    """One column of an open table, read row group by row group."""

    def __init__(self, file: IO[bytes], column: str) -> None:
        # When the cache drops a column, another thread may still read from its file, so the file is
        # closed only when nobody refers to the column any more.
        weakref.finalize(self, file.close)
        self._table = table = pq.ParquetFile(file)
        self._column = column
        if column not in table.schema_arrow.names:
            raise OSError(f"there is no column {column!a}")
        self._groups: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        # Held while a row group is read: threads that need the same one wait for it.
        self._lock = threading.Lock()
        self._starts = [0]
        for group in range(table.metadata.num_row_groups):
            self._starts.append(self._starts[-1] + table.metadata.row_group(group).num_rows)

    def at(self, row: int) -> Any:
        """Return the cell of a row."""
        group = bisect_right(self._starts, row) - 1
        with self._lock:
            if group not in self._groups:
                read = self._table.read_row_group(group, columns=[self._column])
                self._groups[group] = read.column(0)
                if len(self._groups) > CACHED_GROUPS:
                    self._groups.popitem(last=False)
            return self._groups[group][row - self._starts[group]].as_py()


@lru_cache(maxsize=MAX_OPEN_TABLES)
def _open_column(reader: UriReader, uri: str, column: str, mtime_ns: int) -> _CachedColumn:  # noqa: ARG001
    """Return a column of a table, which is opened again only after the table has changed.

    `mtime_ns` is only a part of the key of the cache.
    """
    return _CachedColumn(reader.open(uri), column)


def bytes_column(schema: pa.Schema, wanted: str) -> str | None:
    """Return the column with the bytes of the images; None if a column has their URIs instead.

    Raises:
        ConfigError: there is no such column, or it has to be given.
    """
    names = [name for name in schema.names if _contains_bytes(schema.field(name).type)]
    if wanted:
        if wanted not in schema.names:
            raise ConfigError(
                f"--image-column {wanted!a} is not a column; "
                f"the columns are {', '.join(schema.names)}"
            )
        return wanted if wanted in names else None
    if len(names) > 1:  # several columns of bytes: take the one with a known name, if there is one
        names = [found] if (found := image_column(names, "")) else names
    if len(names) > 1:
        raise ConfigError(
            f"several columns contain bytes: {', '.join(names)}; choose one with --image-column"
        )
    if not names and image_column(schema.names, "") is None:
        raise ConfigError(
            f"no column contains bytes or is named {', '.join(IMAGE_COLUMNS)}; the columns are "
            f"{', '.join(schema.names)}; choose one with --image-column"
        )
    return names[0] if names else None


def cell_bytes(cell: Any, uri: str) -> bytes:
    """Return the bytes of a cell: binary, or a struct with a field "bytes".

    Raises:
        ImageError: MISSING, if the cell is empty.
    """
    value = cell.get("bytes") if isinstance(cell, dict) else cell
    if value is None:
        raise ImageError(ImageFailure.MISSING, f"{uri}: the cell is empty")
    return bytes(value)


def _contains_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _contains_bytes(kind.field(index).type)
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
    )

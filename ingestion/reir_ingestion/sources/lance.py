"""Images in a Lance table of this machine: their bytes in a column. Needs the extra `lance`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from reir.attributes import BadRow, checked
from reir.errors import ConfigError, ImageError, ImageFailure, SourceError
from reir.images import canonical_uri, path_of_uri
from reir_ingestion.sources.contract import OnError, SourceFile, ignore_error
from reir_ingestion.sources.held import HeldSource
from reir_ingestion.sources.parquet import (
    ROWS_AT_ONCE,
    TABLES_OPEN,
    attribute_columns,
    bytes_column,
    cell_bytes,
    plain,
)
from reir_ingestion.sources.places import Places

_ROW_ID = "_rowid"


@dataclass(frozen=True)
class LanceSource(HeldSource):
    """The images in the rows of a table; one has changed when its table has and its bytes have.

    Attributes:
        image_column: the column with the bytes.
    """

    image_column: str = ""

    kind: ClassVar[str] = "lance"

    def images(self, holder: SourceFile, on_error: OnError) -> Iterator[SourceFile]:
        """The rows, by the ids that Lance keeps when others are deleted.

        Raises:
            OSError: the table is damaged.
        """
        table = _opened(holder.uri)
        batches = table.scanner(
            columns=attribute_columns(table.schema),
            batch_size=ROWS_AT_ONCE,
            with_row_id=True,
            scan_in_order=True,
        ).to_batches()
        for place, row in enumerate(row for batch in batches for row in batch.to_pylist()):
            name = str(row.pop(_ROW_ID))
            try:
                attributes = checked(plain(row))
            except BadRow as error:
                on_error(f"{holder.uri}#{name}", error)
                continue
            yield SourceFile(self.uri_of(holder, name), 0, holder.mtime_ns, attributes, place)

    def read(self, file: SourceFile) -> bytes:
        """The bytes in a row.

        Raises:
            ImageError: MISSING (an empty cell) or UNREADABLE.
        """
        try:
            table = _table(self.holder_of(file), file.mtime_ns)
            (row,) = table.take([file.offset], columns=[self.image_column]).to_pylist()
        except (OSError, ValueError) as error:
            raise ImageError(ImageFailure.UNREADABLE, f"{file.uri}: {error}") from error
        return cell_bytes(row[self.image_column], file.uri)


@dataclass(frozen=True)
class _Table:
    """The one table of a `LanceSource`, as a source of its own: a folder with a time."""

    text: str
    uri: str

    def uris(self, on_error: OnError = ignore_error) -> Iterator[str]:
        return (file.uri for file in self.files(on_error))

    def files(self, on_error: OnError = ignore_error) -> Iterator[SourceFile]:
        del on_error
        *_, latest = _opened(self.uri).versions()
        yield SourceFile(self.uri, 0, int(latest["timestamp"].timestamp() * 1e9))

    def read(self, file: SourceFile) -> bytes:
        raise ImageError(ImageFailure.UNREADABLE, f"{file.uri} is a folder")

    def has_lost(self, uri: str) -> bool:
        return uri == self.uri and not os.path.lexists(path_of_uri(uri))


def open_lance(text: str, path: Path, column: str) -> LanceSource:
    """Return the images of the table in a folder.

    Raises:
        ConfigError: Lance is not installed, or the column with the images must be named.
        SourceError: there is no table.
    """
    table = _Table(text, canonical_uri(path))
    schema = _opened(table.uri).schema
    found = bytes_column(schema, column)
    if found is None:
        raise ConfigError(
            f"no column of {text!a} holds bytes; there are {', '.join(schema.names)}. For a column "
            f"of URIs write them to a list or a Parquet table"
        )
    return LanceSource(text, table, Places(), found)


def _opened(uri: str) -> Any:
    """The newest version of a table."""
    try:
        import lance
    except ImportError as error:
        raise ConfigError(
            "Lance tables need pylance: pip install 'reir-platform[lance]'"
        ) from error
    try:
        return lance.dataset(os.fspath(path_of_uri(uri)))
    except (ValueError, OSError) as error:
        raise SourceError(f"{uri} is no Lance table: {str(error).splitlines()[0]}") from error


@lru_cache(maxsize=TABLES_OPEN)
def _table(uri: str, mtime_ns: int) -> Any:  # noqa: ARG001
    """Open a table, once while it does not change."""
    return _opened(uri)

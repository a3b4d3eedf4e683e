"""Images in the rows of a local Lance table. Needs the extra `lance`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from reir.attributes import BadRow, validate_attributes
from reir.errors import ConfigError, ImageError, ImageFailure, SourceError
from reir.images.decode import canonical_uri, path_of_uri
from reir_ingestion.sources.containers import ContainerSource
from reir_ingestion.sources.contract import OnError, SourceFile, ignore_error
from reir_ingestion.sources.parquet import MAX_OPEN_TABLES, bytes_column, cell_bytes
from reir_ingestion.sources.parquet_rows import ROWS_AT_ONCE, attribute_columns, plain, rows_of
from reir_ingestion.sources.uri_reader import UriReader

_ROW_ID = "_rowid"


@dataclass(frozen=True)
class LanceSource(ContainerSource):
    """The images in the rows of a table.

    An image is read again if its table has changed, and encoded again if its own bytes have.

    Attributes:
        image_column: the column with the bytes of the images.
    """

    image_column: str = ""

    kind: ClassVar[str] = "lance"

    def images(self, container: SourceFile, on_error: OnError) -> Iterator[SourceFile]:
        """Yield the rows. Each is named by its row id, which it keeps when other rows are deleted.

        Raises:
            OSError: the table is damaged.
            SourceError: the version that was listed is gone.
        """
        table = _listed_version(container.uri, container.mtime_ns)
        batches = table.scanner(
            # Not the images themselves, which only `read` loads.
            columns=attribute_columns(table.schema),
            batch_size=ROWS_AT_ONCE,
            with_row_id=True,
            scan_in_order=True,  # `read` finds a row by its position in this order
        ).to_batches()
        for position, row in enumerate(row for batch in batches for row in rows_of(batch)):
            name = str(row.pop(_ROW_ID))
            try:
                attributes = validate_attributes(plain(row))
            except BadRow as error:
                on_error(f"{container.uri}#{name}", error)
                continue
            yield SourceFile(
                self.uri_of(container, name), 0, container.mtime_ns, attributes, position
            )

    def read(self, file: SourceFile) -> bytes:
        """Return the bytes of an image.

        Raises:
            ImageError: MISSING (an empty cell) or UNREADABLE.
        """
        try:
            table = _listed_version(self.container_of(file), file.mtime_ns)
            (row,) = table.take([file.offset], columns=[self.image_column]).to_pylist()
        except (OSError, ValueError, SourceError) as error:
            raise ImageError(ImageFailure.UNREADABLE, f"{file.uri}: {error}") from error
        return cell_bytes(row[self.image_column], file.uri)


@dataclass(frozen=True)
class _LanceTable:
    """The table itself, as a source with a single container, which is a folder."""

    text: str
    uri: str

    def uris(self, on_error: OnError = ignore_error) -> Iterator[str]:
        return (file.uri for file in self.files(on_error))

    def files(self, on_error: OnError = ignore_error) -> Iterator[SourceFile]:
        del on_error
        # A table is a folder, whose own time does not tell whether the table has changed.
        *_, latest = _open_latest(self.uri).versions()
        yield SourceFile(self.uri, 0, _time_ns(latest))

    def read(self, file: SourceFile) -> bytes:
        raise ImageError(ImageFailure.UNREADABLE, f"{file.uri} is a folder")

    def has_lost(self, uri: str) -> bool:
        return uri == self.uri and not os.path.lexists(path_of_uri(uri))


def open_lance(text: str, path: Path, column: str) -> LanceSource:
    """Open the images of the table in a folder.

    Raises:
        ConfigError: Lance is not installed, or the image column has to be given.
        SourceError: the folder is not a Lance table.
    """
    table = _LanceTable(text, canonical_uri(path))
    schema = _open_latest(table.uri).schema
    found = bytes_column(schema, column)
    if found is None:
        raise ConfigError(
            f"no column of {text!a} contains bytes; it has the columns {', '.join(schema.names)}. "
            f"Images by URI are supported in lists and Parquet tables only"
        )
    return LanceSource(text, table, UriReader(), found)


def _time_ns(version: Mapping[str, Any]) -> int:
    """Return the time of a version of a table."""
    return int(version["timestamp"].timestamp() * 1e9)


def _open_latest(uri: str) -> Any:
    """Open the latest version of a table.

    Raises:
        ConfigError: Lance is not installed.
        SourceError: the folder is not a Lance table.
    """
    try:
        import lance  # an optional dependency
    except ImportError as error:
        raise ConfigError(
            "Lance tables need pylance: pip install 'reir-platform[lance]'"
        ) from error
    try:
        return lance.dataset(os.fspath(path_of_uri(uri)))
    except (ValueError, OSError) as error:
        raise SourceError(f"{uri} is not a Lance table: {str(error).splitlines()[0]}") from error


@lru_cache(maxsize=MAX_OPEN_TABLES)
def _listed_version(uri: str, mtime_ns: int) -> Any:
    """Return the open table as it was listed, even if it has changed since.

    In another version, the position of a row may be that of another row.

    Raises:
        SourceError: that version is gone.
    """
    latest = _open_latest(uri)
    for version in reversed(latest.versions()):
        if _time_ns(version) == mtime_ns:
            return latest.checkout_version(version["version"])
    raise SourceError(f"{uri} has changed, and its version that was listed is gone; index it again")

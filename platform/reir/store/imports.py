"""New rows into a Milvus server by a file, which it reads from its own storage.

A server takes such files in with less work than upserts, but inserts without a look at the
keys: what it holds already it holds twice afterwards. So only rows that are surely new come this
way, no import is started twice, and whoever writes rows that an earlier import may still bring
waits for its end first (`Table.await_imports`).
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem, LocalFileSystem
from pymilvus import DataType

from reir.errors import StoreError, StoreUnavailable
from reir.object_storage import STORAGE_ERRORS, open_filesystem, without_secrets
from reir.store.rows import Row
from reir.store.table import PAGE_ROWS, Table

IMPORT_FROM_ROWS = 5_000
"""Fewer rows are upserted: an import takes some 20 seconds, however few they are."""

_ARROW_TYPES = {
    DataType.VARCHAR: pa.string(),
    DataType.JSON: pa.string(),
    DataType.INT64: pa.int64(),
    DataType.FLOAT: pa.float32(),
    DataType.FLOAT_VECTOR: pa.list_(pa.float32()),
}


logger = logging.getLogger(__name__)


def import_rows(table: Table, rows: Iterable[Row], storage: str) -> None:
    """Add rows whose keys the table does not have; returns when all of them are searched.

    Args:
        table: of a server.
        rows: with all columns.
        storage: URI of a folder in the bucket of the server (`reir.object_storage`), or a folder
            on disks that this machine shares with it.

    Raises:
        StoreError: the storage cannot be written, or the server cannot import what is there.
        StoreUnavailable: the server cannot be reached. It may go on importing all the same.
    """
    keys: list[str] = []
    with _staged(table, _noting(rows, table.key, keys), storage) as file:
        try:
            table.import_file(file)
        except StoreUnavailable:
            raise
        except StoreError as error:
            raise StoreError(
                f"{error}; bulk import needs a folder of the storage that the Milvus server "
                f"itself uses, got {without_secrets(storage)}"
            ) from error
    table.await_present(keys)


def _noting(rows: Iterable[Row], key: str, keys: list[str]) -> Iterator[Row]:
    for row in rows:
        keys.append(row[key])
        yield row


@contextmanager
def _staged(table: Table, rows: Iterable[Row], storage: str) -> Iterator[str]:
    """A file of the rows, while the block lasts; gives its path as the server knows it."""
    try:
        filesystem, folder, has_bucket = _opened(storage)
        path = f"{folder}/{table.name}-{uuid.uuid4().hex}.parquet"
        _write(filesystem, path, rows, table)
    except STORAGE_ERRORS as error:
        raise StoreError(
            f"cannot write a file for bulk import into {without_secrets(storage)}: {error}"
        ) from error
    try:
        yield path.partition("/")[2] if has_bucket else path
    finally:
        try:
            filesystem.delete_file(path)
        except STORAGE_ERRORS as error:  # what it brought is in the server
            logger.warning("%s is left behind: %s", without_secrets(path), error)


def _opened(storage: str) -> tuple[FileSystem, str, bool]:
    """The file system of the storage, the folder in it, and whether that begins with a bucket."""
    if "://" in storage:
        return *open_filesystem(storage), True
    folder = Path(storage).expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return LocalFileSystem(), str(folder), False


def _write(filesystem: FileSystem, path: str, rows: Iterable[Row], table: Table) -> None:
    schema = pa.schema([(name, _ARROW_TYPES[kind]) for name, kind in table.stored_columns()])
    remaining = iter(rows)
    with filesystem.open_output_stream(path) as stream, pq.ParquetWriter(stream, schema) as writer:
        while chunk := list(islice(remaining, PAGE_ROWS)):
            writer.write_table(pa.Table.from_pylist(list(map(_plain, chunk)), schema))


def _plain(row: Row) -> Row:
    """The row with its JSON as text."""
    return {k: json.dumps(v) if isinstance(v, dict) else v for k, v in row.items()}

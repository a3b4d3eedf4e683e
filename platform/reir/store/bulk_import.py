"""Bulk import: adds new rows to a Milvus server with a file, which it reads from its storage.

For a server, importing a file is less work than upserts of the same rows. But it does not check
keys: a row that exists already would exist twice afterwards. So only rows that are certainly new
are imported, no import is started twice, and a writer of rows that an unfinished import may still
add waits for its end first (`MilvusCollection.await_imports`).
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
from reir.store.collection import PAGE_ROWS, MilvusCollection
from reir.store.rows import Row

IMPORT_FROM_ROWS = 5_000
"""Fewer rows are upserted, since an import takes some 20 seconds even for one row."""

_ARROW_TYPES = {
    DataType.VARCHAR: pa.string(),
    DataType.JSON: pa.string(),  # a server parses it when it reads the file
    DataType.INT64: pa.int64(),
    DataType.FLOAT: pa.float32(),
    DataType.FLOAT_VECTOR: pa.list_(pa.float32()),
}


logger = logging.getLogger(__name__)


def import_rows(collection: MilvusCollection, rows: Iterable[Row], storage: str) -> None:
    """Add rows whose keys the collection does not have; return when searches find all of them.

    Args:
        collection: a collection on a server.
        rows: rows with all columns of the collection.
        storage: URI of a folder in the bucket of the server (`reir.object_storage`), or a folder
            on a disk that this machine shares with it.

    Raises:
        StoreError: the storage cannot be written, or the server cannot import what is there.
        StoreUnavailable: the server cannot be reached. It may continue the import nevertheless.
    """
    # Collected while the rows pass by: they may come from an iterator, which cannot be read twice.
    keys: list[str] = []
    with _staged_file(collection, _collect_keys(rows, collection.key, keys), storage) as file:
        try:
            collection.import_file(file)
        except StoreUnavailable:
            raise  # a `StoreError` too, but one that says nothing about the storage
        except StoreError as error:
            raise StoreError(
                f"{error}; bulk import needs a folder of the storage that the Milvus server "
                f"itself uses, got {without_secrets(storage)}"
            ) from error
    # An import counts as completed before searches can find its rows.
    collection.await_present(keys)


def _collect_keys(rows: Iterable[Row], key: str, keys: list[str]) -> Iterator[Row]:
    for row in rows:
        keys.append(row[key])
        yield row


@contextmanager
def _staged_file(collection: MilvusCollection, rows: Iterable[Row], storage: str) -> Iterator[str]:
    """Write a file of the rows, yield its path as the server sees it, and delete it at the end."""
    try:
        filesystem, folder, has_bucket = _open_storage(storage)
        # A name of its own, since several writers may import into one collection.
        path = f"{folder}/{collection.name}-{uuid.uuid4().hex}.parquet"
        _write(filesystem, path, rows, collection)
    except STORAGE_ERRORS as error:
        raise StoreError(
            f"cannot write a file for bulk import into {without_secrets(storage)}: {error}"
        ) from error
    try:
        # A server takes paths within the bucket that it is configured with.
        yield path.partition("/")[2] if has_bucket else path
    finally:
        try:
            filesystem.delete_file(path)
        # Not an error: an import that succeeded stays so, and one that failed has its own error.
        except STORAGE_ERRORS as error:
            logger.warning(
                "cannot delete the import file %s, which is no longer needed: %s",
                without_secrets(path),
                error,
            )


def _open_storage(storage: str) -> tuple[FileSystem, str, bool]:
    """Return the file system, the folder in it, and whether that starts with a bucket name."""
    if "://" in storage:
        return *open_filesystem(storage), True
    folder = Path(storage).expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return LocalFileSystem(), str(folder), False


def _write(
    filesystem: FileSystem, path: str, rows: Iterable[Row], collection: MilvusCollection
) -> None:
    # The server is asked, because versions differ in their columns: not all have masks, and those
    # of earlier releases lack the derived columns.
    schema = pa.schema([(name, _ARROW_TYPES[kind]) for name, kind in collection.stored_columns()])
    remaining = iter(rows)
    with filesystem.open_output_stream(path) as stream, pq.ParquetWriter(stream, schema) as writer:
        # In chunks, so that not all rows are in memory as dicts at the same time.
        while chunk := list(islice(remaining, PAGE_ROWS)):
            writer.write_table(pa.Table.from_pylist(list(map(_json_as_text, chunk)), schema))


def _json_as_text(row: Row) -> Row:
    """Return the row with its JSON values as text."""
    return {k: json.dumps(v) if isinstance(v, dict) else v for k, v in row.items()}

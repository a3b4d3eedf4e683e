"""`SavedBackup`: a backup to read: its manifest, its files, and its photos."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from reir.errors import DataError
from reir.operations.backup.folder import BackupFolder, open_folder
from reir.operations.backup.format import images_of, instances_schema, photos_schema
from reir.operations.backup.manifest import BackupFile, Manifest, read_manifest
from reir.operations.backup.reports import Progress
from reir.object_storage import STORAGE_ERRORS
from reir.records import IndexedImage


@dataclass(frozen=True)
class SavedBackup:
    """A finished backup.

    Attributes:
        folder: where it is.
        manifest: what it contains.
    """

    folder: BackupFolder
    manifest: Manifest

    def check(self, progress: Progress) -> None:
        """Check size and checksum of all files.

        Args:
            progress: called with the number of bytes that were checked.

        Raises:
            DataError: a file is missing or damaged; the message names it.
        """
        sizes, done = self.folder.sizes(), 0
        # All sizes first: a copy that was interrupted is recognized at once.
        for file in self.manifest.files:
            self._check_size(file, sizes.get(file.name))
        for file in self.manifest.files:
            self._content(file)
            done += file.bytes
            progress("checking bytes", done, self.manifest.num_bytes)

    def parts(self) -> Iterator[list[IndexedImage]]:
        """Yield all photos, those of two files at a time.

        Raises:
            DataError: a file is missing or damaged; the message names it.
        """
        dim = self.manifest.spec.dim
        schemas = photos_schema(dim), instances_schema(dim)
        for pair in self.manifest.pairs():
            tables = [self._table(file, schema) for file, schema in zip(pair, schemas, strict=True)]
            try:
                yield images_of(*tables)
            except (ValueError, TypeError) as error:
                raise self._damaged(pair[0], str(error)) from error

    def _content(self, file: BackupFile) -> Any:
        """Return the content of a file, whose checksum is correct."""
        content = self.folder.read(file.name)
        self._check_size(file, content.size)
        if hashlib.sha256(content).hexdigest() != file.sha256:
            raise self._damaged(file, "its content does not match its checksum")
        return content

    def _check_size(self, file: BackupFile, size: int | None) -> None:
        if size is None:
            raise DataError(f"{self.folder.place}/{file.name} is missing; use another backup")
        if size != file.bytes:
            raise self._damaged(file, f"it has {size:,} bytes instead of {file.bytes:,}")

    def _table(self, file: BackupFile, schema: Any) -> Any:
        """Return the rows of a file, with the columns of a schema."""
        try:
            table = pq.read_table(pa.BufferReader(self._content(file)), columns=schema.names)
            table = table.select(schema.names).cast(schema)
        except (*STORAGE_ERRORS, KeyError) as error:
            raise self._damaged(file, f"it does not have the columns of a backup ({error})") from error
        if table.num_rows != file.rows:
            raise self._damaged(file, f"it has {table.num_rows} rows instead of {file.rows}")
        return table

    def _damaged(self, file: BackupFile, why: str) -> DataError:
        return DataError(f"{self.folder.place}/{file.name} is damaged: {why}; use another backup")


def open_backup(place: str) -> SavedBackup:
    """Open a backup.

    Args:
        place: its folder, as `open_folder` takes it.

    Raises:
        ConfigError: the kind of storage or an option is unknown.
        DataError: there is no finished backup, its manifest is damaged, or a newer release wrote
            it.
    """
    folder = open_folder(place)
    return SavedBackup(folder, read_manifest(folder))

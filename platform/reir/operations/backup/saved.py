"""`SavedBackup`: a backup to read: its manifest, its files, and its photos."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from reir.errors import DataError
from reir.object_storage import STORAGE_ERRORS
from reir.operations.backup.folder import BackupFolder, open_folder
from reir.operations.backup.format import (
    images_of,
    instances_schema,
    photos_schema,
    records_of,
    vectors_of,
)
from reir.operations.backup.manifest import BackupFile, Manifest, read_manifest
from reir.operations.backup.reports import Progress
from reir.records import FloatArray, ImageRecord, IndexedImage


@dataclass(frozen=True)
class SavedBackup:
    """A finished backup.

    Attributes:
        folder: where it is.
        manifest: what it contains.
        left_out: image id -> number of instances of the photos that are not to be restored.
    """

    folder: BackupFolder
    manifest: Manifest
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_photos(self) -> int:
        """Number of photos to restore."""
        return self.manifest.counts.photos - len(self.left_out)

    @property
    def num_instances(self) -> int:
        """Number of instances to restore."""
        return self.manifest.counts.instances - sum(self.left_out.values())

    def without(self, records: Iterable[ImageRecord]) -> SavedBackup:
        """Return the backup without some of its photos."""
        return replace(self, left_out={each.image_id: each.num_instances for each in records})

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
            with self._reading(pair[0]):
                images = images_of(*tables)
            yield [each for each in images if each.record.image_id not in self.left_out]

    def record_parts(self) -> Iterator[list[ImageRecord]]:
        """Yield the ledger rows of all photos, those of one file at a time.

        Raises:
            DataError: a file is missing or damaged; the message names it.
        """
        schema = photos_schema(self.manifest.spec.dim)
        for file, _ in self.manifest.pairs():
            table = self._table(file, schema)
            with self._reading(file):
                records = records_of(table)
            yield [each for each in records if each.image_id not in self.left_out]

    def instances(self, rows: Sequence[int]) -> tuple[list[str], FloatArray]:
        """Return image ids and vectors of some instances, also of photos that are left out.

        Args:
            rows: numbers of rows of all files of instances together, in ascending order.

        Raises:
            DataError: a file is missing or damaged; the message names it.
        """
        dim = self.manifest.spec.dim
        ids: list[str] = []
        vectors = [np.empty((0, dim), dtype=np.float32)]
        first = 0
        for _, file in self.manifest.pairs():
            wanted = [row - first for row in rows if first <= row < first + file.rows]
            first += file.rows
            if wanted:
                table = self._table(file, instances_schema(dim)).take(wanted)
                ids += table["image_id"].to_pylist()
                vectors.append(vectors_of(table))
        return ids, np.concatenate(vectors)

    def _content(self, file: BackupFile) -> Any:
        """Return the content of a file, whose checksum is correct."""
        # Checked at every reading, since the folder may have changed after `check`.
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
            opened = pq.ParquetFile(pa.BufferReader(self._content(file)))
            if missing := sorted(set(schema.names) - set(opened.schema_arrow.names)):
                raise self._damaged(file, f"it has no column {missing[0]!r}")
            table = opened.read(schema.names).select(schema.names).cast(schema)
        except STORAGE_ERRORS as error:
            raise self._damaged(file, str(error).partition("\n")[0]) from error
        if table.num_rows != file.rows:
            raise self._damaged(file, f"it has {table.num_rows} rows instead of {file.rows}")
        return table

    @contextmanager
    def _reading(self, file: BackupFile) -> Iterator[None]:
        """Turn errors about values that are not allowed into one that names the file."""
        try:
            yield
        except (ValueError, TypeError) as error:
            raise self._damaged(file, str(error)) from error

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

"""`PairWriter`: writes the files of a backup, and replaces photos that have changed since.

Photos come in runs, each of which is ordered by image id. Only the files of one number per run are
in memory, however large the gallery is.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from reir.operations.backup.folder import BackupFolder
from reir.operations.backup.format import (
    INSTANCES,
    LEDGER_COLUMNS,
    PHOTOS,
    Counts,
    counts_of,
    file_name,
    instances_schema,
    instances_table,
    open_writer,
    photos_schema,
    photos_table,
    records_of,
    without_images,
)
from reir.operations.backup.manifest import BackupFile
from reir.records import ImageRecord, IndexedImage

FILE_BYTES = 64 * 2**20
"""Size at which a file is complete; no file is larger by more than one batch of photos."""


@dataclass
class Pair:
    """The two files of one number.

    Attributes:
        number: their number.
        files: the file of photos and the file of instances.
        counts: what they contain, including dropped photos.
        dropped: ids of photos that are in the files but not in the backup.
    """

    number: int
    files: list[BackupFile]
    counts: Counts
    dropped: set[str] = field(default_factory=set)


class _OpenFile:
    """A Parquet file that is being written, in memory."""

    def __init__(self, kind: str, schema: Any) -> None:
        self.kind = kind
        self._sink = pa.BufferOutputStream()
        self._writer = open_writer(self._sink, schema)
        self.rows = 0

    @property
    def size_bytes(self) -> int:
        """Bytes so far."""
        return int(self._sink.tell())

    def add(self, table: Any) -> None:
        """Append rows."""
        if table.num_rows:
            self._writer.write_table(table)
            self.rows += table.num_rows

    def save(self, folder: BackupFolder, number: int) -> BackupFile:
        """Write the file to the folder."""
        self._writer.close()
        content = memoryview(self._sink.getvalue())
        name = file_name(self.kind, number)
        folder.write(name, content)
        return BackupFile(
            name=name,
            bytes=content.nbytes,
            sha256=hashlib.sha256(content).hexdigest(),
            rows=self.rows,
        )


class PairWriter:
    """Writes photos to the folder of a backup."""

    def __init__(self, folder: BackupFolder, dim: int) -> None:
        """Write photos whose vectors have `dim` dimensions."""
        self._folder, self._dim = folder, dim
        self._runs: list[list[Pair]] = [[]]
        self._open: list[_OpenFile] = []
        self._counts = Counts()
        self._number = 0

    def add(self, images: Sequence[IndexedImage]) -> None:
        """Append photos to the current run.

        Raises:
            DataError: a file cannot be written.
        """
        if not images:
            return
        if not self._open:
            self._open = self._new_files()
            self._counts = Counts()
        tables = photos_table(images, self._dim), instances_table(images, self._dim)
        for file, table in zip(self._open, tables, strict=True):
            file.add(table)
        self._counts += counts_of(*tables)
        if max(file.size_bytes for file in self._open) >= FILE_BYTES:
            self._complete_pair()

    def start_run(self) -> None:
        """Start a new run: ids may be smaller again than those that were added before."""
        self._complete_pair()
        # Otherwise every sweep that finds nothing would leave an empty run behind.
        if self._runs[-1]:
            self._runs.append([])

    def rows(self) -> Iterator[tuple[ImageRecord, Pair]]:
        """Yield the ledger rows of all photos with their files, in no particular order."""
        self._complete_pair()
        for pair in self._pairs():
            yield from self._rows_of(pair)

    def rows_by_id(self) -> Iterator[tuple[ImageRecord, Pair]]:
        """Start a new run, and yield the ledger rows of all photos before, ordered by image id."""
        self.start_run()
        # The new run is among these, but it is empty when the merge begins. So the merge does not
        # yield what the caller adds to the run while it reads.
        return heapq.merge(
            *(self._rows_of_run(run) for run in self._runs), key=lambda row: row[0].image_id
        )

    def finish(self) -> tuple[list[BackupFile], Counts]:
        """Remove dropped photos from the files; return all files, and what they contain.

        Raises:
            DataError: a file cannot be read or written.
        """
        self._complete_pair()
        pairs = [pair for pair in self._pairs() if self._without_dropped(pair)]
        files = [file for pair in pairs for file in pair.files]
        return files, sum((pair.counts for pair in pairs), Counts())

    def delete(self) -> None:
        """Delete all files that were written."""
        numbers = range(self._number)
        self._folder.delete(file_name(kind, n) for kind in (PHOTOS, INSTANCES) for n in numbers)

    def _new_files(self) -> list[_OpenFile]:
        return [
            _OpenFile(PHOTOS, photos_schema(self._dim)),
            _OpenFile(INSTANCES, instances_schema(self._dim)),
        ]

    def _complete_pair(self) -> None:
        """Save the open files."""
        if self._open:
            number, self._number = self._number, self._number + 1
            files = [file.save(self._folder, number) for file in self._open]
            self._runs[-1].append(Pair(number, files, self._counts))
            self._open = []

    def _pairs(self) -> Iterator[Pair]:
        return (pair for run in self._runs for pair in run)

    def _rows_of_run(self, run: Sequence[Pair]) -> Iterator[tuple[ImageRecord, Pair]]:
        for pair in run:
            yield from self._rows_of(pair)

    def _rows_of(self, pair: Pair) -> Iterator[tuple[ImageRecord, Pair]]:
        with self._folder.open(pair.files[0].name) as file:
            # Parquet stores columns apart, so the large vectors of the photos are not read.
            table = pq.ParquetFile(file).read(list(LEDGER_COLUMNS))
        for record in records_of(table):
            if record.image_id not in pair.dropped:
                yield record, pair

    def _without_dropped(self, pair: Pair) -> bool:
        """Write the files of a pair again without dropped photos; False if none is left."""
        if not pair.dropped:
            return True
        names = [file.name for file in pair.files]
        # Numbers of files may have gaps, so the files that follow keep their names.
        if len(pair.dropped) == pair.counts.photos:
            self._folder.delete(names)
            return False
        opened = [self._folder.read(name) for name in names]
        tables = [pq.ParquetFile(pa.BufferReader(each)).read() for each in opened]
        tables = [without_images(table, pair.dropped) for table in tables]
        files = self._new_files()
        for file, table in zip(files, tables, strict=True):
            file.add(table)
        pair.files = [file.save(self._folder, pair.number) for file in files]
        pair.counts, pair.dropped = counts_of(*tables), set()
        return True

"""`Journal`: all writes to one version of an embedded store, in order, which searches read.

Readers in any process apply new writes from the journal, so they search without asking Milvus Lite.
Milvus Lite is the store of record: a journal that is missing or damaged is rebuilt from it.

A journal is two files. The rows file (`mapped_rows.py`) holds the numbers, one row of 5 + D per
instance, and every reader maps it into memory. The journal file names the rows file and is a
sequence of frames, appended under the version's write lock:

    magic, D, token of the rows file | end of the frames, end of the rows, checksum of both
    magic, length of the text, end of the rows, checksum of the rows, checksum of the rest | JSON

A frame either puts images, whose rows are the last ones before its end of the rows, or deletes
images. Rows are written before their frame. A writer killed in between leaves rows that nobody
reads and that the next writer overwrites. A writer killed in the middle of a frame leaves a partial
frame that readers ignore and that the next writer cuts off. After each frame, the end of the frames
is recorded at the start of the file. So a journal that ends earlier has been truncated.

As with the write-ahead log of Milvus Lite, a write survives a killed process, but not always a
power failure: nothing waits for the disk, which would take longer than the write. So a third file,
the stamp, records the end of the frames and the boot of the machine in which they were written. A
journal without a valid stamp, such as an older copy restored from a backup, is compared with the
store before it is used (`reir.store.embedded.version_journals`):

    boot id, inode of the journal file, end of the frames, ctime of the journal file, checksum
"""

# Shapes: N instances of a frame, W = 5 + D for vectors of dimension D, R rows up to a frame's end

from __future__ import annotations

import contextlib
import json
import os
import secrets
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from reir.records import Attributes, FloatArray, IndexedImage, Instances
from reir.store.embedded.mapped_rows import MappedRows, RowsTruncatedError

NUM_COLUMNS = 5
"""Numbers before the vector: x1, y1, x2, y2, objectness."""

_START = struct.Struct("<4sI8s")
_END = struct.Struct("<QQI")
FIRST_FRAME = _START.size + _END.size
"""Offset of the first frame."""

_HEADER = struct.Struct("<4sIQI")
_CHECKSUM = struct.Struct("<I")
_STAMP = struct.Struct("<36sQQQI")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# A release that changes the format changes these, too. It then takes a journal of an earlier
# release for a damaged one, and rebuilds it from the store.
_MAGIC = b"rjn4"
_FRAME_MAGIC = b"frm2"
_READS = 3
"""Number of attempts to read the recorded end, since a writer may be changing it at that moment."""


class JournalDamagedError(Exception):
    """A checksum does not match, or data is missing; the journal must be rebuilt."""


@dataclass(frozen=True)
class JournalImage:
    """One image of a frame: what its instances have in common, and their number."""

    image_id: str
    uri: str
    num_instances: int
    attributes: Attributes
    content_hash: str


@dataclass(frozen=True)
class Change:
    """The content of one frame.

    Attributes:
        puts: images to add, each replacing any earlier image of its id.
        rows: (N, W) float32, the instances of `puts`, in order.
        deletes: ids of images to delete.
    """

    puts: Sequence[JournalImage]
    rows: FloatArray
    deletes: Sequence[str] = ()

    def parts(self) -> Iterator[tuple[JournalImage, FloatArray]]:
        """Yield each image of `puts` with its rows."""
        start = 0
        for image in self.puts:
            yield image, self.rows[start : start + image.num_instances]
            start += image.num_instances


@dataclass(frozen=True)
class Frame:
    """A change that was read from a journal.

    Attributes:
        change: the content of the frame.
        table: (R, W) all rows of the file up to the last one of this change. They are mapped into
            memory, and read from the disk only when they are used.
        end: offset in the journal after this frame.
    """

    change: Change
    table: FloatArray
    end: int


class Journal:
    """One open journal; use a separate object in each thread."""

    def __init__(self, path: Path, dim: int, *, to_write: bool = False) -> None:
        """Open an existing journal of vectors of dimension `dim`, read-only unless `to_write`.

        Raises:
            FileNotFoundError: there is no journal.
            JournalDamagedError: its format or dimension is not the expected one, or its rows file
                is missing.
        """
        self.path = path
        self._end, self._end_row = FIRST_FRAME, 0
        while True:
            self._file = os.open(path, (os.O_RDWR if to_write else os.O_RDONLY) | os.O_CLOEXEC)
            try:
                self._rows = self._open_rows(dim, to_write)
            except (FileNotFoundError, JournalDamagedError) as error:
                # Another process may have replaced both files since we opened the first; try again.
                replaced = not self.is_current
                os.close(self._file)
                if not replaced:
                    raise JournalDamagedError(f"{path} cannot be opened: {error}") from error
            else:
                return

    @staticmethod
    def create(path: Path, dim: int, changes: Iterable[Change] = ()) -> None:
        """Write a journal of these changes to `path`, atomically replacing any that is there.

        The caller holds the version's write lock.
        """
        # A rows file of its own, so that readers of the journal that is replaced keep theirs.
        token = secrets.token_hex(4)
        # The journal at `temporary` finds these rows, because `_rows_path` replaces the suffix.
        temporary, rows = path.with_suffix(".new"), _rows_path(path, token)
        try:
            temporary.write_bytes(_START.pack(_MAGIC, dim, token.encode()) + _end(FIRST_FRAME, 0))
            rows.touch()
            with contextlib.closing(Journal(temporary, dim, to_write=True)) as journal:
                for change in changes:
                    journal.append(change)
                temporary.replace(path)
                journal.write_stamp()  # after the rename, since that changes the ctime in the stamp
        except BaseException:
            # The disk may be full, so nothing useless may stay on it.
            if temporary.exists():  # otherwise the rows already belong to the journal at `path`
                rows.unlink(missing_ok=True)
                temporary.unlink()
            raise
        _remove_rows(path, but=token)

    @staticmethod
    def remove(path: Path) -> None:
        """Delete the journal and its rows; readers can still use the files that they have open."""
        path.unlink(missing_ok=True)
        path.with_suffix(".stamp").unlink(missing_ok=True)
        _remove_rows(path)

    @property
    def is_current(self) -> bool:
        """Whether the open file is still at its path, neither replaced nor deleted."""
        # Both leave the open file without a name. Every search asks, and this takes a single call.
        return os.fstat(self._file).st_nlink > 0

    @property
    def size(self) -> int:
        """Length of the journal file in bytes, without the rows file."""
        return os.fstat(self._file).st_size

    @property
    def has_valid_stamp(self) -> bool:
        """Whether the stamp proves that no power failure or restored copy lost any frames."""
        try:
            data = self.path.with_suffix(".stamp").read_bytes()
        except OSError:
            return False
        if len(data) != _STAMP.size or data != _stamp(*_STAMP.unpack(data)[:4]):
            return False
        boot, file, end, changed_ns, _ = _STAMP.unpack(data)
        state = os.fstat(self._file)
        # The boot, because a power failure may lose writes that no process waited for. The time of
        # the last change, because inode and length also match an older copy that was put back.
        as_now = (_boot_id(), state.st_ino, state.st_ctime_ns)
        return (boot, file, changed_ns) == as_now and end <= state.st_size

    def write_stamp(self) -> None:
        """Record that the journal is complete up to its recorded end.

        The caller holds the version's write lock.
        """
        state = os.fstat(self._file)
        data = _stamp(_boot_id(), state.st_ino, self._recorded_end(), state.st_ctime_ns)
        file = os.open(self.path.with_suffix(".stamp"), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
        try:
            os.pwrite(file, data, 0)  # over the old stamp, which has the same length
        finally:
            os.close(file)

    def append(self, change: Change) -> None:
        """Append a change; the caller holds the version's write lock.

        Raises:
            JournalDamagedError: the existing journal cannot be read.
        """
        # Without a valid stamp, earlier frames may be missing, which a new stamp would hide.
        was_valid = self.has_valid_stamp
        self._find_end()
        if len(change.rows):
            self._rows.write(self._end_row, change.rows)
        end_row = self._end_row + len(change.rows)
        frame = _encode(change, end_row)
        os.ftruncate(self._file, self._end)  # cut off a partial frame of a killed writer
        written = 0
        while written < len(frame):  # `pwrite` may write less than it was given
            written += os.pwrite(self._file, frame[written:], self._end + written)
        self._end, self._end_row = self._end + len(frame), end_row
        os.pwrite(self._file, _end(self._end, end_row), _START.size)
        if was_valid:
            self.write_stamp()

    def read(self, offset: int = FIRST_FRAME) -> Iterator[Frame]:
        """Yield the complete frames from `offset` on.

        Raises:
            JournalDamagedError: a frame or its rows do not match their checksum, or frames are
                missing.
        """
        return (self._frame(*each) for each in self._complete_frames(offset))

    def images(self) -> dict[str, JournalImage]:
        """Return the images that the journal holds now, by id, without reading their rows.

        Raises:
            JournalDamagedError: a frame does not match its checksum, or frames are missing.
        """
        found: dict[str, JournalImage] = {}
        for data, offset in self._complete_frames(FIRST_FRAME):
            puts, deletes = self._parse(data, offset)
            found.update({image.image_id: image for image in puts})
            for image_id in deletes:
                found.pop(image_id, None)
        return found

    def close(self) -> None:
        """Close the files; tables that were read stay valid. Further calls do nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._rows.close()
            self._file = -1

    def _open_rows(self, dim: int, to_write: bool) -> MappedRows:
        start = os.pread(self._file, _START.size, 0)
        if len(start) < _START.size or start[: len(_MAGIC)] != _MAGIC:
            raise JournalDamagedError(f"{self.path} does not start like a journal of this release")
        _, found_dim, token = _START.unpack(start)
        if found_dim != dim:
            raise JournalDamagedError(f"{self.path} has dimension {found_dim}, expected {dim}")
        path = _rows_path(self.path, token.decode("ascii", "replace"))
        return MappedRows(path, NUM_COLUMNS + dim, to_write=to_write)

    def _find_end(self) -> None:
        """Move to the end of the last complete frame; other writers may have appended frames."""
        recorded = self._recorded_end()
        while True:
            header = os.pread(self._file, _HEADER.size, self._end)
            length = self._next_end(memoryview(header), self._end, self.size - self._end)
            if length is None:
                self._check_end(self._end, recorded)
                return
            self._end_row = int(_HEADER.unpack(header)[2])
            self._end += length

    def _next_end(self, data: memoryview, offset: int, available: int | None = None) -> int | None:
        """Length of the frame at the start of `data`; None if the frame is incomplete."""
        if len(data) < _HEADER.size:
            return None
        magic, text_bytes, _, _ = _HEADER.unpack_from(data)
        if magic != _FRAME_MAGIC:
            raise JournalDamagedError(f"{self.path} has no valid frame at byte {offset}")
        length = _HEADER.size + _CHECKSUM.size + int(text_bytes)
        return length if length <= (len(data) if available is None else available) else None

    def _complete_frames(self, offset: int) -> Iterator[tuple[memoryview, int]]:
        """Yield the bytes and the offset of each complete frame from `offset` on."""
        # Read before the frames: those that a writer appends meanwhile may only make them longer.
        recorded = self._recorded_end()
        data = self._bytes_from(offset)
        start = 0
        while (end := self._next_end(data[start:], offset + start)) is not None:
            yield data[start : start + end], offset + start
            start += end
        self._check_end(offset + start, recorded)

    def _bytes_from(self, offset: int) -> memoryview:
        end, parts = self.size, []
        while offset < end:  # one `pread` returns at most 2 GiB
            part = os.pread(self._file, end - offset, offset)
            if not part:  # the file was truncated meanwhile
                break
            parts.append(part)
            offset += len(part)
        return memoryview(b"".join(parts))

    def _recorded_end(self) -> int:
        """End of the frames, from the header. A killed writer may have left more bytes after it."""
        # Writers do not lock out readers, so a wrong checksum may mean that one is writing.
        for _ in range(_READS):
            data = os.pread(self._file, _END.size, _START.size)
            if len(data) == _END.size and data == _end(*_END.unpack(data)[:2]):
                return int(_END.unpack(data)[0])
        raise JournalDamagedError(f"the end recorded in {self.path} has a wrong checksum")

    def _check_end(self, found: int, recorded: int) -> None:
        if min(found, self.size) < recorded:
            raise JournalDamagedError(
                f"{self.path} ends at byte {found}, but byte {recorded} is recorded as its end"
            )

    def _parse(
        self, data: memoryview, offset: int
    ) -> tuple[tuple[JournalImage, ...], tuple[str, ...]]:
        """Return the images that a frame puts, and the ids of those that it deletes."""
        head, text = data[: _HEADER.size], data[_HEADER.size + _CHECKSUM.size :]
        (checksum,) = _CHECKSUM.unpack_from(data, _HEADER.size)
        if zlib.crc32(text, zlib.crc32(head)) != checksum:
            raise JournalDamagedError(
                f"the frame at byte {offset} of {self.path} has a wrong checksum"
            )
        parsed: dict[str, list[Any]] = json.loads(bytes(text))
        return tuple(JournalImage(*each) for each in parsed["put"]), tuple(parsed["delete"])

    def _frame(self, data: memoryview, offset: int) -> Frame:
        puts, deletes = self._parse(data, offset)
        _, _, end_row, rows_checksum = _HEADER.unpack_from(data)
        try:
            table = self._rows.view(end_row)
        except RowsTruncatedError as error:
            raise JournalDamagedError(str(error)) from error
        rows = table[end_row - sum(image.num_instances for image in puts) :]
        if zlib.crc32(rows.data) != rows_checksum:
            raise JournalDamagedError(
                f"the rows of {self.path} up to {end_row} have a wrong checksum"
            )
        return Frame(Change(puts, rows, deletes), table, offset + len(data))


def put_change(images: Iterable[IndexedImage], dim: int) -> Change:
    """Return the change that puts these images, with vectors of dimension `dim`."""
    batch = list(images)
    blocks = [_rows(image.instances) for image in batch if image.instances is not None]
    # Comes before the blocks, because `concatenate` fails if a batch has no instances at all.
    empty = np.empty((0, NUM_COLUMNS + dim), dtype=np.float32)
    return Change([_journal_image(image) for image in batch], np.concatenate([empty, *blocks]))


def delete_change(image_ids: Sequence[str], dim: int) -> Change:
    """Return the change that deletes these images."""
    return Change([], np.empty((0, NUM_COLUMNS + dim), dtype=np.float32), image_ids)


def live_changes(journal: Journal) -> Iterator[Change]:
    """Yield the content of a journal without images that were replaced or deleted."""
    # Read twice, because only the end of the journal says which frame has the last state of an
    # image; holding all rows in memory instead could take gigabytes.
    last: dict[str, int] = {}
    for frame in journal.read():
        last.update({image.image_id: frame.end for image in frame.change.puts})
        for image_id in frame.change.deletes:
            last.pop(image_id, None)
    for frame in journal.read():
        kept = [part for part in frame.change.parts() if last.get(part[0].image_id) == frame.end]
        if kept:
            yield Change([image for image, _ in kept], np.concatenate([rows for _, rows in kept]))


def _encode(change: Change, end_row: int) -> bytes:
    puts = [
        [each.image_id, each.uri, each.num_instances, each.attributes, each.content_hash]
        for each in change.puts
    ]
    text = json.dumps({"put": puts, "delete": list(change.deletes)}).encode()
    rows_checksum = zlib.crc32(np.ascontiguousarray(change.rows).data)
    head = _HEADER.pack(_FRAME_MAGIC, len(text), end_row, rows_checksum)
    return head + _CHECKSUM.pack(zlib.crc32(text, zlib.crc32(head))) + text


def _end(offset: int, row: int) -> bytes:
    return _END.pack(offset, row, zlib.crc32(struct.pack("<QQ", offset, row)))


def _stamp(boot: bytes, file: int, end: int, changed_ns: int) -> bytes:
    checksum = zlib.crc32(struct.pack("<36sQQQ", boot, file, end, changed_ns))
    return _STAMP.pack(boot, file, end, changed_ns, checksum)


@cache
def _boot_id() -> bytes:
    """Id of this boot. Without one, a random id, which matches the stamps of this process only."""
    known = _BOOT_ID.read_bytes().strip() if _BOOT_ID.exists() else secrets.token_hex(18).encode()
    return known[:36]


def _journal_image(image: IndexedImage) -> JournalImage:
    record = image.record
    shared = record.uri, record.num_instances, dict(record.attributes), record.content_hash
    return JournalImage(record.image_id, *shared)


def _rows(instances: Instances) -> FloatArray:
    return np.column_stack([instances.boxes, instances.objectness, instances.vectors])


def _rows_path(path: Path, token: str) -> Path:
    return path.with_suffix(f".{token}.rows")


def _remove_rows(path: Path, but: str = "") -> None:
    """Delete the rows files of a journal, including those that a killed writer left behind."""
    for found in path.parent.glob(f"{path.stem}.*.rows"):
        if not but or found != _rows_path(path, but):
            found.unlink(missing_ok=True)

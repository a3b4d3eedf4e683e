"""The journal of one version: what was written to the embedded store, in order, for its readers.

Readers in any process follow the journal and so answer without asking the store. The store of
record is Milvus Lite: a journal that is missing or damaged is written anew from it.

It is two files. The rows file (`reir.store.rowfile`) holds the numbers, one row of 5 + D an
instance, and is mapped by every reader. The journal itself names it and is a row of frames,
appended under the version's write lock:

    magic, D, token of the rows file | end of the frames, end of the rows, checksum of both
    magic, length of the text, end of the rows, checksum of the rows, checksum of the rest | JSON

A frame either puts images, whose rows are the last ones before its end of the rows, or deletes
them. Rows are written before their frame, so a writer killed in between leaves rows that nobody
reads and the next writer overwrites; killed in the middle of a frame it leaves a tail that readers
do not touch and the next writer cuts off. Where the frames end is noted at the beginning, after
each frame: a journal that ends before that was cut, and counts as damaged.

As with the log of Milvus Lite, what was written survives a killed process but not always a power
cut. So a third file, the stamp, tells since which start of the machine which file was written how
far, and when last; a journal that it does not vouch for, such as an older copy that was put back,
is compared with the store first (`reir.store.mirror`):

    boot id, number of the journal's file, end of the frames, time of its last change, checksum
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
from reir.store.rowfile import RowFile, RowFileDamagedError

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
_MAGIC = b"rjn4"
_FRAME_MAGIC = b"frm2"
_READS = 3
"""Of the noted end: one beside a writer may see half of it."""


class JournalDamagedError(Exception):
    """A whole frame or its rows do not match their checksum: the journal has to be written anew."""


@dataclass(frozen=True)
class JournalImage:
    """One image of a frame: what its instances share and come from, and how many there are."""

    image_id: str
    uri: str
    num_instances: int
    attributes: Attributes
    content_hash: str


@dataclass(frozen=True)
class Change:
    """What one frame is to say.

    Attributes:
        puts: images that replace what was there under their ids.
        rows: (N, W) float32, the instances of `puts` in order.
        deletes: ids of images that went.
    """

    puts: Sequence[JournalImage]
    rows: FloatArray
    deletes: Sequence[str] = ()

    def parts(self) -> Iterator[tuple[JournalImage, FloatArray]]:
        """Each image that was put, with its rows."""
        start = 0
        for image in self.puts:
            yield image, self.rows[start : start + image.num_instances]
            start += image.num_instances


@dataclass(frozen=True)
class Frame:
    """A change as it was read.

    Attributes:
        change: what it says.
        table: (R, W) all rows of the file up to the last of this change; mapped, not read.
        end: offset in the journal after this frame.
    """

    change: Change
    table: FloatArray
    end: int


class Journal:
    """One open journal; use one object a thread."""

    def __init__(self, path: Path, dim: int, *, to_write: bool = False) -> None:
        """Open an existing journal of vectors of dimension `dim`, to read it unless `to_write`.

        Raises:
            FileNotFoundError: there is none.
            JournalDamagedError: it is not one of this dimension, or its rows file is missing.
        """
        self.path = path
        self._end, self._end_row = FIRST_FRAME, 0
        while True:
            self._file = os.open(path, (os.O_RDWR if to_write else os.O_RDONLY) | os.O_CLOEXEC)
            try:
                self._rows = self._open_rows(dim, to_write)
            except (FileNotFoundError, JournalDamagedError) as error:
                replaced = not self.is_current  # between the opening of the one and of the other
                os.close(self._file)
                if not replaced:
                    raise JournalDamagedError(f"{path} cannot be opened: {error}") from error
            else:
                return

    @staticmethod
    def create(path: Path, dim: int, changes: Iterable[Change] = ()) -> None:
        """Write a journal of these changes in the place of `path`, at once or not at all.

        The caller holds the version's write lock.
        """
        token = secrets.token_hex(4)
        temporary = path.with_suffix(".new")
        temporary.write_bytes(_START.pack(_MAGIC, dim, token.encode()) + _end(FIRST_FRAME, 0))
        _rows_path(path, token).touch()
        with contextlib.closing(Journal(temporary, dim, to_write=True)) as journal:
            for change in changes:
                journal.append(change)
            temporary.replace(path)
            journal.vouch()  # only now: the new name counts as a change of the file
        _remove_rows(path, but=token)

    @staticmethod
    def remove(path: Path) -> None:
        """Delete the journal and its rows; readers keep what they have open."""
        path.unlink(missing_ok=True)
        path.with_suffix(".stamp").unlink(missing_ok=True)
        _remove_rows(path)

    @property
    def is_current(self) -> bool:
        """Whether this is still the file under its path: not replaced and not deleted."""
        return os.fstat(self._file).st_nlink > 0

    @property
    def size(self) -> int:
        """Bytes in the journal, rows not counted."""
        return os.fstat(self._file).st_size

    @property
    def is_vouched(self) -> bool:
        """Whether no power cut, and nobody with an older copy, can have taken frames from it."""
        try:
            data = self.path.with_suffix(".stamp").read_bytes()
        except OSError:
            return False
        if len(data) != _STAMP.size or data != _stamp(*_STAMP.unpack(data)[:4]):
            return False
        boot, file, end, changed_ns, _ = _STAMP.unpack(data)
        state = os.fstat(self._file)
        as_now = (_boot_id(), state.st_ino, state.st_ctime_ns)
        return (boot, file, changed_ns) == as_now and end <= state.st_size

    def vouch(self) -> None:
        """Note that all is there up to the noted end; the caller holds the version's write lock."""
        state = os.fstat(self._file)
        data = _stamp(_boot_id(), state.st_ino, self._noted_end(), state.st_ctime_ns)
        file = os.open(self.path.with_suffix(".stamp"), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
        try:
            os.pwrite(file, data, 0)
        finally:
            os.close(file)

    def append(self, change: Change) -> None:
        """Add a change; the caller holds the version's write lock.

        Raises:
            JournalDamagedError: what is there cannot be read.
        """
        was_vouched = self.is_vouched  # else frames before this one may be missing, now as later
        self._find_end()
        if len(change.rows):
            self._rows.write(self._end_row, change.rows)
        end_row = self._end_row + len(change.rows)
        frame = _encode(change, end_row)
        os.ftruncate(self._file, self._end)
        written = 0
        while written < len(frame):
            written += os.pwrite(self._file, frame[written:], self._end + written)
        self._end, self._end_row = self._end + len(frame), end_row
        os.pwrite(self._file, _end(self._end, end_row), _START.size)
        if was_vouched:
            self.vouch()

    def read(self, offset: int = FIRST_FRAME) -> Iterator[Frame]:
        """Frames from `offset` on, as far as they are whole.

        Raises:
            JournalDamagedError: a frame or its rows do not match their checksum, or frames are
                missing.
        """
        return (self._frame(*each) for each in self._whole(offset))

    def images(self) -> dict[str, JournalImage]:
        """Each image that there is now, by its id; the rows are not read.

        Raises:
            JournalDamagedError: a frame does not match its checksum, or frames are missing.
        """
        found: dict[str, JournalImage] = {}
        for data, offset in self._whole(FIRST_FRAME):
            puts, deletes = self._said(data, offset)
            found.update({image.image_id: image for image in puts})
            for image_id in deletes:
                found.pop(image_id, None)
        return found

    def close(self) -> None:
        """Close the files; tables that were read stay valid. A second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._rows.close()
            self._file = -1

    def _open_rows(self, dim: int, to_write: bool) -> RowFile:
        start = os.pread(self._file, _START.size, 0)
        if len(start) < _START.size or start[: len(_MAGIC)] != _MAGIC:
            raise JournalDamagedError(f"{self.path} does not begin like a journal of this release")
        _, found_dim, token = _START.unpack(start)
        if found_dim != dim:
            raise JournalDamagedError(f"{self.path} has dimension {found_dim}, expected {dim}")
        path = _rows_path(self.path, token.decode("ascii", "replace"))
        return RowFile(path, NUM_COLUMNS + dim, to_write=to_write)

    def _find_end(self) -> None:
        """Go on to the end of the last whole frame; other writers may have added some."""
        noted = self._noted_end()
        while True:
            header = os.pread(self._file, _HEADER.size, self._end)
            length = self._next_end(memoryview(header), self._end, self.size - self._end)
            if length is None:
                self._check_end(self._end, noted)
                return
            self._end_row = int(_HEADER.unpack(header)[2])
            self._end += length

    def _next_end(self, data: memoryview, offset: int, available: int | None = None) -> int | None:
        """Length of the frame that `data` begins with, None when there is no whole one."""
        if len(data) < _HEADER.size:
            return None
        magic, text_bytes, _, _ = _HEADER.unpack_from(data)
        if magic != _FRAME_MAGIC:
            raise JournalDamagedError(f"{self.path} has no valid frame at byte {offset}")
        length = _HEADER.size + _CHECKSUM.size + int(text_bytes)
        return length if length <= (len(data) if available is None else available) else None

    def _whole(self, offset: int) -> Iterator[tuple[memoryview, int]]:
        """Bytes and offset of each whole frame from `offset` on."""
        noted = self._noted_end()
        data = memoryview(os.pread(self._file, max(0, self.size - offset), offset))
        start = 0
        while (end := self._next_end(data[start:], offset + start)) is not None:
            yield data[start : start + end], offset + start
            start += end
        self._check_end(offset + start, noted)

    def _noted_end(self) -> int:
        """Where the frames end, as the last writer has noted; a killed one may have written on."""
        for _ in range(_READS):
            data = os.pread(self._file, _END.size, _START.size)
            if len(data) == _END.size and data == _end(*_END.unpack(data)[:2]):
                return int(_END.unpack(data)[0])
        raise JournalDamagedError(f"the end recorded in {self.path} has a wrong checksum")

    def _check_end(self, found: int, noted: int) -> None:
        if min(found, self.size) < noted:
            raise JournalDamagedError(
                f"{self.path} ends at byte {found}, but byte {noted} is recorded as its end"
            )

    def _said(
        self, data: memoryview, offset: int
    ) -> tuple[tuple[JournalImage, ...], tuple[str, ...]]:
        """Images that a frame puts, and ids of those that it deletes."""
        head, text = data[: _HEADER.size], data[_HEADER.size + _CHECKSUM.size :]
        (checksum,) = _CHECKSUM.unpack_from(data, _HEADER.size)
        if zlib.crc32(text, zlib.crc32(head)) != checksum:
            raise JournalDamagedError(
                f"the frame at byte {offset} of {self.path} has a wrong checksum"
            )
        said: dict[str, list[Any]] = json.loads(bytes(text))
        return tuple(JournalImage(*each) for each in said["put"]), tuple(said["delete"])

    def _frame(self, data: memoryview, offset: int) -> Frame:
        puts, deletes = self._said(data, offset)
        _, _, end_row, rows_checksum = _HEADER.unpack_from(data)
        try:
            table = self._rows.view(end_row)
        except RowFileDamagedError as error:
            raise JournalDamagedError(str(error)) from error
        rows = table[end_row - sum(image.num_instances for image in puts) :]
        if zlib.crc32(rows.data) != rows_checksum:
            raise JournalDamagedError(
                f"the rows of {self.path} up to {end_row} have a wrong checksum"
            )
        return Frame(Change(puts, rows, deletes), table, offset + len(data))


def put_change(images: Iterable[IndexedImage], dim: int) -> Change:
    """Change that puts these images, with vectors of dimension `dim`."""
    batch = list(images)
    blocks = [_rows(image.instances) for image in batch if image.instances is not None]
    empty = np.empty((0, NUM_COLUMNS + dim), dtype=np.float32)
    return Change([_journal_image(image) for image in batch], np.concatenate([empty, *blocks]))


def delete_change(image_ids: Sequence[str], dim: int) -> Change:
    """Change that deletes these images."""
    return Change([], np.empty((0, NUM_COLUMNS + dim), dtype=np.float32), image_ids)


def live_changes(journal: Journal) -> Iterator[Change]:
    """Changes that say the same as the whole journal without what was replaced or deleted."""
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
    """Of this start of the machine; where there is none, of this process, so others compare."""
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
    """Delete the rows files of a journal, those left by a writer that was killed too."""
    for found in path.parent.glob(f"{path.stem}.*.rows"):
        if not but or found != _rows_path(path, but):
            found.unlink(missing_ok=True)

"""The journal of one version: what was written to the embedded store, in order, for its readers.

Readers in any process follow the file and so answer from memory without asking the store. The
store of record is Milvus Lite: a journal that is missing or damaged is written anew from it.

The file is a row of frames, appended under the version's write lock:

    magic, length of the text, length of the numbers, checksum of both | JSON text | float32 numbers

A frame either puts images (numbers: one row of 5 + D an instance: box, objectness, vector) or
deletes them. A writer killed in the middle of a frame leaves a tail that readers do not touch and
the next writer cuts off. As with the log of Milvus Lite, what was written survives a killed
process but not always a power cut.
"""

# Shapes: N instances of a frame, D vector dimension

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reir.records import Attributes, FloatArray, IndexedImage, Instances

NUM_COLUMNS = 5
"""Numbers before the vector: x1, y1, x2, y2, objectness."""

_HEADER = struct.Struct("<4sIQI")
_MAGIC = b"rjn1"


class JournalDamagedError(Exception):
    """A whole frame does not match its checksum: the journal has to be written anew."""


@dataclass(frozen=True)
class JournalImage:
    """One image of a frame: what its instances share, and how many there are."""

    image_id: str
    uri: str
    num_instances: int
    attributes: Attributes


@dataclass(frozen=True)
class Frame:
    """One change.

    Attributes:
        puts: images that replace what was there under their ids.
        deletes: ids of images that went.
        rows: (N, 5 + D) float32, the instances of `puts` in order.
        end: offset in the file after this frame.
    """

    puts: tuple[JournalImage, ...]
    deletes: tuple[str, ...]
    rows: FloatArray
    end: int

    def parts(self) -> Iterator[tuple[JournalImage, FloatArray]]:
        """Each image that was put, with its rows."""
        start = 0
        for image in self.puts:
            yield image, self.rows[start : start + image.num_instances]
            start += image.num_instances


class Journal:
    """One open journal file; use one object a thread."""

    def __init__(self, path: Path, dim: int) -> None:
        """Open an existing journal of vectors of dimension `dim`.

        Raises:
            FileNotFoundError: there is none.
        """
        self.path = path
        self._width = NUM_COLUMNS + dim
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._end = 0

    @staticmethod
    def create(path: Path, frames: Iterable[bytes] = ()) -> None:
        """Write a journal with these frames in the place of `path`, at once or not at all."""
        temporary = path.with_suffix(".new")
        with temporary.open("wb") as file:
            file.writelines(frames)
        temporary.replace(path)

    @property
    def is_current(self) -> bool:
        """Whether this is still the file under its path: not replaced and not deleted."""
        return os.fstat(self._file).st_nlink > 0

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return os.fstat(self._file).st_size

    def append(self, frame: bytes) -> None:
        """Add a frame; the caller holds the version's write lock.

        Raises:
            JournalDamagedError: what is there cannot be read.
        """
        while (end := self._next_end(self._end)) is not None:
            self._end = end
        os.ftruncate(self._file, self._end)
        written = 0
        while written < len(frame):
            written += os.pwrite(self._file, frame[written:], self._end + written)
        self._end += len(frame)

    def read(self, offset: int = 0) -> Iterator[Frame]:
        """Frames from `offset` on, as far as they are whole.

        Raises:
            JournalDamagedError: a frame does not match its checksum.
        """
        while (end := self._next_end(offset)) is not None:
            yield self._frame(offset, end)
            offset = end

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _next_end(self, offset: int) -> int | None:
        """End of the frame at `offset`, None when there is no whole one."""
        header = os.pread(self._file, _HEADER.size, offset)
        if len(header) < _HEADER.size:
            return None
        magic, text_bytes, number_bytes, _ = _HEADER.unpack(header)
        if magic != _MAGIC:
            raise JournalDamagedError(f"{self.path} has no frame at byte {offset}")
        end = offset + _HEADER.size + int(text_bytes) + int(number_bytes)
        return end if end <= self.size else None

    def _frame(self, offset: int, end: int) -> Frame:
        data = os.pread(self._file, end - offset, offset)
        _, text_bytes, _, checksum = _HEADER.unpack_from(data)
        payload = memoryview(data)[_HEADER.size :]
        if zlib.crc32(payload) != checksum:
            raise JournalDamagedError(f"{self.path} has a bad checksum at byte {offset}")
        text: dict[str, list[Any]] = json.loads(bytes(payload[:text_bytes]))
        rows = np.frombuffer(payload[text_bytes:], dtype=np.float32).reshape(-1, self._width)
        puts = tuple(JournalImage(*each) for each in text["put"])
        return Frame(puts=puts, deletes=tuple(text["delete"]), rows=rows, end=end)


def put_frame(images: Iterable[IndexedImage]) -> bytes:
    """Frame that puts these images."""
    return encode_frame([(_journal_image(image), _rows(image.instances)) for image in images])


def delete_frame(image_ids: Sequence[str]) -> bytes:
    """Frame that deletes these images."""
    return encode_frame([], image_ids)


def encode_frame(
    puts: Sequence[tuple[JournalImage, FloatArray]], deletes: Sequence[str] = ()
) -> bytes:
    """Frame of images with their (N, 5 + D) rows, and of ids that went."""
    listed = [[each.image_id, each.uri, each.num_instances, each.attributes] for each, _ in puts]
    text = json.dumps({"put": listed, "delete": list(deletes)}).encode()
    payload = text + b"".join(rows.tobytes() for _, rows in puts)
    checksum = zlib.crc32(payload)
    return _HEADER.pack(_MAGIC, len(text), len(payload) - len(text), checksum) + payload


def live_frames(journal: Journal) -> Iterator[bytes]:
    """Frames that say the same as the whole journal without what was replaced or deleted."""
    last: dict[str, int] = {}
    for frame in journal.read():
        last.update({image.image_id: frame.end for image in frame.puts})
        for image_id in frame.deletes:
            last.pop(image_id, None)
    for frame in journal.read():
        kept = [part for part in frame.parts() if last.get(part[0].image_id) == frame.end]
        if kept:
            yield encode_frame(kept)


def _journal_image(image: IndexedImage) -> JournalImage:
    record = image.record
    return JournalImage(record.image_id, record.uri, record.num_instances, dict(record.attributes))


def _rows(instances: Instances | None) -> FloatArray:
    if instances is None:
        return np.empty((0, 0), dtype=np.float32)
    return np.column_stack([instances.boxes, instances.objectness, instances.vectors])

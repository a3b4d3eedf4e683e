"""`MappedRows`: rows of numbers in a file that every process maps into its memory.

The operating system keeps one copy of the pages, however many processes read them. A writer appends
rows; the journal (`journal.py`) says how many of them are valid. The file grows in large steps, as
a sparse file that is longer than its rows, so that readers rarely have to map it again.
"""

# Shapes: N rows, W numbers a row

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np

from reir.records import FloatArray

_STEP_ROWS = 16_384
"""The length of the file is a multiple of this number of rows."""


class RowsTruncatedError(Exception):
    """The file ends before rows that it should contain."""


class MappedRows:
    """(N, W) float32 in a file; a row that is written never changes."""

    def __init__(self, path: Path, width: int, *, to_write: bool = False) -> None:
        """Open an existing file of rows of `width` numbers, read-only unless `to_write`.

        Raises:
            FileNotFoundError: there is no such file.
        """
        self.path = path
        self._width = width
        self._file = os.open(path, (os.O_RDWR if to_write else os.O_RDONLY) | os.O_CLOEXEC)
        self._mapped: FloatArray = np.empty((0, width), dtype=np.float32)

    def write(self, first: int, rows_NW: FloatArray) -> None:
        """Write rows from number `first` on; only one writer at a time is allowed."""
        data = np.ascontiguousarray(rows_NW, dtype=np.float32).data.cast("B")
        steps = -(-(first + len(rows_NW)) // _STEP_ROWS)
        if os.fstat(self._file).st_size < self._bytes(steps * _STEP_ROWS):
            os.ftruncate(self._file, self._bytes(steps * _STEP_ROWS))
        position = self._bytes(first)
        while data:  # `pwrite` may write less than it was given
            written = os.pwrite(self._file, data, position)
            data, position = data[written:], position + written

    def view(self, stop: int) -> FloatArray:
        """The first `stop` rows: a read-only view of the mapped file.

        Raises:
            RowsTruncatedError: the file ends before them.
        """
        length = os.fstat(self._file).st_size
        if length < self._bytes(stop):
            raise RowsTruncatedError(f"{self.path} ends before row {stop}")
        if stop > len(self._mapped):
            # The whole file is mapped, also where rows are still missing, so that readers need no
            # new mapping when a writer adds them. Older arrays keep their own mapping alive.
            pages = mmap.mmap(self._file, length, access=mmap.ACCESS_READ)
            count = length // self._bytes(1)
            numbers = np.frombuffer(pages, dtype=np.float32, count=count * self._width)
            self._mapped = numbers.reshape(count, self._width)
        return self._mapped[:stop]

    def close(self) -> None:
        """Close the file. Arrays that were returned stay valid; closing again does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _bytes(self, rows: int) -> int:
        return rows * self._width * np.dtype(np.float32).itemsize

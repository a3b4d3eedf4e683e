"""Rows of numbers in one file that every process maps: one copy in memory, however many readers.

A writer puts rows at the end; which rows count is said elsewhere (`reir.store.journal`). The file
is longer than its rows: it grows in steps, sparse, so that readers seldom have to map it anew.
"""

# Shapes: N rows, W numbers a row

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np

from reir.records import FloatArray

_STEP_ROWS = 16_384


class RowFileDamagedError(Exception):
    """The file ends before rows that it should hold."""


class RowFile:
    """(N, W) float32 in a file; rows are written once and never changed."""

    def __init__(self, path: Path, width: int, *, to_write: bool = False) -> None:
        """Open an existing file of rows of `width` numbers, read-only unless `to_write`.

        Raises:
            FileNotFoundError: there is none.
        """
        self.path = path
        self._width = width
        self._file = os.open(path, (os.O_RDWR if to_write else os.O_RDONLY) | os.O_CLOEXEC)
        self._mapped: FloatArray = np.empty((0, width), dtype=np.float32)

    def write(self, first: int, rows_NW: FloatArray) -> None:
        """Write rows from number `first` on; one writer at a time."""
        data = np.ascontiguousarray(rows_NW, dtype=np.float32).data.cast("B")
        steps = -(-(first + len(rows_NW)) // _STEP_ROWS)
        if os.fstat(self._file).st_size < self._bytes(steps * _STEP_ROWS):
            os.ftruncate(self._file, self._bytes(steps * _STEP_ROWS))
        position = self._bytes(first)
        while data:
            written = os.pwrite(self._file, data, position)
            data, position = data[written:], position + written

    def view(self, stop: int) -> FloatArray:
        """The first `stop` rows: the file's own pages, read-only.

        Raises:
            RowFileDamagedError: the file ends before them.
        """
        length = os.fstat(self._file).st_size
        if length < self._bytes(stop):
            raise RowFileDamagedError(f"{self.path} ends before row {stop}")
        if stop > len(self._mapped):
            pages = mmap.mmap(self._file, length, access=mmap.ACCESS_READ)
            count = length // self._bytes(1)
            numbers = np.frombuffer(pages, dtype=np.float32, count=count * self._width)
            self._mapped = numbers.reshape(count, self._width)
        return self._mapped[:stop]

    def close(self) -> None:
        """Close the file; views stay valid. A second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _bytes(self, rows: int) -> int:
        return rows * self._width * np.dtype(np.float32).itemsize

"""Vectors as bytes: a scan of them tells which few rows an exact search has to look at.

A fixed rotation spreads what a vector holds evenly over its dimensions, whatever encoder it is of;
each number is then rounded to a byte. Inner products of bytes take a quarter of the time of those
of float32, and differ from the exact ones by no more than a bound that is known for every query. So
rows that are left out are left out for sure.
"""

# Shapes: N instances, D vector dimension, M rows that are proposed

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cache
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from reir.records import FloatArray
from reir.store.columns import GrowingArray

_LARGEST = 127
_ZERO = 128  # faiss keeps a signed byte as value + 128
_DEVIATIONS = 6.0
"""Numbers of a rotated unit vector have a deviation of 1 / sqrt(D); larger ones than so many of
those are cut off, once in some 10^9 numbers."""
_AT_ONCE = 16_384
_SLACK = 1e-5
"""What float32 may lose in an exact score."""


@dataclass(frozen=True)
class Coded:
    """The codes of the first rows as they were at one moment; read in any thread.

    Attributes:
        codes: (N, D).
        error: the largest distance of a vector from what its code stands for.
        longest: the largest length of what a code stands for.
    """

    codes: npt.NDArray[np.uint8]
    error: float
    longest: float

    def best(self, query: FloatArray, num: int) -> tuple[npt.NDArray[np.int64], float]:
        """Propose rows for a search.

        Args:
            query: (D,) float32, not 0.
            num: M, of N at most.

        Returns:
            (M,) rows of the largest inner products by their codes, in the order of the rows; and a
            bound that the exact inner product of no other row exceeds.
        """
        (turned,) = _rotation(len(query)).apply(query[None])
        scale = _LARGEST / float(np.abs(turned).max())
        rounded = np.rint(turned * scale)
        scores = np.full(num, -np.inf, dtype=np.float32)
        rows = np.full(num, -1, dtype=np.int64)
        scanner = _scanner(len(query))
        scanner.set_query(faiss.swig_ptr(rounded))
        scanner.set_list(0, 0)
        found = faiss.swig_ptr(scores), faiss.swig_ptr(rows)
        scanner.scan_codes(len(self.codes), faiss.swig_ptr(self.codes), None, *found, num)
        lost = float(np.linalg.norm(turned - rounded / scale)) * self.longest
        lost += float(np.linalg.norm(turned)) * self.error
        least = float(scores.min()) / (scale * _scale(len(query)))
        rows.sort()
        return rows, least + lost + _SLACK


class Codes:
    """Codes of rows that grow in number; for one thread at a time."""

    def __init__(self, dim: int) -> None:
        """Start empty, for vectors of dimension `dim`."""
        self._dim = dim
        self._bytes = GrowingArray(np.uint8)
        self._error = self._longest = 0.0

    def __len__(self) -> int:
        """Rows that have a code."""
        return len(self._bytes) // self._dim

    def follow(self, vectors: FloatArray) -> None:
        """Code the next rows of (N, D) vectors, `_AT_ONCE` of them at most: some 40 ms of work."""
        fresh = vectors[len(self) : len(self) + _AT_ONCE]
        if not len(fresh):
            return
        # numpy's product would take several threads for five rows, and those wait busily for more
        faiss.omp_set_num_threads(1)
        turned, scale = _rotation(self._dim).apply(fresh), _scale(self._dim)
        levels = np.rint(turned * scale).clip(-_LARGEST, _LARGEST)
        meant = levels / scale
        self._error = max(self._error, float(np.linalg.norm(turned - meant, axis=1).max()))
        self._longest = max(self._longest, float(np.linalg.norm(meant, axis=1).max()))
        self._bytes.append((levels + _ZERO).astype(np.uint8).ravel())

    @property
    def now(self) -> Coded:
        """What there is; stays as it is when more are added."""
        return Coded(self._bytes.view.reshape(-1, self._dim), self._error, self._longest)


def _scale(dim: int) -> float:
    """Levels of a code a unit of length."""
    return float(_LARGEST * np.sqrt(dim) / _DEVIATIONS)


@cache
def _rotation(dim: int) -> Any:
    """The same in every process."""
    drawn = np.random.default_rng(0).standard_normal((dim, dim))
    rotation = faiss.LinearTransform(dim, dim)
    faiss.copy_array_to_vector(np.linalg.qr(drawn)[0].astype(np.float32).ravel(), rotation.A)
    rotation.is_trained = True
    return rotation


def _scanner(dim: int) -> Any:
    """Return faiss' scanner of codes, one for each thread, since it remembers its query.

    faiss leaves it to nobody to give one back, so that a new one for each query would be a leak.
    """
    known: dict[int, Any] = _OF_THREAD.__dict__.setdefault("scanners", {})
    if dim not in known:
        known[dim] = _quantizer(dim).select_InvertedListScanner(
            faiss.METRIC_INNER_PRODUCT, None, True, None, False
        )
    return known[dim]


_OF_THREAD = threading.local()


@cache
def _quantizer(dim: int) -> Any:
    return faiss.ScalarQuantizer(dim, faiss.ScalarQuantizer.QT_8bit_direct_signed)

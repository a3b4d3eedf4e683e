"""Scalar quantization: int8 codes that tell which few rows an exact search has to score.

A search scans the codes of all rows, takes the rows with the best approximate scores, and scores
those exactly in float32 (`exact_index.py`, the only user of this module). Each query has an upper
bound for the exact score of every row that was left out. A result is returned only if it beats that
bound, so results are the same, bit by bit, as those of a full scan.

When: from 8,192 rows on, for queries that come alone or in small groups, unless a filter keeps less
than a fifth of the rows.

Gain: a full scan of a million vectors of 256 dimensions takes 41.9 ms, this search 11.4 ms. These
are medians on one thread: `p1.1m.faiss.p50_ms` and `p1.1m.ours.p50_ms` in
`benchmarks/results/vector_search_million.json`. Memory bandwidth limits a full scan, and codes have
a quarter of the bytes.

Cost: D bytes per row in each process that searches.
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
from reir.store.embedded.filter_columns import GrowingArray

_MAX_CODE = 127
_CODE_OFFSET = 128
"""faiss stores a signed 8-bit code as an unsigned byte, code + 128."""

_CLIP_DEVIATIONS = 6.0
"""The components of a rotated unit vector have a standard deviation of 1 / sqrt(D). Components
beyond this many deviations are clipped, which happens about once in 10^9."""

_ROWS_PER_CALL = 16_384
_FLOAT32_ERROR = 1e-5
"""Upper bound of the rounding error of an exact score in float32."""


@dataclass(frozen=True)
class Int8Snapshot:
    """The codes of the first rows at one moment; safe to read in any thread.

    Attributes:
        codes: (N, D), unsigned as faiss stores them.
        max_error: the largest distance between a vector and its decoded code.
        max_norm: the largest norm of a decoded code.
    """

    codes: npt.NDArray[np.uint8]
    max_error: float
    max_norm: float

    def best(self, query: FloatArray, num: int) -> tuple[npt.NDArray[np.int64], float]:
        """Propose rows for an exact search.

        Args:
            query: (D,) float32, not the zero vector.
            num: M, at most N.

        Returns:
            (M,) row numbers with the largest approximate inner products, in ascending order; and an
            upper bound for the exact inner product of every other row.
        """
        (rotated,) = _rotation(len(query)).apply(query[None])
        # The query uses the whole range of its own codes: its scale cancels out of the ranking.
        query_scale = _MAX_CODE / float(np.abs(rotated).max())
        rounded = np.rint(rotated * query_scale)
        scores = np.full(num, -np.inf, dtype=np.float32)
        rows = np.full(num, -1, dtype=np.int64)
        scanner = _scanner(len(query))
        scanner.set_query(faiss.swig_ptr(rounded))
        scanner.set_list(0, 0)
        found = faiss.swig_ptr(scores), faiss.swig_ptr(rows)
        scanner.scan_codes(len(self.codes), faiss.swig_ptr(self.codes), None, *found, num)
        # With q the query, q' its decoded code, v a vector and v' its decoded code, Cauchy-Schwarz
        # gives |q.v - q'.v'| = |(q - q').v' + q.(v - v')| <= |q - q'| |v'| + |q| |v - v'|.
        error = float(np.linalg.norm(rotated - rounded / query_scale)) * self.max_norm
        error += float(np.linalg.norm(rotated)) * self.max_error
        lowest = float(scores.min()) / (query_scale * _scale(len(query)))
        rows.sort()
        return rows, lowest + error + _FLOAT32_ERROR


class Int8Codes:
    """The codes of an index, whose rows only grow in number; not thread-safe."""

    def __init__(self, dim: int) -> None:
        """Start empty, for vectors of dimension `dim`."""
        self._dim = dim
        self._codes = GrowingArray(np.uint8)
        self._max_error = self._max_norm = 0.0

    def __len__(self) -> int:
        """Number of rows that have a code."""
        return len(self._codes) // self._dim

    def extend(self, vectors: FloatArray) -> None:
        """Encode the next rows of the (N, D) vectors.

        At most `_ROWS_PER_CALL` rows, which take some 40 ms: a search calls this before it scans,
        and must not wait until a large gallery is encoded.
        """
        added = vectors[len(self) : len(self) + _ROWS_PER_CALL]
        if not len(added):
            return
        # Rotated by faiss on one thread. numpy's product would start several threads even for five
        # rows, and those busy-wait afterwards, which slows every other search on the machine.
        faiss.omp_set_num_threads(1)
        rotated, scale = _rotation(self._dim).apply(added), _scale(self._dim)
        codes = np.rint(rotated * scale).clip(-_MAX_CODE, _MAX_CODE)
        decoded = codes / scale
        errors = np.linalg.norm(rotated - decoded, axis=1)
        self._max_error = max(self._max_error, float(errors.max()))
        self._max_norm = max(self._max_norm, float(np.linalg.norm(decoded, axis=1).max()))
        self._codes.append((codes + _CODE_OFFSET).astype(np.uint8).ravel())

    @property
    def snapshot(self) -> Int8Snapshot:
        """The codes so far; extending does not change a snapshot."""
        codes = self._codes.view.reshape(-1, self._dim)
        return Int8Snapshot(codes, self._max_error, self._max_norm)


def _scale(dim: int) -> float:
    """Factor from a vector component to its code.

    The same for all encoders, since after the rotation the components of unit vectors have the same
    distribution whatever encoder they come from.
    """
    return float(_MAX_CODE * np.sqrt(dim) / _CLIP_DEVIATIONS)


@cache
def _rotation(dim: int) -> Any:
    """A random rotation, the same in every process.

    It spreads each vector evenly over all dimensions. Without it, an encoder that puts most of a
    vector into one dimension would lose the precision of all others.
    """
    matrix = np.random.default_rng(0).standard_normal((dim, dim))
    rotation = faiss.LinearTransform(dim, dim)
    faiss.copy_array_to_vector(np.linalg.qr(matrix)[0].astype(np.float32).ravel(), rotation.A)
    rotation.is_trained = True
    return rotation


def _scanner(dim: int) -> Any:
    """Return the faiss scanner of this thread; it holds the query, so threads cannot share one.

    Kept, because faiss' Python binding never frees a scanner: one per query would leak memory.
    """
    known: dict[int, Any] = _thread_local.__dict__.setdefault("scanners", {})
    if dim not in known:
        known[dim] = _quantizer(dim).select_InvertedListScanner(
            faiss.METRIC_INNER_PRODUCT, None, True, None, False
        )
    return known[dim]


_thread_local = threading.local()


@cache
def _quantizer(dim: int) -> Any:
    return faiss.ScalarQuantizer(dim, faiss.ScalarQuantizer.QT_8bit_direct_signed)

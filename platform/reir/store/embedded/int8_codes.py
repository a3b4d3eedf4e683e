"""Scalar quantization: int8 codes that tell which few rows an exact search has to score.

A search scans the codes of all rows, takes the rows with the best approximate scores, and scores
those exactly in float32 (`exact_index.py`, the only user of this module). Each query has an upper
bound for the exact score of every row that was left out. A result is returned only if it beats that
bound, so results are the same, bit by bit, as those of a full scan.

When: from 8,192 rows on, for queries that come alone or in small groups, unless a filter keeps less
than a seventh of the rows.

Gain: a full scan of a million vectors of 305 dimensions takes 46.3 ms, this search 18.5 ms. These
are medians on one thread: `p1.1m.faiss.p50_ms` and `p1.1m.ours.p50_ms` in
`benchmarks/results/vector_search_million.json`. Memory bandwidth limits a full scan, and codes have
a quarter of the bytes.

Cost: C bytes per row in each process that searches.
"""

# Shapes: N instances, D vector dimension, C >= D dimension of codes, M rows that are proposed

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

_HEADROOM = 1.2
"""How much larger than any component of the first rows a component may be without being clipped.
Clipping only makes the bound higher, so that searches score more rows."""

_CODES_AT_ONCE = 16
"""The number of codes in a row must be a multiple of this. Otherwise, faiss multiplies them one by
one, which takes several times as long."""

_ROWS_PER_CALL = 16_384
_FLOAT32_ERROR = 1e-5
"""Upper bound of the rounding error of an exact score in float32."""


@dataclass(frozen=True)
class Int8Snapshot:
    """The codes of the first rows at one moment; safe to read in any thread.

    Attributes:
        codes: (N, C), unsigned as faiss stores them.
        scale: factor from a component of a rotated vector to its code.
        max_error: the largest distance between a vector and its decoded code.
        max_norm: the largest norm of a decoded code.
    """

    codes: npt.NDArray[np.uint8]
    scale: float
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
        (rotated,) = _rotated(query[None])
        # The query uses the whole range of its own codes: its scale cancels out of the ranking.
        query_scale = _MAX_CODE / float(np.abs(rotated).max())
        rounded = np.rint(rotated * query_scale)
        # faiss uses these two arrays as a heap, in which it replaces the lowest score by a higher
        # one. So they must start with scores that every row exceeds.
        scores = np.full(num, -np.inf, dtype=np.float32)
        rows = np.full(num, -1, dtype=np.int64)
        scanner = _scanner(len(rotated))
        scanner.set_query(faiss.swig_ptr(rounded))
        scanner.set_list(0, 0)
        found = faiss.swig_ptr(scores), faiss.swig_ptr(rows)
        scanner.scan_codes(len(self.codes), faiss.swig_ptr(self.codes), None, *found, num)
        # With q the query, q' its decoded code, v a vector and v' its decoded code, Cauchy-Schwarz
        # gives |q.v - q'.v'| = |(q - q').v' + q.(v - v')| <= |q - q'| |v'| + |q| |v - v'|.
        error = float(np.linalg.norm(rotated - rounded / query_scale)) * self.max_norm
        error += float(np.linalg.norm(rotated)) * self.max_error
        lowest = float(scores.min()) / (query_scale * self.scale)
        rows.sort()
        return rows, lowest + error + _FLOAT32_ERROR


class Int8Codes:
    """The codes of an index, whose rows only grow in number; not thread-safe."""

    def __init__(self, dim: int) -> None:
        """Start empty, for vectors of dimension `dim`."""
        self._dim = _code_dim(dim)
        self._codes = GrowingArray(np.uint8)
        self._scale = self._max_error = self._max_norm = 0.0

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
        rotated = _rotated(added)
        # One scale for all rows, since scores of codes are compared with each other. Vectors need
        # not be of unit length, so it comes from the first of them.
        self._scale = self._scale or _scale(rotated)
        codes = np.rint(rotated * self._scale).clip(-_MAX_CODE, _MAX_CODE)
        decoded = codes / self._scale
        errors = np.linalg.norm(rotated - decoded, axis=1)
        self._max_error = max(self._max_error, float(errors.max()))
        self._max_norm = max(self._max_norm, float(np.linalg.norm(decoded, axis=1).max()))
        self._codes.append((codes + _CODE_OFFSET).astype(np.uint8).ravel())

    @property
    def snapshot(self) -> Int8Snapshot:
        """The codes so far; extending does not change a snapshot."""
        codes = self._codes.view.reshape(-1, self._dim)
        return Int8Snapshot(codes, self._scale, self._max_error, self._max_norm)


def _scale(rotated_NC: FloatArray) -> float:
    """Return the factor from a component to its code."""
    largest = float(np.abs(rotated_NC).max())
    return _MAX_CODE / (_HEADROOM * largest) if largest else 1.0


def _code_dim(dim: int) -> int:
    return -(-dim // _CODES_AT_ONCE) * _CODES_AT_ONCE


def _rotated(vectors_ND: FloatArray) -> FloatArray:
    """(N, C) the vectors, padded with zeros to the dimension of codes, and rotated."""
    padded = np.zeros((len(vectors_ND), _code_dim(vectors_ND.shape[1])), dtype=np.float32)
    padded[:, : vectors_ND.shape[1]] = vectors_ND
    rotated: FloatArray = _rotation(padded.shape[1]).apply(padded)
    return rotated


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

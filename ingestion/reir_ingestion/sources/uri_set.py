"""A compact set of URIs, to find out which images a source no longer lists."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable

import numpy as np


class UriSet:
    """A set of URIs, as a sorted array of 64-bit hashes: 80 MB for ten million.

    Two URIs have the same hash with a probability of 2^-64; then a lost image would count as listed
    and would be kept.
    """

    def __init__(self, uris: Iterable[str]) -> None:
        """Add the URIs one by one, without a list of them."""
        hashes = array("Q", map(_hash, uris))
        self._sorted = np.frombuffer(hashes, dtype=np.uint64) if hashes else np.empty(0, np.uint64)
        self._sorted.sort()  # in index

    def __contains__(self, uri: str) -> bool:
        index = int(np.searchsorted(self._sorted, np.uint64(_hash(uri))))
        return index < len(self._sorted) and int(self._sorted[index]) == _hash(uri)

    def __len__(self) -> int:
        return len(self._sorted)


def _hash(uri: str) -> int:
    return int.from_bytes(hashlib.blake2b(uri.encode(), digest_size=8).digest(), "little")

"""A compact set of URIs, which shows what images a source no longer lists."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable

import numpy as np


class UriSet:
    """A set of URIs, stored as a sorted array of 64-bit hashes: 80 MB for ten million URIs.

    Two URIs have the same hash with a probability of 2^-64. Then an image that is gone from the
    source would count as listed, and would stay in the gallery.
    """

    def __init__(self, uris: Iterable[str]) -> None:
        """Add the URIs one by one, without a list of them."""
        # The numpy array uses the memory of `hashes` and is sorted in place, so that there is never
        # a second copy.
        hashes = array("Q", map(_hash, uris))
        self._sorted = np.frombuffer(hashes, dtype=np.uint64) if hashes else np.empty(0, np.uint64)
        self._sorted.sort()

    def __contains__(self, uri: str) -> bool:
        index = int(np.searchsorted(self._sorted, np.uint64(_hash(uri))))
        return index < len(self._sorted) and int(self._sorted[index]) == _hash(uri)

    def __len__(self) -> int:
        return len(self._sorted)


def _hash(uri: str) -> int:
    return int.from_bytes(hashlib.blake2b(uri.encode(), digest_size=8).digest(), "little")

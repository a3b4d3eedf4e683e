"""Groups of photos that look alike, by their perceptual hashes.

Two photos look alike if few of the 64 bits differ. Not all pairs are compared: if hashes differ in
at most D bits, at least one of D + 1 bands of bits is equal, so only hashes that share a band are
candidates. All pairs are found; a group is everything that a chain of pairs connects.
"""

# Shapes: N photos, U distinct hashes

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from reir.records import ImageRecord

HASH_BITS = 64
MAX_DISTANCE = 4
"""Maximum number of bits that differ."""

_Hashes = npt.NDArray[np.uint64]


class NearDuplicates:
    """Collects the hashes of a ledger, at 16 bytes per row, and groups the rows by similarity."""

    def __init__(self) -> None:
        """Start empty."""
        self._hashes = array("Q")
        self._numbers = array("Q")
        self._seen = 0

    def add(self, record: ImageRecord) -> None:
        """Add the next ledger row; rows without a hash and exact duplicates are in no group."""
        if record.perceptual_hash and record.holds_instances:
            self._hashes.append(int(record.perceptual_hash, 16))
            self._numbers.append(self._seen)
        self._seen += 1

    def groups(self, max_distance: int = MAX_DISTANCE) -> list[list[int]]:
        """Return groups of two or more rows, by their index among all added rows."""
        found = near_groups(np.array(self._hashes, dtype=np.uint64), max_distance)
        return [[self._numbers[i] for i in group] for group in found]


def near_groups(hashes: _Hashes, max_distance: int = MAX_DISTANCE) -> list[list[int]]:
    """Group (N,) hashes; neighbors in a chain differ in at most `max_distance` bits.

    Returns:
        Groups of two or more positions, each sorted, in the order of their first ones.

    Raises:
        ValueError: `max_distance` is outside 0 to 15.
    """
    if not 0 <= max_distance <= 15:
        raise ValueError(f"max_distance must be 0 to 15, got {max_distance}")
    # Equal hashes count as one: the number of pairs among them would grow quadratically.
    distinct_U, place_N = np.unique(hashes, return_inverse=True)
    parents = list(range(len(distinct_U)))
    for one, other in _near_pairs(distinct_U, max_distance):
        parents[_root(parents, one)] = _root(parents, other)
    groups: dict[int, list[int]] = defaultdict(list)
    for position, place in enumerate(place_N.tolist()):
        groups[_root(parents, place)].append(position)
    return [group for group in groups.values() if len(group) > 1]


def _near_pairs(distinct_U: _Hashes, max_distance: int) -> Iterable[tuple[int, int]]:
    """Yield all pairs whose hashes differ in at most `max_distance` bits; some twice."""
    edges = np.linspace(0, HASH_BITS, max_distance + 2).astype(int)
    for low, high in pairwise(edges.tolist()):
        mask = np.uint64((1 << (high - low)) - 1)
        band_U = (distinct_U >> np.uint64(low)) & mask
        order_U = np.argsort(band_U, kind="stable")
        sorted_U = band_U[order_U]
        # In sorted order, hashes that share the band are neighbors. Each step compares every hash
        # with the one so many places further, until no pair shares the band any more.
        for step in range(1, len(order_U)):
            same = sorted_U[:-step] == sorted_U[step:]
            if not same.any():
                break
            one, other = order_U[:-step][same], order_U[step:][same]
            near = np.bitwise_count(distinct_U[one] ^ distinct_U[other]) <= max_distance
            yield from zip(one[near].tolist(), other[near].tolist(), strict=True)


def _root(parents: list[int], place: int) -> int:
    """Return the root in a union-find forest, and shorten the path to it."""
    while parents[place] != place:
        parents[place] = parents[parents[place]]
        place = parents[place]
    return place

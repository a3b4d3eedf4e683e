"""A fixed sample of the photos of a version, however many there are."""

from __future__ import annotations

import hashlib
import heapq


class PhotoSample:
    """At most `size` of the photos that are added: the same ones every time, whatever their order.

    Attributes:
        num_added: how many photos were added.
    """

    def __init__(self, size: int) -> None:
        """Keep at most `size` photos."""
        self._size = size
        # A heap of negative hashes, so that the photo with the largest hash is the first to go.
        self._kept: list[tuple[int, str]] = []
        self.num_added = 0

    def add(self, image_id: str) -> None:
        """Add one photo; every photo must be added once only."""
        self.num_added += 1
        digest = hashlib.sha256(image_id.encode()).digest()
        entry = -int.from_bytes(digest[:8], "big"), image_id
        if len(self._kept) < self._size:
            heapq.heappush(self._kept, entry)
        else:
            heapq.heappushpop(self._kept, entry)

    @property
    def image_ids(self) -> list[str]:
        """Ids of the photos in the sample, sorted."""
        return sorted(image_id for _, image_id in self._kept)

    @property
    def share(self) -> float:
        """Share of the photos that are in the sample; 1 if none was added."""
        return len(self._kept) / self.num_added if self.num_added else 1.0

"""`SearchPlanner`: splits filtered searches on a Milvus server, so that they lose no recall.

If a filter keeps less than 7% of a segment, a server scans those rows. Otherwise it walks its HNSW
graph, in which paths break where the filter removes many nodes. Recall@10 of text queries on 30,000
instances at ef 1024, with filters by box size and by tenant: 0.995 and 1.0 if the filter keeps 50%,
0.92 and 0.96 if it keeps 10%, 1.0 and 1.0 if it keeps 1%. Split in two parts, the searches that
keep 10% took 1.6 times as long, with recall 1.0.

So if a filter keeps too many rows for a scan, but too few for the graph, the search is split by
image id into parts that are small enough to be scanned. The parts cover all ids and do not overlap,
so results are correct even if the share is estimated wrongly; only recall depends on it.

The share is counted over the whole version. So a filter that keeps little of the version, but 10%
of one segment, is not split.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from reir.store.filter_milvus import quote

PART_SHARE = 0.05
"""Share of the rows in a part. Below the 7% of the server, since parts are never quite even."""

GRAPH_SHARE = 0.5
"""Share of the rows from which on the graph has full recall."""

REMEMBER_S = 30.0
"""How long a counted share is used; then it is counted again."""

_MAX_KNOWN = 1024
_ID_DIGITS = 4


@dataclass(frozen=True)
class _CachedShare:
    share: float
    expires_s: float


class SearchPlanner:
    """Splits searches into parts; caches the share of rows that each filter keeps."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        """Start with an empty cache."""
        self._clock_s = clock_s
        self._known: dict[tuple[str, str], _CachedShare] = {}
        self._mutex = threading.Lock()

    def parts(self, version: str, condition: str, count: Callable[[str], int]) -> list[str]:
        """Return the conditions of the parts; their hits together are the result.

        Args:
            version: a name of the version, for the cache.
            condition: a Milvus expression, "" for none.
            count: returns the number of instances that meet a condition.
        """
        return split(condition, self._share(version, condition, count)) if condition else [""]

    def _share(self, version: str, condition: str, count: Callable[[str], int]) -> float:
        key, now_s = (version, condition), self._clock_s()
        with self._mutex:
            known = self._known.get(key)
        if known is not None and now_s < known.expires_s:
            return known.share
        # Counted without the lock, so that other searches do not wait for the server's answer.
        share = count(condition) / max(1, count(""))
        with self._mutex:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[key] = _CachedShare(share, now_s + REMEMBER_S)
        return share


def split(condition: str, share: float) -> list[str]:
    """Split a condition that keeps `share` of all instances into parts that a server scans.

    The parts are ranges of the image id. Ids are hashes in hexadecimal digits, so the parts have
    about equal sizes. The ranges cover ids of any other form as well.
    """
    if not PART_SHARE < share < GRAPH_SHARE:
        return [condition]
    num_parts = math.ceil(share / PART_SHARE)
    whole = 16**_ID_DIGITS
    # Milvus compares text. With equal numbers of digits, in lower case as in the ids, that gives
    # the order of the numbers.
    bounds = [f"{whole * part // num_parts:0{_ID_DIGITS}x}" for part in range(1, num_parts)]
    ranges = [f"image_id < {quote(bounds[0])}"]
    for low, high in itertools.pairwise(bounds):
        ranges.append(f"image_id >= {quote(low)} and image_id < {quote(high)}")
    ranges.append(f"image_id >= {quote(bounds[-1])}")
    # In parentheses, because the condition may contain `or`, which binds less tightly than `and`.
    return [f"({condition}) and {each}" for each in ranges]

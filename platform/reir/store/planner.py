"""How a filtered search is put to a Milvus server so that its graph loses no recall.

A server scans what a filter keeps where that is less than 7 % of a segment, and walks its graph
otherwise. A graph of which much is left out falls apart. Recall@10 of text queries on 30,000
instances, filtered by box size and by tenant: with 50 % kept 0.995 and 1.0 at a breadth of 1024,
with 10 % 0.92 and 0.96, with 1 % 1.0 and 1.0. In two parts, those 10 % took 1.6 times as long, and
all was found.

So a search whose filter keeps more than the server scans, but too little for the graph, is cut into
parts by image id, each small enough to be scanned. The parts cover all ids and do not overlap, so
the answer is right whatever the estimate; only its recall hangs on it.

What a filter keeps is counted over the whole version. A filter that keeps little of all, but a
tenth of one segment, is not noticed.
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
"""What a part keeps: below the server's 7 %, since parts are never quite even."""

GRAPH_SHARE = 0.5
"""What a filter must keep for the graph to stand."""

REMEMBER_S = 30.0
"""How long a share counts as known."""

_MAX_KNOWN = 1024
_ID_DIGITS = 4


@dataclass(frozen=True)
class _Known:
    share: float
    until_s: float


class Planner:
    """Cuts searches into parts; remembers for a while what share each filter keeps."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        """Start knowing nothing."""
        self._clock_s = clock_s
        self._known: dict[tuple[str, str], _Known] = {}
        self._mutex = threading.Lock()

    def parts(self, version: str, condition: str, count: Callable[[str], int]) -> list[str]:
        """Conditions to search by one after another, whose hits together are the answer.

        Args:
            version: what is searched, the same name for the same instances.
            condition: a Milvus expression, empty for none.
            count: number of instances that meet a condition; asked when the share is not known.
        """
        return split(condition, self._share(version, condition, count)) if condition else [""]

    def _share(self, version: str, condition: str, count: Callable[[str], int]) -> float:
        key, now_s = (version, condition), self._clock_s()
        with self._mutex:
            known = self._known.get(key)
        if known is not None and now_s < known.until_s:
            return known.share
        share = count(condition) / max(1, count(""))
        with self._mutex:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[key] = _Known(share, now_s + REMEMBER_S)
        return share


def split(condition: str, share: float) -> list[str]:
    """Cut a condition that keeps `share` of all instances into parts that a server scans.

    The parts are ranges of the image id: hexadecimal digits of a hash, so they are about even. They
    cover ids of any other form too.
    """
    if not PART_SHARE < share < GRAPH_SHARE:
        return [condition]
    num_parts = math.ceil(share / PART_SHARE)
    whole = 16**_ID_DIGITS
    bounds = [f"{whole * part // num_parts:0{_ID_DIGITS}x}" for part in range(1, num_parts)]
    ranges = [f"image_id < {quote(bounds[0])}"]
    for low, high in itertools.pairwise(bounds):
        ranges.append(f"image_id >= {quote(low)} and image_id < {quote(high)}")
    ranges.append(f"image_id >= {quote(bounds[-1])}")
    return [f"({condition}) and {each}" for each in ranges]

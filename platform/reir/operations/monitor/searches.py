"""What the monitor takes from the search log: recent expressions, and the presence of answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from heapq import nlargest
from pathlib import Path
from typing import Any

import numpy as np

from reir.operations.search_log import read_events

RECENT, BEFORE = 200, 1_000
"""The mean presence of so many last searches is compared with that of so many before them."""

MIN_SEARCHES = 50


@dataclass(frozen=True)
class LoggedSearches:
    """The searches in a search log.

    Attributes:
        folder: of the log.
    """

    folder: Path

    def expressions(self, gallery: str, limit: int = 200) -> list[str]:
        """Return the last expressions that were searched for, newest first, each once."""
        recent = (str(event["expression"]) for event in self._last(gallery, 4 * limit))
        return list(dict.fromkeys(recent))[:limit]

    def mean_presence(self, gallery: str) -> dict[str, float]:
        """Return the mean presence of "recent" searches, and of those "before".

        A window with fewer than `MIN_SEARCHES` is left out.
        """
        events = self._last(gallery, RECENT + BEFORE)
        known = [float(each["presence"]) for each in events if each["presence"] is not None]
        windows = {"recent": known[:RECENT], "before": known[RECENT:]}
        return {
            name: float(np.mean(values))
            for name, values in windows.items()
            if len(values) >= MIN_SEARCHES
        }

    def _last(self, gallery: str, number: int) -> list[Mapping[str, Any]]:
        """Return the last searches of a gallery, newest first."""
        searches = (each for each in read_events(self.folder, gallery) if each["event"] == "search")
        # The files of several processes are read one after another, so their events are not in
        # the order of time.
        return nlargest(number, searches, key=lambda each: str(each["time"]))

"""`PhotoZoomer`: searches photos of a gallery by zooming in, as far as time allows."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from reir.errors import ImageError
from reir.images.photo_files import photo_at
from reir.images.remembered import remembered
from reir.models.interfaces import Zoomer
from reir.models.zoom_steps import ZoomSearch
from reir.query.stages import ZoomRequest
from reir.records import RgbImage

MAX_CACHED = 4096
"""Searches to keep in memory, each about a kilobyte."""

logger = logging.getLogger(__name__)


class PhotoZoomer:
    """Searches photos with a zoomer, and remembers what it found.

    Args:
        zoomer: searches the pixels of a photo.
        photo: returns the pixels of a photo by its URI.
    """

    def __init__(self, zoomer: Zoomer, photo: Callable[[str], RgbImage] = photo_at) -> None:
        self._zoomer, self._photo = zoomer, photo
        # Whoever opens the page of an answer again asks for the same searches.
        self._searched = remembered(self._search, MAX_CACHED)

    def zoom(
        self, requests: Sequence[ZoomRequest], timeout_s: float | None
    ) -> list[ZoomSearch | None]:
        """Search photos one after the other, until time is over.

        Args:
            requests: photos and expressions, the most important ones first.
            timeout_s: seconds that this may take. A search begins only if there is time for one
                like the slowest so far; it is never interrupted.

        Returns:
            The search of each request; None where there was no time left, or where the photo cannot
            be read.
        """
        started_s = time.monotonic()
        found: list[ZoomSearch | None] = []
        slowest_s = 0.0
        for request in requests:
            before_s = time.monotonic() - started_s
            if timeout_s is not None and before_s + slowest_s >= timeout_s:
                break
            try:
                found.append(self._searched(request))
            except ImageError as error:
                logger.warning("photo %s was not searched by zooming: %s", request.image_id, error)
                found.append(None)
            slowest_s = max(slowest_s, time.monotonic() - started_s - before_s)
        return found + [None] * (len(requests) - len(found))

    def _search(self, request: ZoomRequest) -> ZoomSearch:
        (search,) = self._zoomer.zoom([self._photo(request.uri)], [request.expression])
        return search

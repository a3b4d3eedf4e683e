"""`PixelVerifier`: compares what an expression says with the pixels of the first hits.

As in spatial verification (Philbin et al. 2007), only the first results of a search are looked at,
and change places among themselves. What is compared are the colors that the expression names. The
instances of one photo are compared in the same way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from reir.datasets.generated_expressions import names_color
from reir.errors import ImageError
from reir.images.photo_files import photo_at
from reir.images.remembered import remembered
from reir.query.stages import VerifyRequest, VerifyResult
from reir.records import FloatArray, RgbImage

if TYPE_CHECKING:
    from reir.models.nano.color_reader import ColorReader

VERIFYING_THREADS = 2
"""Hits that are verified at the same time: while one photo is decoded, another one is compared."""

MAX_CACHED = 4096
"""Maximum number of verified hits to keep in memory; each takes some hundred bytes."""

logger = logging.getLogger(__name__)


class PixelVerifier:
    """Compares colors with pixels, and remembers what it found; thread-safe.

    Args:
        load_reader: loads the color reader of a checkpoint that has one; called with the first
            request.
        photo: returns the pixels of a photo by its URI.
    """

    def __init__(
        self,
        load_reader: Callable[[], ColorReader | None],
        photo: Callable[[str], RgbImage] = photo_at,
    ) -> None:
        self._load, self._photo = cache(load_reader), photo
        self._threads = ThreadPoolExecutor(VERIFYING_THREADS, "verify")
        # Whoever turns a page back asks for the same hits.
        self._verified = remembered(self._verify, MAX_CACHED)

    def verify(self, requests: Sequence[VerifyRequest]) -> list[VerifyResult | None]:
        """Return the readings of each request; None if its photo cannot be read."""
        self._load()  # before the threads, which would all load it
        found = list(self._threads.map(self._readings, requests))
        errors = [each for each in found if isinstance(each, ImageError)]
        if errors:
            logger.warning(
                "the colors of %d of %d hits were not verified, because their photos cannot be "
                "read: %s",
                len(errors),
                len(requests),
                errors[0],
            )
        return [None if isinstance(each, ImageError) else each for each in found]

    def read(self, image: RgbImage, expression: str, boxes: FloatArray) -> Sequence[VerifyResult]:
        """Return the readings of some instances of one photo; none if no color is named.

        Args:
            image: upright photo.
            expression: normalized.
            boxes: (N, 4) xyxy in [0, 1] of the instances.
        """
        if not names_color(expression):
            return ()
        reader = self._load()
        assert reader is not None, "verifiers are made for checkpoints with a color head only"
        return [tuple(each) for each in reader.read(image, [(box, expression) for box in boxes])]

    def _readings(self, request: VerifyRequest) -> VerifyResult | ImageError:
        try:
            return self._verified(request)
        except ImageError as error:
            return error

    def _verify(self, request: VerifyRequest) -> VerifyResult:
        box = np.array([request.box], dtype=np.float32)
        found = self.read(self._photo(request.uri), request.expression, box)
        return found[0] if found else ()

"""`PixelVerifier`: compares what an expression says with the pixels of the first hits.

As in spatial verification (Philbin et al. 2007), only the first results of a search are looked at,
and change places among themselves. What is compared are the colors that the expression names.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from reir.errors import ImageError
from reir.query.localize import photo_at
from reir.query.stages import VerifyRequest, VerifyResult
from reir.records import RgbImage

if TYPE_CHECKING:
    from reir.models.nano.color_reader import ColorReader

VERIFYING_THREADS = 2
"""Hits that are verified at the same time: while one photo is decoded, another one is compared."""

MAX_CACHED = 4096
"""Maximum number of verified hits to keep in memory; each takes some hundred bytes."""

SCORE_OF_SURPRISAL = 0.02
"""What a unit of surprisal of a color takes from the score of a hit; chosen on `val`."""

logger = logging.getLogger(__name__)


def verified_scores(
    scores: Sequence[float], verified: Sequence[VerifyResult | None]
) -> list[float]:
    """Return the scores of hits after their verification; their mean stays the same.

    A hit whose photo could not be read is treated like the average of the others.

    Args:
        scores: inner products.
        verified: what the pixels say about each of these hits.
    """
    usual = mean_surprisal(verified)
    return [
        score if each is None else score - SCORE_OF_SURPRISAL * (_surprisal(each) - usual)
        for score, each in zip(scores, verified, strict=True)
    ]


def mean_surprisal(verified: Sequence[VerifyResult | None]) -> float:
    """Return the mean surprisal of the hits whose photos could be read; 0 if there are none."""
    known = [_surprisal(each) for each in verified if each is not None]
    return float(np.mean(known)) if known else 0.0


def _surprisal(readings: VerifyResult) -> float:
    return sum(each.surprisal for each in readings)


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
        self._verified = lru_cache(MAX_CACHED)(self._verify)

    def verify(self, requests: Sequence[VerifyRequest]) -> list[VerifyResult | None]:
        """Return the readings of each request; None if its photo cannot be read any more."""
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

    def _readings(self, request: VerifyRequest) -> VerifyResult | ImageError:
        try:
            return self._verified(request)
        except ImageError as error:
            return error

    def _verify(self, request: VerifyRequest) -> VerifyResult:
        reader, box = self._load(), np.array(request.box, dtype=np.float32)
        assert reader is not None, "verifiers are made for checkpoints with a color head only"
        (readings,) = reader.read(self._photo(request.uri), [(box, request.expression)])
        return tuple(readings)

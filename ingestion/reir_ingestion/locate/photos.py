"""Decides for each photo of a source whether it has the described instance, without an index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from reir.errors import ImageError
from reir.query.localize import PixelLocalizer
from reir.query.photo_curve import DEFAULT_MIN_PRESENCE
from reir.query.photo_query import locate
from reir.records import Box
from reir_ingestion.loading import failure_of
from reir_ingestion.sources import Source, SourceFile


@dataclass(frozen=True, kw_only=True)
class LocatedPhoto:
    """The decision about one photo, or why there is none.

    Attributes:
        uri: the photo, or the part of the source that could not be listed.
        present: whether the photo has the described instance.
        presence: calibrated probability that it has; None without a calibration.
        box: of the instance that fits best, xyxy in [0, 1] of the upright photo; None if the photo
            has no instance or could not be read.
        score: inner product of that instance and the expression; None without a box.
        error: why the photo could not be read; empty if it was.
        read: returns the bytes of the photo.
    """

    uri: str
    present: bool = False
    presence: float | None = None
    box: Box | None = None
    score: float | None = None
    error: str = ""
    read: Callable[[], bytes] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        names = ("uri", "present", "presence", "box", "score", "error")
        return {name: getattr(self, name) for name in names}


def locate_photos(
    source: Source,
    localizer: PixelLocalizer,
    expression: str,
    min_presence: float = DEFAULT_MIN_PRESENCE,
) -> Iterator[LocatedPhoto]:
    """Yield the decision about each photo, in the order of the source.

    Args:
        source: the photos.
        localizer: finds the instance in a photo.
        expression: describes one instance.
        min_presence: a photo has the instance if its presence is at least this. Without a
            calibration, it has the instance if it has any.

    Raises:
        QueryError: the expression is empty or too long.
        SourceError: the photos cannot be listed.
    """
    unlisted: list[LocatedPhoto] = []

    def note(part: str, error: Exception) -> None:
        # The source calls this while it looks for its next photo, where nothing can be yielded.
        unlisted.append(LocatedPhoto(uri=part, error=f"cannot be listed: {error}"))

    for file in source.files(note):
        yield _located(source, file, localizer, expression, min_presence)
        yield from unlisted
        unlisted.clear()
    # After the last photo, the source may still have met parts that cannot be listed.
    yield from unlisted


def _located(
    source: Source,
    file: SourceFile,
    localizer: PixelLocalizer,
    expression: str,
    min_presence: float,
) -> LocatedPhoto:
    read = partial(source.read, file)
    try:
        found = locate(localizer, read(), expression, k=1, masks=False)
    except (ImageError, MemoryError) as error:
        return LocatedPhoto(uri=file.uri, error=str(failure_of(error)))
    best = found.boxes[0] if found.boxes else None
    return LocatedPhoto(
        uri=file.uri,
        present=best is not None and (found.presence is None or found.presence >= min_presence),
        presence=found.presence,
        box=best.box if best else None,
        score=best.score if best else None,
        # Read again for the contact sheet, instead of kept: most photos are not drawn.
        read=read,
    )

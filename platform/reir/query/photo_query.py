"""Queries about a photo that is given as bytes: a vector to search with, and localization in it."""

# Shapes: D vector dimension

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from reir.errors import QueryError
from reir.images.boxes import pairwise_iou
from reir.images.decode import DEFAULT_MAX_PIXELS, decode
from reir.models.interfaces import ExpressionLocalizer, InstanceEncoder
from reir.query.clock import Clock
from reir.records import Box, FloatArray, RgbImage
from reir.results import Localization, LocalizedBox
from reir.text import validate_expression


def vector_of(
    encoder: InstanceEncoder, data: bytes, box: Box | None, max_pixels: int = DEFAULT_MAX_PIXELS
) -> FloatArray:
    """Return the (D,) vector of the instance that overlaps a box most; without one, the photo's.

    Raises:
        ImageError: the photo cannot be decoded, or has more than `max_pixels`.
        QueryError: no instance overlaps the box.
    """
    # The whole photo is encoded, not a crop of the box, since the instances of the gallery were:
    # their vectors depend on what surrounds them.
    (instances,) = encoder.encode_images([decode(data, max_pixels=max_pixels).pixels])
    if box is None:
        return instances.image_vector
    overlaps = pairwise_iou([box], instances.boxes)[0] if len(instances) else np.zeros(0)
    if not overlaps.any():
        raise QueryError(
            "box", f"overlaps none of the {len(instances)} instances found in the photo"
        )
    return np.asarray(instances.vectors[int(overlaps.argmax())])


class Locator(Protocol):
    """Answers for one photo: `reir.query.localize.PixelLocalizer` or `BoxLocator`."""

    def locate(
        self, image: RgbImage, expressions: Sequence[str], k: int = 5, *, masks: bool = False
    ) -> list[Localization]:
        """See `PixelLocalizer.locate`."""
        ...


class BoxLocator:
    """Answers with the boxes of a localizer, which has neither presence nor masks."""

    def __init__(self, localizer: ExpressionLocalizer) -> None:
        self._localizer = localizer

    def locate(
        self, image: RgbImage, expressions: Sequence[str], k: int = 5, *, masks: bool = False
    ) -> list[Localization]:
        """Find the best `k` boxes of one photo for each expression; see `PixelLocalizer.locate`.

        Raises:
            QueryError: masks are asked for.
        """
        if masks:
            raise QueryError("masks", "cannot come from a localizer; leave one of them out")
        height_px, width_px = image.shape[:2]
        answers = []
        for expression, found in zip(
            expressions,
            self._localizer.localize([image] * len(expressions), expressions),
            strict=True,
        ):
            boxes = tuple(
                LocalizedBox(box=(x1, y1, x2, y2), score=score, presence=None)
                for (x1, y1, x2, y2), score in zip(
                    found.boxes[:k].tolist(), found.scores[:k].tolist(), strict=True
                )
            )
            answers.append(
                Localization(
                    expression=expression,
                    width_px=width_px,
                    height_px=height_px,
                    present=bool(boxes),
                    presence=None,
                    boxes=boxes,
                )
            )
        return answers


def locate(  # noqa: PLR0913 - all but the three parts of the question are by name
    localizer: Locator,
    data: bytes,
    expression: str,
    k: int = 5,
    *,
    masks: bool = True,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Localization:
    """Find the instances of a photo that an expression describes.

    Raises:
        ImageError: the photo cannot be decoded, or has more than `max_pixels`.
        QueryError: the expression is empty or too long.
    """
    clock = Clock("decode", "localize")
    # Before the photo is decoded, because this costs next to nothing.
    text = validate_expression(expression)
    with clock.stage("decode"):
        photo = decode(data, max_pixels=max_pixels)
    with clock.stage("localize"):
        (found,) = localizer.locate(photo.pixels, [text], k, masks=masks)
    return replace(
        found,
        expression=expression,
        width_px=photo.width_px,
        height_px=photo.height_px,
        timings_ms=dict(clock.ms),
    )

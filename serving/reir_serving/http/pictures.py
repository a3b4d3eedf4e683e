"""Pictures of photos for a browser: whole photos, thumbnails, photos with boxes drawn on them.

A picture is either a photo of a type that browsers show, sent with the media type that its first
bytes imply, or pixels that this module encoded. So the server never sends an uploaded document that
a browser would execute. This module depends neither on a store nor on HTTP.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

from PIL import Image

from reir.images.decode import decode
from reir.images.drawing import draw_boxes
from reir.images.file_formats import sniff
from reir.records import Box, ImageRecord

JPEG = "image/jpeg"
JPEG_QUALITY = 85
UNCHANGED_TYPES = {"JPEG": JPEG, "PNG": "image/png", "WebP": "image/webp", "GIF": "image/gif"}
JPEG_SIDE_PX = 65_500
"""The longest side, in pixels, that Pillow's JPEG library can write."""

CACHE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Picture:
    """An encoded picture and its media type."""

    data: bytes
    media_type: str


@dataclass(frozen=True, kw_only=True)
class View:
    """How to show a photo.

    Attributes:
        width_px: maximum width; None for the photo's own width, reduced if a JPEG cannot hold it.
        frame: part of the photo to show, xyxy in [0, 1]; None for all of it. Not together with
            boxes.
        boxes: boxes to draw, the first one on top; xyxy in [0, 1].
        labels: one for each box.
    """

    width_px: int | None = None
    frame: Box | None = None
    boxes: Sequence[Box] = ()
    labels: Sequence[str] = ()

    @property
    def is_whole(self) -> bool:
        """Whether the photo is shown unchanged."""
        return self.width_px is None and self.frame is None and not self.boxes


def etag(record: ImageRecord, view: View) -> str:
    """Return the `ETag` of a picture, which changes with the photo's content and with the view."""
    content = (
        record.image_id,
        record.content_hash,
        view.width_px,
        view.frame,
        tuple(view.boxes),
        tuple(view.labels),
    )
    return f'"{hashlib.sha256(repr(content).encode()).hexdigest()[:24]}"'


def render(data: bytes, record: ImageRecord, view: View, max_pixels: int) -> Picture:
    """Return the picture of an encoded photo.

    Args:
        data: the encoded photo.
        record: ledger row of the photo, with its size.
        view: how to show it.
        max_pixels: a photo whose header states more pixels is rejected.

    Raises:
        ImageError: the photo cannot be decoded.
    """
    known = sniff(data)
    media_type = UNCHANGED_TYPES.get(known.name) if known else None
    if view.is_whole and media_type:
        return Picture(data, media_type)
    # `at_least_px` lets the JPEG decoder scale down while it decodes, which is faster. It refers to
    # the longer side, and `view.width_px` to the width.
    at_least_px = None
    if view.width_px and record.width_px and record.height_px:
        longer = max(1.0, record.height_px / record.width_px)
        share = view.frame[2] - view.frame[0] if view.frame else 1.0
        at_least_px = math.ceil(view.width_px * longer / share)
    photo = Image.fromarray(decode(data, max_pixels=max_pixels, at_least_px=at_least_px).pixels)
    if view.frame:
        photo = _cut_out(photo, view.frame)
    photo = _fit(photo, view.width_px or photo.width)
    if view.boxes:
        photo = draw_boxes(photo, view.boxes, view.labels)
    out = io.BytesIO()
    photo.save(out, "JPEG", quality=JPEG_QUALITY)
    return Picture(out.getvalue(), JPEG)


def _cut_out(photo: Image.Image, frame: Box) -> Image.Image:
    """Return a part of the photo, at least one pixel wide and high."""
    left, top = (min(int(frame[i] * side), side - 1) for i, side in enumerate(photo.size))
    right, bottom = (math.ceil(frame[i + 2] * side) for i, side in enumerate(photo.size))
    return photo.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


def _fit(photo: Image.Image, width_px: int) -> Image.Image:
    """Return the photo, scaled down to at most `width_px` and to the longest side of a JPEG."""
    scale = min(1.0, width_px / photo.width, JPEG_SIDE_PX / max(photo.size))
    if scale == 1:
        return photo
    size = max(1, round(photo.width * scale)), max(1, round(photo.height * scale))
    return photo.resize(size, Image.Resampling.LANCZOS)


class PictureCache:
    """The most recently used pictures, up to a total size. Threads can share a cache.

    No picture ever becomes outdated, because its `ETag` changes with the content of the photo.
    """

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        """Start empty."""
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._pictures: OrderedDict[str, Picture] = OrderedDict()
        self._lock = Lock()

    def get(self, tag: str) -> Picture | None:
        """Return the picture with an `ETag`, or None if the cache does not have it."""
        with self._lock:
            if tag in self._pictures:
                self._pictures.move_to_end(tag)
            return self._pictures.get(tag)

    def put(self, tag: str, picture: Picture) -> None:
        """Add a picture, and remove those that have not been used for the longest time."""
        with self._lock:
            # A picture that is larger than the whole cache would only push out all others.
            if tag in self._pictures or len(picture.data) > self._max_bytes:
                return
            self._pictures[tag] = picture
            self._num_bytes += len(picture.data)
            while self._num_bytes > self._max_bytes:
                self._num_bytes -= len(self._pictures.popitem(last=False)[1].data)

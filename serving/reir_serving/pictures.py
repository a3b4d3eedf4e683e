"""Pictures of photos as a browser gets them: whole, as thumbnails, with boxes drawn.

What goes out is either a photo of a type that browsers show, under the type that its first bytes
say, or pixels encoded here: never a document. Knows no store and no HTTP.
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

from reir.drawing import draw_boxes
from reir.image_formats import sniff
from reir.images import decode
from reir.records import ImageRecord
from reir_serving.backend import Box

JPEG = "image/jpeg"
JPEG_QUALITY = 85
SENT_AS_THEY_ARE = {"JPEG": JPEG, "PNG": "image/png", "WebP": "image/webp", "GIF": "image/gif"}
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
    """How a photo is to be shown.

    Attributes:
        width_px: maximum width; None for the photo's own width, reduced if a JPEG cannot hold it.
        boxes: to draw, the first on top; xyxy in [0, 1].
        labels: one a box.
    """

    width_px: int | None = None
    boxes: Sequence[Box] = ()
    labels: Sequence[str] = ()

    @property
    def is_whole(self) -> bool:
        """Whether the photo is shown as it is."""
        return self.width_px is None and not self.boxes


def etag(record: ImageRecord, view: View) -> str:
    """Return what names a picture: it changes with the photo's content and with what is drawn."""
    what = (
        record.image_id,
        record.content_hash,
        view.width_px,
        tuple(view.boxes),
        tuple(view.labels),
    )
    return f'"{hashlib.sha256(repr(what).encode()).hexdigest()[:24]}"'


def render(data: bytes, record: ImageRecord, view: View, max_pixels: int) -> Picture:
    """Return the picture of an encoded photo.

    Args:
        data: the encoded photo.
        record: its ledger row; says its size.
        view: how.
        max_pixels: larger photos are refused, from the header.

    Raises:
        ImageError: it cannot be decoded.
    """
    known = sniff(data)
    sent_as = SENT_AS_THEY_ARE.get(known.name) if known else None
    if view.is_whole and sent_as:
        return Picture(data, sent_as)
    at_least_px = None
    if view.width_px and record.width_px and record.height_px:
        longer = max(1.0, record.height_px / record.width_px)
        at_least_px = math.ceil(view.width_px * longer)
    photo = Image.fromarray(decode(data, max_pixels=max_pixels, at_least_px=at_least_px).pixels)
    photo = _fitted(photo, view.width_px or photo.width)
    if view.boxes:
        photo = draw_boxes(photo, view.boxes, view.labels)
    out = io.BytesIO()
    photo.save(out, "JPEG", quality=JPEG_QUALITY)
    return Picture(out.getvalue(), JPEG)


def _fitted(photo: Image.Image, width_px: int) -> Image.Image:
    """Return the photo, scaled down to at most `width_px` and to the longest side of a JPEG."""
    scale = min(1.0, width_px / photo.width, JPEG_SIDE_PX / max(photo.size))
    if scale == 1:
        return photo
    size = max(1, round(photo.width * scale)), max(1, round(photo.height * scale))
    return photo.resize(size, Image.Resampling.LANCZOS)


class PictureCache:
    """The pictures that were made last, up to a number of bytes; safe to use from many threads."""

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        """Start empty."""
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._held: OrderedDict[str, Picture] = OrderedDict()
        self._lock = Lock()

    def get(self, name: str) -> Picture | None:
        """Return a picture by its etag, None where it is not held."""
        with self._lock:
            if name in self._held:
                self._held.move_to_end(name)
            return self._held.get(name)

    def put(self, name: str, picture: Picture) -> None:
        """Keep a picture, and let go of those that were not asked for the longest."""
        with self._lock:
            if name in self._held or len(picture.data) > self._max_bytes:
                return
            self._held[name] = picture
            self._num_bytes += len(picture.data)
            while self._num_bytes > self._max_bytes:
                self._num_bytes -= len(self._held.popitem(last=False)[1].data)

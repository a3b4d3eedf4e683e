"""Pictures: which photos are sent unchanged, which are encoded, and which the cache keeps."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from pillow_heif import register_heif_opener

from reir.errors import ImageError, ImageFailure
from reir.records import ImageRecord
from reir_serving.http.pictures import Picture, PictureCache, View, etag, render

register_heif_opener()  # so that the tests can write HEIC

RECORD = ImageRecord(image_id="a", uri="file:///a", status="indexed", width_px=400, height_px=800)
BOX = (0.25, 0.25, 0.75, 0.75)


def encoded(form: str, size: tuple[int, int] = (400, 800)) -> bytes:
    out = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (size[1] // 8, size[0] // 8, 3), np.uint8)
    Image.fromarray(noise).resize(size).save(out, form)
    return out.getvalue()


def opened(picture: Picture) -> Image.Image:
    assert picture.media_type == "image/jpeg"
    return Image.open(io.BytesIO(picture.data))


@pytest.mark.parametrize(
    ("form", "kind"),
    [("JPEG", "image/jpeg"), ("PNG", "image/png"), ("WEBP", "image/webp"), ("GIF", "image/gif")],
)
def test_photos_that_browsers_show_are_sent_unchanged(form: str, kind: str) -> None:
    data = encoded(form, (64, 64))
    assert render(data, RECORD, View(), 10**6) == Picture(data, kind)


@pytest.mark.parametrize("form", ["TIFF", "BMP", "PPM", "HEIF"])
def test_other_photos_are_sent_as_jpeg(form: str) -> None:
    assert opened(render(encoded(form, (64, 48)), RECORD, View(), 10**6)).size == (64, 48)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("width", [16, 50, 100, 399, 400, 4000])
def test_a_photo_is_scaled_down_but_never_up(form: str, width: int) -> None:
    shown = opened(render(encoded(form), RECORD, View(width_px=width), 10**6))
    wanted = min(width, 400)
    assert shown.size == (wanted, 2 * wanted)


@pytest.mark.parametrize(("form", "size"), [("PNG", (65_535, 330)), ("TIFF", (330, 65_535))])
@pytest.mark.parametrize("boxes", [[BOX], []])
def test_a_photo_too_long_for_a_jpeg_is_scaled_down(
    form: str, size: tuple[int, int], boxes: list[tuple[float, float, float, float]]
) -> None:
    out = io.BytesIO()
    Image.new("RGB", size).save(out, form)
    view = View(width_px=None if boxes else 70_000, boxes=boxes, labels=["1"] * len(boxes))
    record = replace(RECORD, width_px=size[0], height_px=size[1])
    shown = opened(render(out.getvalue(), record, view, 10**8))
    assert sorted(shown.size) == [330, 65_500]


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("width", [None, 20])
def test_a_part_of_a_photo_keeps_its_pixels(form: str, width: int | None) -> None:
    data = encoded(form)
    shown = opened(render(data, RECORD, View(width_px=width, frame=(0.25, 0.5, 0.75, 1)), 10**6))
    assert shown.size == ((200, 400) if width is None else (20, 40))
    whole = Image.open(io.BytesIO(data)).convert("RGB").crop((100, 400, 300, 800))
    difference = np.asarray(whole.resize(shown.size), float) - np.asarray(shown, float)
    assert np.abs(difference).mean() < 25
    tiny = View(frame=(0.9999, 0.9999, 1, 1))
    assert opened(render(data, RECORD, tiny, 10**6)).size == (1, 1)


def test_a_photo_with_too_many_pixels_is_rejected_by_its_header() -> None:
    with pytest.raises(ImageError) as rejection:
        render(encoded("PNG"), RECORD, View(width_px=40), 1000)
    assert rejection.value.reason == ImageFailure.TOO_LARGE


def test_an_etag_identifies_photo_and_view() -> None:
    views = [
        View(),
        View(width_px=40),
        View(width_px=40, frame=BOX),
        View(boxes=[BOX], labels=[""]),
        View(boxes=[BOX], labels=["1"]),
    ]
    others = [ImageRecord(image_id=each, uri="u", status="indexed") for each in "bc"]
    tags = {etag(RECORD, view) for view in views} | {etag(each, View()) for each in others}
    assert len(tags) == 7
    assert all(tag.startswith('"') and tag.endswith('"') for tag in tags)


def test_the_cache_keeps_the_most_recently_used_pictures() -> None:
    cache = PictureCache(max_bytes=100)
    first, second, third = (Picture(bytes(40), f"image/{n}") for n in range(3))
    cache.put("1", first)
    cache.put("2", second)
    assert cache.get("1") is first
    cache.put("3", third)
    assert (cache.get("1"), cache.get("2"), cache.get("3")) == (first, None, third)
    cache.put("4", Picture(bytes(101), "image/4"))
    assert cache.get("4") is None

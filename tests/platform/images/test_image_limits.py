"""Images that are too large to decode: by pixels, sides, unpacked size or memory."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import pytest
from PIL import Image, PngImagePlugin
from pillow_heif import register_heif_opener

from reir.errors import ImageError, ImageFailure
from reir.images.decode import DecodedImage, decode

register_heif_opener()  # so that the tests can write HEIC


def plain_image(width: int = 64, height: int = 48) -> Image.Image:
    return Image.new("RGB", (width, height), "red")


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def failure_of(data: bytes, **options: int) -> ImageFailure:
    with pytest.raises(ImageError) as caught:
        decode(data, **options)
    return caught.value.reason


def png_with_header(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, but which holds almost no data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = (
        chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + body


def jpeg_with_header(width: int, height: int) -> bytes:
    data = bytearray(encoded(plain_image(), "JPEG"))
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        png_with_header(30_000, 30_000),
        png_with_header(30_000, 30_000)[:40],
        jpeg_with_header(30_000, 30_000),
        encoded(Image.new("1", (30_000, 30_000)), "PNG", compress_level=1),
        b"GIF89a" + struct.pack("<HH", 30_000, 30_000) + b"\0" * 20,
        b"BM" + bytes(12) + struct.pack("<Iii", 40, 30_000, 30_000) + bytes(40),
    ],
    ids=["png", "png header only", "jpeg", "one-bit png", "gif", "bmp"],
)
def test_decompression_bombs_are_refused_from_the_header(data: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert failure_of(data) == ImageFailure.TOO_LARGE


def test_a_heic_with_a_false_size_in_its_header_is_refused_before_decoding() -> None:
    data = encoded(Image.new("RGB", (512, 512), "red"), "HEIF")
    start = data.index(b"ispe") + 8

    def claiming(width: int, height: int) -> bytes:
        return data[:start] + struct.pack(">II", width, height) + data[start + 8 :]

    assert decode(data, max_pixels=512 * 512).width_px == 512
    assert failure_of(claiming(64, 64)) == ImageFailure.TOO_LARGE
    assert failure_of(claiming(60_000, 60_000)) == ImageFailure.TOO_LARGE
    assert failure_of(data, max_pixels=512 * 512 - 1) == ImageFailure.TOO_LARGE


def test_sides_and_aspect_are_limited_as_pixels_are() -> None:
    def strip(width: int, height: int) -> bytes:
        return encoded(Image.new("L", (width, height)), "PNG")

    with pytest.raises(ImageError, match=r"1000000 x 1 px; no side may be longer than 65535 px"):
        decode(strip(1_000_000, 1))
    assert failure_of(png_with_header(1, 50_000_000)) == ImageFailure.TOO_LARGE
    assert failure_of(png_with_header(400, 65_536)) == ImageFailure.TOO_LARGE
    assert decode(strip(330, 65_535)).height_px == 65_535
    with pytest.raises(
        ImageError, match=r"5 x 1001 px; .* more than 200 times as long as the other"
    ):
        decode(strip(5, 1001))
    assert decode(strip(1000, 5)).width_px == 1000


def test_metadata_that_unpacks_to_gigabytes_is_too_large_and_not_truncated() -> None:
    zeros = bytes(2 * PngImagePlugin.MAX_TEXT_CHUNK)
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", zeros.decode(), zip=True)
    assert failure_of(encoded(plain_image(), "PNG", pnginfo=text)) == ImageFailure.TOO_LARGE
    assert failure_of(encoded(plain_image(), "PNG", icc_profile=zeros)) == ImageFailure.TOO_LARGE


def test_running_out_of_memory_counts_as_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("reir.images.decode._to_rgb", exhausted)
    with pytest.raises(ImageError, match="this machine does not have enough memory") as caught:
        decode(encoded(plain_image(), "PNG"))
    assert caught.value.reason == ImageFailure.TOO_LARGE


def test_the_pixel_limit_is_exact() -> None:
    data = encoded(plain_image(64, 48), "PNG")
    assert isinstance(decode(data, max_pixels=64 * 48), DecodedImage)
    assert failure_of(data, max_pixels=64 * 48 - 1) == ImageFailure.TOO_LARGE

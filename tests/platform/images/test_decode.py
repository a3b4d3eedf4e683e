"""Decoding of every mode and orientation, hostile files, and the names of images."""

from __future__ import annotations

import io
import os
import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from pillow_heif import register_heif_opener

from reir.errors import ImageError, ImageFailure, SourceError
from reir.images.decode import (
    canonical_uri,
    content_hash,
    decode,
    decode_image,
    fitted_size,
    image_id,
    pad_and_stack,
    path_of_uri,
    read_bytes,
    read_image,
    upright_size,
)

register_heif_opener()  # so that the tests can write HEIC

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
ORIENTATION_TAG = 0x0112


def corners_image(width: int = 64, height: int = 48) -> Image.Image:
    """Four flat quarters: red, green, blue, white in reading order."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = RED
    pixels[: height // 2, width // 2 :] = GREEN
    pixels[height // 2 :, : width // 2] = BLUE
    pixels[height // 2 :, width // 2 :] = WHITE
    return Image.fromarray(pixels)


def noisy_image(width: int = 96, height: int = 80, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def quarters(pixels: npt.NDArray[np.uint8]) -> list[tuple[int, ...]]:
    """Colors in the middle of the four quarters, in reading order, rounded to 0 or 255."""
    height, width = pixels.shape[:2]
    spots = [pixels[y * height // 4, x * width // 4] for y, x in ((1, 1), (1, 3), (3, 1), (3, 3))]
    return [tuple(255 if value > 127 else 0 for value in spot) for spot in spots]


@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("GIF", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_deflate"}),
        ("BMP", {}),
        ("AVIF", {}),
        ("JPEG2000", {}),
        ("PPM", {}),
        ("HEIF", {}),
        ("HEIF", {"tile_size": 32}),
    ],
    ids=str,
)
def test_every_format_gives_the_same_quarters(file_format: str, options: dict[str, object]) -> None:
    decoded = decode(encoded(corners_image(), file_format, **options))
    assert decoded.pixels.dtype == np.uint8
    assert decoded.pixels.shape == (48, 64, 3)
    assert (decoded.width_px, decoded.height_px) == (64, 48)
    assert upright_size(encoded(corners_image(), file_format, **options)) == (64, 48)
    assert quarters(decoded.pixels) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(file_format: str, orientation: int) -> None:
    back = {  # how a camera held that way stores the upright scene
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    scene = corners_image()
    stored = scene.transpose(back[orientation]) if orientation in back else scene
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    data = encoded(stored, file_format, exif=exif)
    decoded = decode(data)
    assert (decoded.width_px, decoded.height_px) == upright_size(data) == (64, 48)
    assert decoded.pixels.shape == (48, 64, 3)
    assert quarters(decoded.pixels) == [RED, GREEN, BLUE, WHITE]


def test_corrupt_exif_leaves_the_image_as_stored() -> None:
    data = encoded(corners_image(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xffgarbage")
    assert quarters(decode_image(data)) == [RED, GREEN, BLUE, WHITE]


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    levels: npt.NDArray[np.uint16] = np.array([[0, 257 * 100, 65535]], np.uint16).repeat(4, 0)
    for file_format in ("PNG", "TIFF"):
        pixels = decode_image(encoded(Image.fromarray(levels), file_format))
        assert pixels[0, :, 0].tolist() == [0, 100, 255]


def test_16_bit_pnm_is_scaled() -> None:
    data = b"P5 3 1 65535\n" + np.array([0, 257 * 100, 65535], ">u2").tobytes()
    assert decode_image(data)[0, :, 1].tolist() == [0, 100, 255]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_deeper_grey_is_stretched_over_its_range(dtype: type) -> None:
    levels: npt.NDArray[np.generic] = np.array([[-20, 0, 20]], dtype).repeat(2, 0)
    pixels = decode_image(encoded(Image.fromarray(levels), "TIFF"))
    assert pixels[0, :, 0].tolist() == [0, 128, 255]


def test_constant_and_non_finite_float_images_decode() -> None:
    flat = decode_image(encoded(Image.fromarray(np.full((2, 2), 7, np.float32)), "TIFF"))
    assert (flat == 0).all()
    holes = np.array([[np.nan, 0.0], [1.0, np.inf]], np.float32)
    assert decode_image(encoded(Image.fromarray(holes), "TIFF"))[..., 0].tolist() == [
        [0, 0],
        [255, 255],
    ]


def test_cmyk_jpeg() -> None:
    data = encoded(corners_image().convert("CMYK"), "JPEG", quality=95)
    assert quarters(decode_image(data)) == [RED, GREEN, BLUE, WHITE]


def test_palette_one_bit_and_grey() -> None:
    assert quarters(decode_image(encoded(corners_image().quantize(8), "PNG"))) == [
        RED,
        GREEN,
        BLUE,
        WHITE,
    ]
    bits = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    assert decode_image(encoded(bits, "PNG"))[0].tolist() == [[0, 0, 0], [255, 255, 255]]
    grey = Image.new("L", (3, 2), 77)
    assert (decode_image(encoded(grey, "PNG")) == 77).all()


def test_ycbcr_tiff_is_rgb_in_the_end() -> None:
    data = encoded(corners_image().convert("YCbCr"), "TIFF")
    assert quarters(decode_image(data)) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_parts_become_white(mode: str) -> None:
    image = Image.new(mode, (8, 4), (0,) * len(mode))
    image.paste((0,) * (len(mode) - 1) + (255,), (0, 0, 4, 4))
    pixels = decode_image(encoded(image, "PNG"))
    assert (pixels[:, :4] == 0).all()
    assert (pixels[:, 4:] == 255).all()


def test_half_transparent_red_on_white() -> None:
    pixels = decode_image(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 128)), "PNG"))
    assert pixels[0, 0].tolist() == [255, 127, 127]


@pytest.mark.parametrize("file_format", ["PNG", "GIF"])
def test_palette_with_transparency_becomes_white(file_format: str) -> None:
    image = Image.new("P", (8, 4), 0)
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.paste(1, (4, 0, 8, 4))
    pixels = decode_image(encoded(image, file_format, transparency=0))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 7].tolist() == [200, 0, 0]


def test_color_key_transparency_of_rgb_png() -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    pixels = decode_image(encoded(image, "PNG", transparency=(1, 2, 3)))
    assert pixels[0].tolist() == [[255, 255, 255], [9, 9, 9]]


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animated_images_give_the_first_frame(file_format: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in (RED, GREEN, BLUE)]
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:])
    assert quarters(decode_image(data)) == [RED] * 4


def test_icc_profile_does_not_disturb() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = encoded(corners_image(), "JPEG", icc_profile=profile)
    assert quarters(decode_image(data)) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize("size", [(1600, 1200), (1203, 1601), (449, 300), (25, 4000)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_at_least_px_keeps_size_and_place(size: tuple[int, int], orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    data = encoded(corners_image(*size), "JPEG", exif=exif)
    full, small = decode(data), decode(data, at_least_px=448)
    assert (small.width_px, small.height_px) == (full.width_px, full.height_px)
    height, width = small.pixels.shape[:2]
    assert min(max(full.pixels.shape), 448) <= max(height, width)
    assert abs(width / height - full.width_px / full.height_px) < 0.02 * width / height
    if min(size) > 100:  # long strips are not drafted
        assert quarters(small.pixels) == quarters(full.pixels)
    if max(size) >= 2 * 448 and min(size) > 100:
        assert max(height, width) < 2 * 448 + 1


def test_at_least_px_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="at_least_px must be 1 or more, got 0"):
        decode(encoded(corners_image(), "JPEG"), at_least_px=0)


def failure_of(data: bytes, **options: int) -> ImageFailure:
    with pytest.raises(ImageError) as caught:
        decode(data, **options)
    return caught.value.reason


def test_empty_text_and_unknown_bytes() -> None:
    assert failure_of(b"") == ImageFailure.EMPTY
    assert failure_of(b"This is no picture, whatever its name says.\n") == ImageFailure.NOT_AN_IMAGE
    assert failure_of(b"\0" * 4096) == ImageFailure.NOT_AN_IMAGE
    assert failure_of(b"BMW is a car maker from Bavaria") == ImageFailure.NOT_AN_IMAGE
    assert failure_of(b"<svg xmlns='http://www.w3.org/2000/svg'/>") == ImageFailure.NOT_AN_IMAGE


def test_known_but_not_decoded_formats() -> None:
    assert failure_of(b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(64)) == ImageFailure.UNSUPPORTED
    assert failure_of(b"8BPS\0\1" + bytes(64)) == ImageFailure.UNSUPPORTED


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_cut_anywhere_is_truncated(progressive: bool) -> None:
    thumbnail = encoded(noisy_image(32, 24), "JPEG")
    exif = b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + thumbnail
    data = encoded(noisy_image(), "JPEG", progressive=progressive, exif=exif)
    assert decode_image(data).shape == (80, 96, 3)
    for length in (*range(1, 900), *range(900, len(data), 37), len(data) - 1):
        assert failure_of(data[:length]) == ImageFailure.TRUNCATED, length
        with pytest.raises(ImageError):
            upright_size(data[:length])


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "GIF", "TIFF"])
def test_other_formats_cut_anywhere_are_truncated(file_format: str) -> None:
    data = encoded(noisy_image(), file_format)
    last = len(data) - (4 if file_format == "GIF" else 1)  # the rest of a GIF is no pixel
    for length in (*range(4, 200), *range(200, last, 61), last):
        if file_format == "TIFF" and length == last:
            continue
        assert failure_of(data[:length]) == ImageFailure.TRUNCATED, length


@pytest.mark.parametrize("options", [{}, {"tile_size": 32}], ids=str)
def test_a_heic_cut_anywhere_is_truncated_even_if_its_decoder_shows_a_part(
    options: dict[str, object],
) -> None:
    data = encoded(noisy_image(), "HEIF", **options)
    for length in (*range(16, 200), *range(200, len(data), 97), len(data) - 1):
        assert failure_of(data[:length]) == ImageFailure.TRUNCATED, length


def test_bytes_after_the_end_of_a_jpeg_are_allowed() -> None:
    data = encoded(corners_image(), "JPEG") + b"\0" * 100 + b"trailer"
    assert quarters(decode_image(data)) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize("number", range(1, 9))
def test_a_heic_is_turned_upright_once(number: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = number
    stored = corners_image()
    turned = encoded(stored, "HEIF", exif=exif.tobytes(), quality=90)
    plain = encoded(stored, "JPEG", exif=exif, quality=95)
    photo, same = decode(turned), decode(plain)
    assert quarters(photo.pixels) == quarters(same.pixels)
    assert (photo.width_px, photo.height_px) == (same.width_px, same.height_px)
    assert upright_size(turned) == upright_size(plain) == (same.width_px, same.height_px)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Cut the data, or flip some of its bits, more often near the header."""
    if rng.random() < 0.4:
        return data[: rng.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(rng.choice((1, 3, 20))):
        reach = rng.choice((64, len(changed)))
        changed[rng.randrange(min(reach, len(changed)))] ^= 1 << rng.randrange(8)
    return bytes(changed)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "HEIF"])
def test_damaged_files_raise_image_errors_only_and_never_warn(file_format: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 3
    exif[0x010F] = "maker"
    options = {"exif": exif} if file_format in ("JPEG", "PNG", "WEBP", "TIFF") else {}
    data = encoded(noisy_image(40, 30), file_format, **options)
    rng = random.Random(file_format)
    failed = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(200):
            damaged = mutated(data, rng)
            try:
                decoded = decode(damaged, max_pixels=1_000_000)
            except ImageError:
                failed += 1
                with suppress(ImageError):  # only the header of this one may be undamaged
                    upright_size(damaged, max_pixels=1_000_000)
            else:
                assert decoded.pixels.ndim == 3
                size = (decoded.width_px, decoded.height_px)
                assert upright_size(damaged, max_pixels=1_000_000) == size
    assert [str(warning.message) for warning in caught] == []
    assert failed > 20


@given(st.binary(max_size=300))
def test_any_bytes_give_pixels_or_an_image_error(data: bytes) -> None:
    try:
        pixels = decode_image(data)
    except ImageError:
        return
    assert pixels.shape[2] == 3


def test_decoding_is_the_same_in_many_threads() -> None:
    files = [encoded(noisy_image(seed=seed), "PNG") for seed in range(8)] * 8
    alone = [decode_image(data) for data in files]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(decode_image, files))
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))


def read_failure(path: Path) -> ImageFailure:
    with pytest.raises(ImageError) as caught:
        read_bytes(path)
    return caught.value.reason


def test_reading_from_disk(tmp_path: Path) -> None:
    path = tmp_path / "a b.png"
    path.write_bytes(encoded(corners_image(), "PNG"))
    assert quarters(read_image(path)) == [RED, GREEN, BLUE, WHITE]
    assert quarters(read_image(str(path))) == [RED, GREEN, BLUE, WHITE]


def test_the_error_of_a_damaged_file_names_it(tmp_path: Path) -> None:
    path = tmp_path / "holiday.jpg"
    path.write_bytes(b"abc")
    with pytest.raises(ImageError, match=r"^not_an_image: '.*holiday\.jpg': 3 bytes"):
        read_image(path)


def test_unreadable_paths(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    assert read_failure(tmp_path / "folder.jpg") == ImageFailure.UNREADABLE
    os.mkfifo(tmp_path / "pipe.jpg")
    assert read_failure(tmp_path / "pipe.jpg") == ImageFailure.UNREADABLE
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    assert read_failure(tmp_path / "loop.jpg") == ImageFailure.UNREADABLE


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
def test_what_cannot_be_read_leaves_no_file_open(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "large.jpg").write_bytes(bytes(11))
    before = sorted(os.listdir("/proc/self/fd"))
    for path in (tmp_path, tmp_path / "pipe.jpg", tmp_path / "large.jpg", Path("/dev/null")):
        with pytest.raises(ImageError):
            read_bytes(path, max_bytes=10)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_missing_paths(tmp_path: Path) -> None:
    assert read_failure(tmp_path / "none.jpg") == ImageFailure.MISSING
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "none.jpg")
    assert read_failure(tmp_path / "broken.jpg") == ImageFailure.MISSING
    (tmp_path / "file").write_bytes(b"x")
    assert read_failure(tmp_path / "file" / "below.jpg") == ImageFailure.MISSING


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("reir.images.decode.os.open", refuse)
    with pytest.raises(ImageError, match="Permission denied") as caught:
        read_bytes(tmp_path / "x.jpg")
    assert caught.value.reason == ImageFailure.UNREADABLE


def test_files_over_the_byte_limit(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    path.write_bytes(bytes(11))
    with pytest.raises(ImageError, match="has 11 bytes, at most 10") as caught:
        read_bytes(path, max_bytes=10)
    assert caught.value.reason == ImageFailure.TOO_LARGE
    assert len(read_bytes(path, max_bytes=11)) == 11


NAMES = st.binary(min_size=1, max_size=40).filter(
    lambda name: b"\0" not in name and b"/" not in name and name not in (b".", b"..")
)


@given(st.lists(NAMES, min_size=1, max_size=3))
def test_uris_keep_any_file_name(names: list[bytes]) -> None:
    path = Path(os.fsdecode(b"/" + b"/".join(names)))
    uri = canonical_uri(path)
    assert uri.isascii()
    assert uri.isprintable()
    assert " " not in uri
    assert path_of_uri(uri) == path


@given(NAMES, NAMES)
@settings(max_examples=50)
def test_different_names_have_different_uris_and_ids(one: bytes, other: bytes) -> None:
    uris = [canonical_uri(os.fsdecode(b"/" + name)) for name in (one, other)]
    assert (uris[0] == uris[1]) == (one == other)
    assert (image_id(uris[0]) == image_id(uris[1])) == (one == other)


def test_odd_names_on_a_real_disk(tmp_path: Path) -> None:
    data = encoded(corners_image(), "PNG")
    for name in (b"new\nline.png", b"latin-\xe9.png", b"100%.png", "naïve 写真.png".encode()):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        path.write_bytes(data)
        assert read_bytes(path_of_uri(canonical_uri(path))) == data


def test_uris_are_absolute_and_stable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert canonical_uri("a b.jpg") == canonical_uri(tmp_path / "x" / ".." / "a b.jpg")
    assert canonical_uri("/photos/a b.jpg") == "file:///photos/a%20b.jpg"
    assert image_id("file:///x") == content_hash(b"file:///x")[:20]
    assert len(image_id("file:///x")) == 20


@pytest.mark.parametrize("uri", ["s3://bucket/x.jpg", "file://host/x.jpg", "/x.jpg", ""])
def test_foreign_uris_are_refused(uri: str) -> None:
    with pytest.raises(SourceError, match="expected file:///"):
        path_of_uri(uri)


def test_content_hash_is_sha256() -> None:
    assert content_hash(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_a_fitted_size_keeps_the_aspect_until_the_long_side_forbids() -> None:
    assert fitted_size(640, 480, 800, 1333) == (1067, 800)
    assert fitted_size(1000, 100, 800, 1333) == (1333, 133)
    assert fitted_size(3, 1000, 800, 1333) == (4, 1333)
    assert fitted_size(1, 9999, 16, 16) == (1, 16)


def test_stacked_photos_stand_in_the_top_left() -> None:
    random = np.random.default_rng(0)
    photos = [random.integers(1, 256, (*size, 3), dtype=np.uint8) for size in ((4, 7), (6, 2))]
    pixels, sizes = pad_and_stack(photos)
    assert pixels.shape == (2, 3, 6, 7)
    assert sizes.tolist() == [[4, 7], [6, 2]]
    for place, photo in zip(pixels, photos, strict=True):
        height, width = photo.shape[:2]
        np.testing.assert_array_equal(place[:, :height, :width].transpose(1, 2, 0), photo)
        assert place.sum() == photo.sum()

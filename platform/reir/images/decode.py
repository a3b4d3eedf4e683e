"""Safe decoding of images, and the URIs and ids of images.

Decoding any bytes either returns upright RGB pixels or raises an `ImageError` with the reason. All
functions are thread-safe.
"""

# Shapes: H x W pixels of the upright image

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from reir.errors import ImageError, ImageFailure, ImageUnreachable, SourceError
from reir.images.file_formats import ImageFormat, is_cut_within_magic, sniff
from reir.records import RgbImage

DEFAULT_MAX_PIXELS = 120_000_000
"""Photos of the largest phone sensors, 12,000 x 9,000 px, stay below it."""
DEFAULT_MAX_BYTES = 512 * 1024**2
MAX_SIDE_PX = 65_535
"""The longest side that a JPEG header can express; photos and panoramas stay below it."""
MAX_ASPECT = 200
"""Largest ratio of the longer side to the shorter one. Resizing a narrow strip takes memory in
proportion to its length, not to its pixels, and no model recognizes anything in it."""

_ORIENTATION_TAG = 0x0112
# Pillow rotates counterclockwise, so 6, which asks for a quarter turn clockwise, is `ROTATE_270`.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = frozenset({5, 6, 7, 8})
# Below this, the reader's rounding up to whole pixels would shift normalized boxes.
_LEAST_DRAFT_SIDE_PX = 64

# Exceptions that Pillow's readers raise for damaged files.
_READER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    RuntimeError,
    Warning,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
# Errors of a disk or a file server that may be temporary.
_TEMPORARY = frozenset(
    {
        errno.EIO,
        errno.ESTALE,
        errno.EAGAIN,
        errno.ETIMEDOUT,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.ENOTCONN,
        errno.EMFILE,
        errno.ENFILE,
    }
)
_QUIET_MODULES = r"PIL\."
# The entry that `_hide_metadata_warnings` adds to the filters, by which it recognizes it later.
_QUIET = ("ignore", None, UserWarning, re.compile(_QUIET_MODULES), 0)

# Parts of their messages about valid files in an unsupported variant.
_UNSUPPORTED_WORDS = ("unsupported", "not supported", "unknown pixel mode", "not available")
# Parts of their messages about small files that would decompress to huge ones.
_BOMB_WORDS = ("decompressed data too large", "too much memory used", "security limit")


@dataclass(frozen=True)
class DecodedImage:
    """One decoded photo.

    Attributes:
        pixels: (H, W, 3) uint8, upright, RGB; smaller than the photo when `at_least_px` was given.
        width_px: width of the whole upright photo.
        height_px: height of the whole upright photo.
    """

    pixels: RgbImage
    width_px: int
    height_px: int


def decode(
    data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS, at_least_px: int | None = None
) -> DecodedImage:
    """Decode an image file: its first frame, upright by EXIF, transparent parts on white.

    Args:
        data: the whole file.
        max_pixels: larger images, and those beyond `MAX_SIDE_PX` or `MAX_ASPECT`, are refused by
            their header, before any pixel is decoded.
        at_least_px: allow a JPEG to be decoded at 1/2, 1/4 or 1/8 of its size while its longer
            side keeps at least this many pixels; several times faster for large photos. Normalized
            boxes are the same at every scale.

    Raises:
        ImageError: `reason` says what is wrong.
        ValueError: `at_least_px` is less than 1.
    """
    if at_least_px is not None and at_least_px < 1:
        raise ValueError(f"at_least_px must be 1 or more, got {at_least_px}")
    file_format, image = _open_whole(data, max_pixels)
    size = image.size  # of the whole photo: `_draft` changes it
    try:
        if at_least_px is not None:
            _draft(image, at_least_px)
        image.load()
        # After `load`, which turns a TIFF upright and then deletes its orientation.
        orientation = _orientation(image)
        pixels = _to_rgb(image, orientation)
    except _READER_ERRORS as error:
        raise _failure(error, file_format, "pixels") from error
    return DecodedImage(pixels, *_upright(size, orientation))


def upright_size(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> tuple[int, int]:
    """Return the (width, height) in pixels of an upright photo, without decoding its pixels.

    Args:
        data: the whole file.
        max_pixels: as for `decode`.

    Raises:
        ImageError: the header is damaged, or the end of the file is missing. Damage in between is
            only found by `decode`.
    """
    _, image = _open_whole(data, max_pixels)
    # Pillow itself turns a TIFF upright, and states its upright size before that.
    turned = isinstance(image, TiffImageFile)
    return image.size if turned else _upright(image.size, _orientation(image))


def decode_image(data: bytes) -> RgbImage:
    """Return the (H, W, 3) uint8 pixels of an image file; see `decode`.

    Raises:
        ImageError: `reason` says what is wrong.
    """
    return decode(data).pixels


def read_image(path: str | Path) -> RgbImage:
    """Return the (H, W, 3) uint8 pixels of the image file at `path`.

    Raises:
        ImageError: `reason` says what is wrong, and `detail` names the file.
    """
    data = read_bytes(path)
    try:
        return decode_image(data)
    except ImageError as error:
        raise ImageError(error.reason, f"{_quoted(path)}: {error.detail}") from error


def read_bytes(path: str | Path, *, max_bytes: int = DEFAULT_MAX_BYTES) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        ImageError: MISSING (also a broken link), UNREADABLE (no permission, a folder, a device) or
            TOO_LARGE.
        ImageUnreachable: the disk or the file server failed, perhaps temporarily.
    """
    try:
        # `open` refuses a folder and closes its descriptor, which `os.fdopen` would leave open.
        with open(path, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(ImageFailure.UNREADABLE, f"{_quoted(path)} is not a regular file")
            if status.st_size > max_bytes:
                raise ImageError(
                    ImageFailure.TOO_LARGE,
                    f"{_quoted(path)} has {status.st_size} bytes, at most {max_bytes} are read",
                )
            return file.read(max_bytes)  # the file may have grown since its size was read
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError(ImageFailure.MISSING, f"{_quoted(path)} does not exist") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        passing = isinstance(error, OSError) and error.errno in _TEMPORARY
        kind = ImageUnreachable if passing else ImageError
        raise kind(ImageFailure.UNREADABLE, f"{_quoted(path)}: {reason}") from error


def _open_at_once(path: str, flags: int) -> int:
    # Without O_NONBLOCK, opening a pipe would block forever.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def canonical_uri(path: str | Path) -> str:
    """Return the `file://` URI of `path`, absolute, every unusual byte percent-encoded.

    It encodes the bytes of the path, so names with newlines or in invalid encodings stay distinct.
    """
    return "file://" + quote(os.fsencode(os.path.abspath(path)))


def path_of_uri(uri: str) -> Path:
    """Return the path that `canonical_uri` made `uri` from.

    Raises:
        SourceError: it is not a local `file://` URI.
    """
    if not uri.startswith("file:///"):
        raise SourceError(f"uri {uri!r} is not local; expected file:///absolute/path")
    return Path(os.fsdecode(unquote_to_bytes(uri.removeprefix("file://"))))


def image_id(uri: str) -> str:
    """Return the stable key of an image: 20 hex digits of the sha256 of its canonical URI."""
    # 80 bits: among a billion images, the probability that any two ids are equal is below 10^-6.
    return hashlib.sha256(uri.encode()).hexdigest()[:20]


def content_hash(data: bytes) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def fitted_size(width: float, height: float, short_side: int, long_side: int) -> tuple[int, int]:
    """Return the (width, height) to which a photo is resized.

    Its shorter side becomes `short_side`, unless the longer one would exceed `long_side`.
    The aspect ratio is kept; a side is at least one pixel.
    """
    scale = min(short_side / min(width, height), long_side / max(width, height))
    return max(round(width * scale), 1), max(round(height * scale), 1)


def pad_and_stack(
    photos: Sequence[RgbImage],
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Stack B photos into one array, padded with zeros at the right and bottom.

    Returns:
        (B, 3, H, W) pixels, and (B, 2) height and width of each photo within.
    """
    sizes = np.array([photo.shape[:2] for photo in photos], dtype=np.int64)
    pixels = np.zeros((len(photos), 3, *sizes.max(axis=0)), dtype=np.uint8)
    for place, photo, (height, width) in zip(pixels, photos, sizes, strict=True):
        place[:, :height, :width] = photo.transpose(2, 0, 1)
    return pixels, sizes


def _recognize(data: bytes) -> ImageFormat:
    if not data:
        raise ImageError(ImageFailure.EMPTY, "the file has 0 bytes")
    file_format = sniff(data)
    if file_format is None:
        # The message contains none of its bytes: a list may name files that its user must not read.
        if is_cut_within_magic(data):
            raise ImageError(ImageFailure.TRUNCATED, f"only {len(data)} bytes")
        raise ImageError(
            ImageFailure.NOT_AN_IMAGE,
            f"{len(data)} bytes that do not begin like any known image format",
        )
    return file_format


def _open_whole(data: bytes, max_pixels: int) -> tuple[ImageFormat, ImageFile.ImageFile]:
    """Parse the header of a file that is complete."""
    file_format = _recognize(data)
    image = _open(data, file_format, max_pixels)
    if not file_format.is_complete(data):
        raise ImageError(
            ImageFailure.TRUNCATED, f"{file_format.name} of {len(data)} bytes has no end"
        )
    return file_format, image


def _open(data: bytes, file_format: ImageFormat, max_pixels: int) -> ImageFile.ImageFile:
    """Parse the header, and refuse images with more than `max_pixels`."""
    if file_format.reader is None:
        raise ImageError(
            ImageFailure.UNSUPPORTED, f"{file_format.name} files are not decoded; convert to JPEG"
        )
    # If our own parser finds the size, before Pillow's reader touches the file; in any case, after
    # it has parsed the header.
    _check_size(file_format.header_size(data), max_pixels)
    _hide_metadata_warnings()
    try:
        image = file_format.reader(io.BytesIO(data))
    except _READER_ERRORS as error:
        raise _failure(error, file_format, "header") from error
    _check_size(image.size, max_pixels)
    return image


def _check_size(size: tuple[int, int] | None, max_pixels: int) -> None:
    if size is None:
        return
    if size[0] * size[1] > max_pixels:
        limit = f"the limit is {max_pixels / 1e6:g} million px (max_pixels)"
    elif max(size) > MAX_SIDE_PX:
        limit = f"no side may be longer than {MAX_SIDE_PX} px"
    elif max(size) > MAX_ASPECT * min(size):
        limit = f"no side may be more than {MAX_ASPECT} times as long as the other"
    else:
        return
    raise ImageError(ImageFailure.TOO_LARGE, f"{size[0]} x {size[1]} px; {limit}")


def _hide_metadata_warnings() -> None:
    """Hide Pillow's warnings about damaged metadata.

    The filter is for Pillow's modules only, and stays installed: saving and restoring the warning
    filters for each image would not be thread-safe.
    """
    # Other libraries and tests may have put their own filters first since the last image.
    if not warnings.filters or warnings.filters[0] != _QUIET:
        warnings.filterwarnings("ignore", category=UserWarning, module=_QUIET_MODULES)


def _failure(error: BaseException, file_format: ImageFormat, part: str) -> ImageError:
    """Convert an exception of a reader to an `ImageError` with a reason."""
    said = str(error) or type(error).__name__
    detail = f"{file_format.name} {part}: {said}"
    if isinstance(error, MemoryError):
        return ImageError(
            ImageFailure.TOO_LARGE, f"{detail}; this machine does not have enough memory"
        )
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return ImageError(ImageFailure.TOO_LARGE, detail)
    if any(word in said.lower() for word in _BOMB_WORDS):
        return ImageError(
            ImageFailure.TOO_LARGE, f"{detail}; it would unpack to many times the size of the file"
        )
    if any(word in said.lower() for word in _UNSUPPORTED_WORDS):
        return ImageError(ImageFailure.UNSUPPORTED, detail)
    return ImageError(ImageFailure.TRUNCATED, detail)


def _draft(image: ImageFile.ImageFile, at_least_px: int) -> None:
    """Let a JPEG be decoded at the smallest of 1/1 ... 1/8 that keeps its longer side long enough.

    Other formats would return an embedded thumbnail, which may show a different picture.
    """
    if not isinstance(image, JpegImageFile):
        return
    for divisor in (8, 4, 2):
        if (
            max(image.size) // divisor >= at_least_px
            and min(image.size) // divisor >= _LEAST_DRAFT_SIDE_PX
        ):
            image.draft(None, (image.width // divisor, image.height // divisor))
            return


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1 (upright) if the metadata cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except _READER_ERRORS:
        return 1
    return value if value in _UPRIGHT else 1


def _upright(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Return the width and height of a stored photo after it is turned upright."""
    width, height = size
    return (height, width) if orientation in _SWAPS_SIDES else (width, height)


def _to_rgb(image: Image.Image, orientation: int) -> RgbImage:
    """Return upright RGB pixels of any mode, transparent parts on white."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _gray_to_8_bit(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    return np.array(image)  # a copy: `np.asarray` would return a read-only view


def _gray_to_8_bit(image: Image.Image) -> Image.Image:
    """Scale gray values to 8 bits: 16-bit integers by their full range, others by their own range.

    32-bit integers and floats have no defined white, so their smallest and largest finite values
    become black and white.
    """
    # Pillow reads 16-bit PNM files as 32-bit integers, but with the range of 16 bits.
    if image.mode.startswith("I;16") or image.format == "PPM":
        # The product below needs 32 bits; adding half of the divisor rounds to the nearest.
        deep = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((deep * 255 + 32767) // 65535).astype(np.uint8))
    values: npt.NDArray[np.float64] = np.asarray(image).astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    scaled = (np.nan_to_num(values, nan=low) - low) / max(high - low, 1e-12)
    return Image.fromarray(np.rint(scaled.clip(0, 1) * 255).astype(np.uint8))


def _quoted(path: str | Path) -> str:
    """Return a path for a message, with newlines and undecodable bytes escaped."""
    return ascii(os.fspath(path))

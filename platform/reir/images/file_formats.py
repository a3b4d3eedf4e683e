"""Image file formats: recognition, size and completeness of a file before any pixel is decoded.

Pillow's reader classes are used directly and not through `PIL.Image.open`, which warns about large
images and tries formats that we do not accept.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

Size = tuple[int, int]

# A marker is 0xFF and its number. Within coded data, 0xFF is followed by 0x00 if it is a value, and
# by 0xD0 to 0xD7 for a restart; repeated 0xFF are padding.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_JPEG_END = 0xD9
_JPEG_STANDALONE = frozenset({0x01, 0xD8})
# The other three define tables, or are reserved.
_JPEG_FRAME_STARTS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def _always(_: bytes) -> bool:
    return True


def _no_size(_: bytes) -> Size | None:
    return None


@dataclass(frozen=True)
class ImageFormat:
    """One file format.

    Attributes:
        name: for messages.
        magic: matches the first bytes of a file of this format.
        reader: parses a file with Pillow or one of its plugins; None for a format that is
            recognized but not decoded.
        header_size: width and height in px from the header alone; None if it does not have them.
        is_complete: whether the file reaches its end marker; True if the format has none.
    """

    name: str
    magic: re.Pattern[bytes]
    reader: Callable[[io.BytesIO], ImageFile.ImageFile] | None
    header_size: Callable[[bytes], Size | None] = _no_size
    is_complete: Callable[[bytes], bool] = _always


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield (marker, offset of what follows it), stepping over segments and coded data.

    Within coded data a 0xFF byte is always stuffed, so an end mark found here is the real one and
    not that of an embedded thumbnail.
    """
    position = 2
    while found := _JPEG_MARKER.search(data, position):
        marker, position = found.group()[1], found.end()
        yield marker, position
        if marker in _JPEG_STANDALONE:
            continue
        if marker == _JPEG_END or position + 2 > len(data):
            return
        position += int.from_bytes(data[position : position + 2], "big")


def _jpeg_size(data: bytes) -> Size | None:
    for marker, start in _jpeg_segments(data):
        if marker in _JPEG_FRAME_STARTS and start + 7 <= len(data):
            height, width = struct.unpack_from(">HH", data, start + 3)
            return width, height
    return None


def _jpeg_is_complete(data: bytes) -> bool:
    return any(marker == _JPEG_END for marker, _ in _jpeg_segments(data))


def _png_size(data: bytes) -> Size | None:
    if len(data) < 24 or data[12:16] != b"IHDR":
        return None
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def _png_is_complete(data: bytes) -> bool:
    # After the signature. A chunk has a length, a kind, its data and a checksum, of which the
    # length counts the data alone.
    position = 8
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        position += 12 + length
        if kind == b"IEND":
            return bool(position <= len(data))
    return False


def _gif_size(data: bytes) -> Size | None:
    if len(data) < 10:
        return None
    width, height = struct.unpack_from("<HH", data, 6)
    return width, height


def _bmp_size(data: bytes) -> Size | None:
    if len(data) < 26 or data[14] == 12:  # the 1985 header has 16-bit sides
        return None
    width, height = struct.unpack_from("<ii", data, 18)
    return abs(width), abs(height)  # a negative height means that rows are stored from the top


def _riff_is_complete(data: bytes) -> bool:
    # The length counts what follows it: neither itself nor the four bytes before.
    return len(data) >= 8 + int.from_bytes(data[4:8], "little")


def _heic_is_complete(data: bytes) -> bool:
    """Whether no box extends past the end of the file.

    libheif decodes a truncated grid of tiles without an error, so it would not notice.
    """
    position = 0
    while position + 8 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        if length == 0:  # this box extends to the end of the file
            return True
        # A length of 1 says that one of 64 bits follows the kind of the box.
        if length == 1:
            length = int.from_bytes(data[position + 8 : position + 16], "big")
        # A length includes the 8 bytes of the header; a smaller, damaged one must not stall here.
        position += max(length, 8)
    return position <= len(data)


def _heic_reader(file: io.BytesIO) -> ImageFile.ImageFile:
    """Parse a HEIC file; the plugin turns the image upright and resets its EXIF orientation.

    The plugin is imported on first use: libheif takes longer to load than all Pillow readers.
    """
    from pillow_heif import HeifImageFile

    image: ImageFile.ImageFile = HeifImageFile(file)  # type: ignore[no-untyped-call]
    return image


def _magic(pattern: bytes) -> re.Pattern[bytes]:
    # So that `.` also stands for a byte that would be a line break in a text.
    return re.compile(pattern, re.DOTALL)


FORMATS: tuple[ImageFormat, ...] = (
    ImageFormat(
        "JPEG",
        _magic(rb"\xff\xd8\xff"),
        JpegImagePlugin.JpegImageFile,
        _jpeg_size,
        _jpeg_is_complete,
    ),
    ImageFormat(
        "PNG",
        _magic(rb"\x89PNG\r\n\x1a\n"),
        PngImagePlugin.PngImageFile,
        _png_size,
        _png_is_complete,
    ),
    ImageFormat(
        "WebP",
        _magic(rb"RIFF.{4}WEBP"),
        WebPImagePlugin.WebPImageFile,
        is_complete=_riff_is_complete,
    ),
    ImageFormat("GIF", _magic(rb"GIF8[79]a"), GifImagePlugin.GifImageFile, _gif_size),
    ImageFormat(
        "TIFF",
        _magic(rb"II\*\0|MM\0\*|II\x2b\0|MM\0\x2b"),
        TiffImagePlugin.TiffImageFile,
    ),
    # With the zeros of its reserved fields, since a text may begin with "BM", too.
    ImageFormat("BMP", _magic(rb"BM.{4}\0{4}"), BmpImagePlugin.BmpImageFile, _bmp_size),
    # Before HEIC, whose pattern also fits AVIF files of the general brands "mif1" and "msf1".
    ImageFormat(
        "AVIF",
        _magic(rb".{4}ftyp(?:avi[fs]|m[is]f1.{4,60}avi[fs])"),
        AvifImagePlugin.AvifImageFile,
    ),
    ImageFormat(
        "JPEG 2000",
        _magic(rb"\xff\x4f\xff\x51|\0{3}\x0cjP  \r\n\x87\n"),
        Jpeg2KImagePlugin.Jpeg2KImageFile,
    ),
    ImageFormat("PNM", _magic(rb"P[1-6]\s+[\d#]"), PpmImagePlugin.PpmImageFile),
    ImageFormat(
        "HEIC",
        _magic(rb".{4}ftyp(?:hei[cxms]|hev[cmsx]|m[is]f1)"),
        _heic_reader,
        is_complete=_heic_is_complete,
    ),
    ImageFormat("Photoshop", _magic(rb"8BPS\0[\1\2]"), None),
    ImageFormat("JPEG XL", _magic(rb"\xff\x0a|\0{3}\x0cJXL \r\n\x87\n"), None),
)

_LONGEST_MAGIC = 12
# Without short ones such as "BM" and "P5", with which a short text may begin as well.
_BINARY_STARTS = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"RIFF",
    b"II*\0",
    b"MM\0*",
)


def sniff(data: bytes) -> ImageFormat | None:
    """Return the format whose magic bytes `data` starts with, or None."""
    return next((known for known in FORMATS if known.magic.match(data)), None)


def is_cut_within_magic(data: bytes) -> bool:
    """Whether `data` is too short to tell but starts as an image file does."""
    return len(data) < _LONGEST_MAGIC and any(
        start.startswith(data) or data.startswith(start) for start in _BINARY_STARTS
    )

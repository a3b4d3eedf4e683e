"""The interface of a source of images; `open_source` opens the source that the user named.

Every source can be pickled, because each worker that reads images gets a copy of it. A listing is
a stream: no source keeps the list of its images in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from reir.records import Attributes
from reir.store.filters import MAX_INT

# fmt: off
IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
    ".jxl", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
)
# fmt: on
"""Suffixes of the files that are listed, in any case. Images in a format that cannot be decoded are
listed too, so that the ledger says why they are not indexed."""

WEB_SCHEMES = ("http://", "https://")

# Not 0, which is the time of a file that does not exist (`ABSENT_FILE`).
UNKNOWN_TIME_NS = -1
"""Time of a file for which a server reports neither a time nor an ETag. Such a file is read in
every run, because nothing else would show that it has changed."""

OnError = Callable[[str, Exception], None]
"""Function to call for each part that cannot be listed (a folder, file or line), with the name of
that part and the error."""


def ignore_error(part: str, error: Exception) -> None:
    """Ignore that a part cannot be listed; the default `OnError`."""


class FileStatus(NamedTuple):
    """Size and time of a file; if either differs, the file has changed. See `SourceFile`."""

    size_bytes: int
    mtime_ns: int


ABSENT_FILE = FileStatus(0, 0)
"""Status of a path that does not exist or is not a regular file. Such a path is listed like any
other, so that the ledger records why it was not indexed."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One listed image. A size or time beyond the 64 bits of the ledger becomes the nearest number.

    Attributes:
        uri: canonical URI, under which the image is stored.
        size_bytes: size of the file; 0 if the file does not exist, and for the row of a table.
        mtime_ns: time of the last change. An image in an archive or table has the time of that
            archive or table. 0 if the file does not exist, `UNKNOWN_TIME_NS` if the server does
            not report a time.
        attributes: values from the user's own columns.
        offset: position of the image in its archive (a byte) or table (a row).
    """

    uri: str
    size_bytes: int
    mtime_ns: int
    attributes: Attributes = field(default_factory=dict)
    offset: int = 0

    def __post_init__(self) -> None:
        """Bound size and time: a wrong clock or server must not make the store refuse a batch."""
        for name in ("size_bytes", "mtime_ns"):
            value = getattr(self, name)
            if abs(value) > MAX_INT:
                object.__setattr__(self, name, max(-MAX_INT, min(value, MAX_INT)))


class Source(Protocol):
    """Lists images and reads them."""

    @property
    def text(self) -> str:
        """The source as the user wrote it."""
        ...

    def uris(self, on_error: OnError = ignore_error) -> Iterator[str]:
        """Yield the canonical URIs of the images.

        Counting images this way is cheap, because sizes and times are not looked up.

        Args:
            on_error: called for each part that cannot be listed; that part counts as empty.

        Raises:
            SourceError: the listing itself failed, even after retries.
        """
        ...

    def files(self, on_error: OnError = ignore_error) -> Iterator[SourceFile]:
        """Yield the images in the order of `uris`, with size and time.

        Args:
            on_error: called for each part that cannot be listed; that part counts as empty.

        Raises:
            SourceError: the listing itself failed, even after retries.
        """
        ...

    def read(self, file: SourceFile) -> bytes:
        """Return the bytes of an image. Many threads and processes call this at the same time.

        Raises:
            ImageError: MISSING, UNREADABLE, UNREACHABLE or TOO_LARGE.
        """
        ...

    def has_lost(self, uri: str) -> bool:
        """Return whether `uri` is an image of this source that no longer exists.

        An image that merely cannot be reached or listed is not lost.
        """
        ...

"""The interface of a source of images; `open_source` makes one from the text of the user.

Every source can be pickled, since the workers that read get a copy. Listing streams: no source
holds the list of its images in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

from reir.records import Attributes

# fmt: off
IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
    ".jxl", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
)
# fmt: on
"""Suffixes of the files that are listed, in any case. Images in a format that cannot be decoded are
listed too, so that the ledger says why they are not indexed."""

WEB_SCHEMES = ("http://", "https://")

UNKNOWN_TIME_NS = -1
"""Time of a file of which a server tells neither time nor ETag: it is read in every run."""

OnError = Callable[[str, Exception], None]
"""Called with the name of a part that cannot be listed (a folder, file or line) and the error."""


def ignore_error(part: str, error: Exception) -> None:
    """Do nothing about a part that cannot be listed."""


class FileStatus(NamedTuple):
    """Size and time of a file, by which a change is noticed; see `SourceFile`."""

    size_bytes: int
    mtime_ns: int


ABSENT_FILE = FileStatus(0, 0)
"""Status of a path that does not exist or is not a regular file."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One listed image.

    Attributes:
        uri: canonical URI, under which the image is stored.
        size_bytes: a change of size or time means that the file has changed. 0 if the file does
            not exist, and for the row of a table.
        mtime_ns: time of the last change; for an image in an archive or table, that of the archive
            or table. 0 if the file does not exist, `UNKNOWN_TIME_NS` if the server does not tell.
        attributes: columns of the user.
        offset: position of the image in its archive (a byte) or table (a row).
    """

    uri: str
    size_bytes: int
    mtime_ns: int
    attributes: Attributes = field(default_factory=dict)
    offset: int = 0


@runtime_checkable
class Source(Protocol):
    """Lists images and reads them."""

    @property
    def text(self) -> str:
        """The source as the user wrote it."""
        ...

    def uris(self, on_error: OnError = ignore_error) -> Iterator[str]:
        """Yield the canonical URIs of the images.

        Does not look up each image, so that counting is cheap.

        Args:
            on_error: called for each part that cannot be listed; it counts as empty.

        Raises:
            SourceError: the listing itself failed, even after retries.
        """
        ...

    def files(self, on_error: OnError = ignore_error) -> Iterator[SourceFile]:
        """Yield the images in the order of `uris`, with size and time.

        Args:
            on_error: called for each part that cannot be listed; it counts as empty.

        Raises:
            SourceError: the listing itself failed, even after retries.
        """
        ...

    def read(self, file: SourceFile) -> bytes:
        """Return the bytes of an image; called from many threads and processes.

        Raises:
            ImageError: MISSING, UNREADABLE, UNREACHABLE or TOO_LARGE.
        """
        ...

    def has_lost(self, uri: str) -> bool:
        """Return whether `uri` is an image of this source that no longer exists.

        An image that merely cannot be reached or listed is not lost.
        """
        ...

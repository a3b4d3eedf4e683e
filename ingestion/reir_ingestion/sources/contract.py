"""What a source of images is to the rest of the job; `open_source` makes one from its text.

Every source pickles, since the workers that read get a copy, and listing streams: no source holds
the list of its images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

from reir.records import Attributes

# fmt: off
IMAGE_ENDINGS = (
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
    ".jxl", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
)
# fmt: on
"""Endings of the files that are listed, in any case; formats that are not decoded get a reason."""

BUCKETS = ("s3://", "gs://")
WEB = ("http://", "https://")

UNKNOWN_TIME_NS = -1
"""Time of a file whose place tells nothing that a change would alter: it is read in every run."""

OnError = Callable[[str, Exception], None]
"""Told of each part that cannot be listed: its name (a folder, a file, a line) and the error."""


def ignore_error(part: str, error: Exception) -> None:
    """Do nothing about a part that cannot be listed."""


class Status(NamedTuple):
    """What tells a changed file from an old one; see `SourceFile`."""

    size_bytes: int
    mtime_ns: int


NOWHERE = Status(0, 0)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One listed image.

    Attributes:
        uri: canonical URI, the name under which the image is kept.
        size_bytes: with `mtime_ns` what tells a changed file from an old one; 0 when it leads
            nowhere, and for the row of a table.
        mtime_ns: time of the last change, of the archive or table for an image within one; 0 when
            it leads nowhere, `UNKNOWN_TIME_NS` when the place does not tell.
        attributes: user columns.
        offset: where the image lies in its archive (a byte) or table (a row).
    """

    uri: str
    size_bytes: int
    mtime_ns: int
    attributes: Attributes = field(default_factory=dict)
    offset: int = 0


@runtime_checkable
class Source(Protocol):
    """A place to list images from and to read them."""

    @property
    def text(self) -> str:
        """The source as the user wrote it."""
        ...

    def uris(self, on_error: OnError = ignore_error) -> Iterator[str]:
        """Canonical URIs of the images, streamed; asks nothing about each, so counting is cheap.

        Raises:
            SourceError: the listing itself failed, also after retries.
        """
        ...

    def files(self, on_error: OnError = ignore_error) -> Iterator[SourceFile]:
        """The images in the order of `uris`, with what tells a changed one, streamed.

        Args:
            on_error: called for each part that cannot be listed; it counts as empty.

        Raises:
            SourceError: the listing itself failed, also after retries.
        """
        ...

    def read(self, file: SourceFile) -> bytes:
        """The bytes of an image file; called from many threads and processes.

        Raises:
            ImageError: MISSING, UNREADABLE, UNREACHABLE or TOO_LARGE.
        """
        ...

    def has_lost(self, uri: str) -> bool:
        """Whether `uri` names an image of this source that is no longer there.

        What merely cannot be reached or listed is not lost.
        """
        ...

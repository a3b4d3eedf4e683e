"""Images that files hold: the members of archives, the rows of tables.

Such an image has the URI of the file that holds it, after the kind of that file, and its own name
behind a "#": `tar+file:///photos.tar#a.jpg`, `parquet+s3://bucket/photos.parquet#17`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar
from urllib.parse import quote

from reir.errors import SourceError
from reir_ingestion.sources.contract import OnError, Source, SourceFile, ignore_error
from reir_ingestion.sources.listed import UriSet
from reir_ingestion.sources.places import Places


@dataclass(frozen=True)
class HeldSource(ABC):
    """Images held by some files.

    Attributes:
        text: as the user wrote it.
        holders: the files that hold them.
        places: reads those.
    """

    text: str
    holders: Source
    places: Places

    kind: ClassVar[str]
    """What stands before the "+" of a URI."""

    @abstractmethod
    def images(self, holder: SourceFile, on_error: OnError) -> Iterator[SourceFile]:
        """The images that a file holds; what of it cannot be used goes to `on_error`.

        Raises:
            OSError, SourceError: from here on it cannot be read.
        """

    @abstractmethod
    def read(self, file: SourceFile) -> bytes:
        """The bytes of an image; see `Source.read`."""

    def uris(self, on_error: OnError = ignore_error) -> Iterator[str]:
        """Canonical URIs of the images, in the order of `files`."""
        return (file.uri for file in self.files(on_error))

    def files(self, on_error: OnError = ignore_error) -> Iterator[SourceFile]:
        """The images, file by file; a damaged file counts as far as it can be read."""
        self.__dict__.pop("_listed", None)  # of an earlier run
        for holder in self.holders.files(on_error):
            try:
                yield from self.images(holder, on_error)
            except (OSError, SourceError) as error:
                on_error(holder.uri, error)

    def has_lost(self, uri: str) -> bool:
        """Whether a file no longer holds the image, or is itself gone.

        Nothing is lost from a file that cannot be read to its end.
        """
        kind, _, place = uri.partition("+")
        holder = place.partition("#")[0]
        if kind != self.kind or "#" not in place:
            return False
        listed, sound, gone = self._listed
        if holder in sound:
            return uri not in listed
        if holder not in gone:
            gone[holder] = self.holders.has_lost(holder)
        return gone[holder]

    def time_of(self, holder: SourceFile) -> int:
        """What stands for the time of the images in a file.

        Its size goes in as nanoseconds, since a store may tell times in whole seconds only.
        """
        return holder.mtime_ns + holder.size_bytes

    def uri_of(self, holder: SourceFile, name: str) -> str:
        """Canonical URI of an image within a file."""
        return f"{self.kind}+{holder.uri}#{quote(name)}"

    def holder_of(self, file: SourceFile) -> str:
        """URI of the file that holds an image."""
        return file.uri.removeprefix(f"{self.kind}+").partition("#")[0]

    @cached_property
    def _listed(self) -> tuple[UriSet, set[str], dict[str, bool]]:
        """What the files hold; those that could be read to their end; whether others are gone."""
        damaged: set[str] = set()
        sound: set[str] = set()

        def noted() -> Iterator[str]:
            for holder in self.holders.uris():
                sound.add(holder)
            for file in self.files(lambda part, _: damaged.add(part.partition("#")[0])):
                yield file.uri

        return UriSet(noted()), sound - damaged, {}

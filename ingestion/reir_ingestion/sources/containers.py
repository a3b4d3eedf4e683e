"""Images inside container files: the members of archives, the rows of tables.

The URI of such an image consists of the kind of the container, the URI of the container, and the
name of the image after a "#": `tar+file:///photos.tar#a.jpg`,
`parquet+s3://bucket/photos.parquet#17`.
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
from reir_ingestion.sources.uri_reader import UriReader
from reir_ingestion.sources.uri_set import UriSet


@dataclass(frozen=True)
class ContainerSource(ABC):
    """The images in a number of container files.

    Attributes:
        text: the source as the user wrote it.
        containers: source of the container files.
        reader: reads the container files.
    """

    text: str
    containers: Source
    reader: UriReader

    kind: ClassVar[str]
    """The kind of the container, the part of the URI before the "+"."""

    @abstractmethod
    def images(self, container: SourceFile, on_error: OnError) -> Iterator[SourceFile]:
        """Yield the images of a container; `on_error` is called for parts that cannot be used.

        Raises:
            OSError, SourceError: the rest of the container cannot be read.
        """

    @abstractmethod
    def read(self, file: SourceFile) -> bytes:
        """Return the bytes of an image; see `Source.read`."""

    def uris(self, on_error: OnError = ignore_error) -> Iterator[str]:
        """Yield the canonical URIs of the images, in the order of `files`."""
        return (file.uri for file in self.files(on_error))

    def files(self, on_error: OnError = ignore_error) -> Iterator[SourceFile]:
        """Yield the images, container by container; a damaged container up to the damage."""
        # The same source may serve several runs, and `has_lost` must compare with this listing. The
        # dataclass is frozen, but `cached_property` keeps its value in `__dict__`.
        self.__dict__.pop("_listed", None)
        for container in self.containers.files(on_error):
            try:
                yield from self.images(container, on_error)
            except (OSError, SourceError) as error:
                on_error(container.uri, error)

    def has_lost(self, uri: str) -> bool:
        """Return whether the container no longer has the image, or no longer exists itself.

        An image does not count as lost if its container cannot be read to the end.
        """
        kind, _, rest = uri.partition("+")
        container = rest.partition("#")[0]
        if kind != self.kind or "#" not in rest:
            return False
        uris, complete, gone = self._listed
        if container in complete:
            return uri not in uris
        if container not in gone:  # asked once per container, since it may take a request
            gone[container] = self.containers.has_lost(container)
        return gone[container]

    def time_of(self, container: SourceFile) -> int:
        """Return the time of the images in a container: that of the container, plus its size.

        Some servers report times in whole seconds only. The size is added as nanoseconds, so that a
        container that is rewritten within a second, with another size, still counts as changed.
        """
        return container.mtime_ns + container.size_bytes

    def uri_of(self, container: SourceFile, name: str) -> str:
        """Return the canonical URI of an image in a container."""
        # `quote` escapes "#", as it did in the URI of the container, so the only "#" is this one.
        # It gets bytes, because a name in an archive need not be valid UTF-8.
        name_bytes = name.encode("utf-8", "surrogateescape")
        return f"{self.kind}+{container.uri}#{quote(name_bytes)}"

    def container_of(self, file: SourceFile) -> str:
        """Return the URI of the container of an image."""
        return file.uri.removeprefix(f"{self.kind}+").partition("#")[0]

    @cached_property
    def _listed(self) -> tuple[UriSet, set[str], dict[str, bool]]:
        """What `has_lost` needs to know.

        Returns:
            The URIs of all images; the containers that were read to their end; and an empty
            dictionary, in which `has_lost` keeps which other containers are gone.
        """
        damaged: set[str] = set()
        complete: set[str] = set()

        def uris() -> Iterator[str]:
            # Containers are listed by themselves, because one without images yields no file.
            for container in self.containers.uris():
                complete.add(container)
            for file in self.files(lambda part, _: damaged.add(part.partition("#")[0])):
                yield file.uri

        return UriSet(uris()), complete - damaged, {}

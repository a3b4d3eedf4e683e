"""`KnownFilesSource`: photos that are given one by one, by their URIs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from reir.errors import ImageError, ImageFailure, SourceError
from reir_ingestion.sources.contract import OnError, Source, SourceFile, ignore_error
from reir_ingestion.sources.uri_reader import UriReader


@dataclass(frozen=True)
class KnownFilesSource:
    """Photos whose URIs, sizes and times are already known, such as rows of a ledger.

    Attributes:
        text: what the photos are, for messages.
        known: the photos. They are kept in memory, and sent to every worker.
        origin: the source that listed them, which reads them; None if they are read by their URIs
            alone, which works for files and objects in buckets.
    """

    text: str
    known: tuple[SourceFile, ...]
    origin: Source | None = None

    def uris(self, on_error: OnError = ignore_error) -> Iterator[str]:  # noqa: ARG002
        """Yield the URIs of the photos."""
        return (file.uri for file in self.known)

    def files(self, on_error: OnError = ignore_error) -> Iterator[SourceFile]:  # noqa: ARG002
        """Yield the photos."""
        return iter(self.known)

    def read(self, file: SourceFile) -> bytes:
        """Return the bytes of a photo.

        Raises:
            ImageError: MISSING, UNREADABLE, UNREACHABLE or TOO_LARGE.
        """
        if self.origin is not None:
            return self.origin.read(file)
        try:
            return UriReader().read(file.uri)
        except SourceError as error:  # an image in an archive or a table, or on the web
            raise ImageError(
                ImageFailure.UNREADABLE,
                f"only the source that it was indexed from can read it; name it with --source: "
                f"{error}",
            ) from error

    def has_lost(self, uri: str) -> bool:  # noqa: ARG002
        """Return False: a photo that is not among these may be anywhere."""
        return False

"""Images that a list names: paths and URIs with columns of the user, in JSONL, CSV or plain text.

A list is read line by line, as often as it is listed. Size and time of what it names are asked for
some rows at a time.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from reir.attributes import BadRow, checked
from reir.errors import SourceError
from reir.records import Attributes
from reir_ingestion.sources.attributes import IMAGE_COLUMNS, image_column
from reir_ingestion.sources.contract import OnError, SourceFile, ignore_error
from reir_ingestion.sources.listed import UriSet
from reir_ingestion.sources.places import Places
from reir_ingestion.sources.records import Record, read_records

ROWS_AT_ONCE = 256

Row = tuple[str, Attributes]
"""Canonical URI of an image, and its attributes."""


@dataclass(frozen=True)
class ListSource:
    """The images that some lists name.

    Attributes:
        text: as the user wrote it.
        lists: URIs of the lists.
        places: reads the lists, and what they name.
        image_column: column with the images; empty for the first of `IMAGE_COLUMNS` that is there.
    """

    text: str
    lists: tuple[str, ...]
    places: Places
    image_column: str = ""

    def uris(self, on_error: OnError = ignore_error) -> Iterator[str]:
        """Canonical URIs of the images, in the order of the lists.

        Raises:
            SourceError: a list cannot be read.
        """
        return (uri for uri, _ in self._rows(on_error))

    def files(self, on_error: OnError = ignore_error) -> Iterator[SourceFile]:
        """The images in the order of the lists; lines that name no image go to `on_error`.

        Raises:
            SourceError: a list cannot be read.
        """
        return with_statuses(self._rows(on_error), self.places)

    def read(self, file: SourceFile) -> bytes:
        """The bytes of an image.

        Raises:
            ImageError: MISSING, UNREADABLE, UNREACHABLE or TOO_LARGE.
        """
        return self.places.read(file.uri)

    def has_lost(self, uri: str) -> bool:
        """Whether the lists no longer name `uri`, which lies where they name images.

        That is the folder that all their images share. Where a line cannot be used, nothing is
        lost: it may have named the image.
        """
        return self._extent.has_lost(uri)

    @cached_property
    def _extent(self) -> Extent:
        return Extent.of(self, self.lists)

    def _rows(self, on_error: OnError) -> Iterator[Row]:
        self.__dict__.pop("_extent", None)  # of an earlier run
        for name in self.lists:
            number, form = 0, name.partition("?")[0]
            try:
                with self.places.stream(name) as stream:
                    for number, record in read_records(stream, form, self.image_column):
                        try:
                            yield self._row(record, name)
                        except (BadRow, SourceError, UnicodeError) as error:
                            on_error(f"{name} line {number}", error)
            except (OSError, EOFError, zlib.error) as error:
                raise SourceError(f"{name} cannot be read after line {number}: {error}") from error

    def _row(self, record: Record, name: str) -> Row:
        if isinstance(record, BadRow):
            raise record
        if isinstance(record, str):
            return self.places.uri_of(record, name), {}
        return row_of(dict(record), self.image_column, self.places, name)


def row_of(columns: dict[str, object], column: str, places: Places, base: str) -> Row:
    """Return the row that columns make: one names the image, the others are attributes.

    Raises:
        BadRow: no column names an image, or a value cannot be an attribute.
        SourceError: it names no place.
    """
    found = image_column(columns, column)
    if found is None:
        wanted = f"column {column!a}" if column else f"column of {', '.join(IMAGE_COLUMNS)}"
        raise BadRow(f"no {wanted} names an image; --image-column names another")
    place = columns.pop(found)
    if not isinstance(place, str):
        raise BadRow(f"column {found!a} must name an image, got {type(place).__name__}")
    return places.uri_of(place, base), checked(columns)


def with_statuses(rows: Iterator[Row], places: Places) -> Iterator[SourceFile]:
    """Yield the images of the rows with size and time, asked for some rows at a time."""
    while chunk := list(islice(rows, ROWS_AT_ONCE)):
        statuses = places.statuses([uri for uri, _ in chunk])
        for (uri, attributes), status in zip(chunk, statuses, strict=True):
            yield SourceFile(uri, *status, attributes)


@dataclass(frozen=True)
class Extent:
    """What lists name, and where: enough to tell which image they no longer name.

    Attributes:
        uris: what they name.
        folders: one for each host or bucket, below which all of that lies, with a slash at its end.
    """

    uris: UriSet
    folders: tuple[str, ...]

    @classmethod
    def of(cls, source: ListSource, lists: tuple[str, ...]) -> Extent:
        """Read the lists to their end."""
        folders: dict[str, str] = {}
        problems: set[str] = set()

        def noted() -> Iterator[str]:
            for uri in source.uris(lambda *_: problems.add("a line")):
                host = _host(uri)
                folder = folders.setdefault(host, _above(uri))
                while not uri.startswith(folder):
                    folder = folders[host] = _above(folder[:-1])
                yield uri

        uris = UriSet(noted())
        if problems:
            return cls(uris, ())
        beside = [_above(name) for name in lists]
        return cls(uris, tuple(_widened(folder, beside) for folder in folders.values()))

    def has_lost(self, uri: str) -> bool:
        """Whether `uri` lies in one of the folders and is not named."""
        return uri.startswith(self.folders) and uri not in self.uris


def _host(uri: str) -> str:
    return uri[: uri.index("/", uri.index("://") + 3)]


def _above(uri: str) -> str:
    return uri[: uri.rindex("/") + 1]


def _widened(folder: str, beside: list[str]) -> str:
    """The folder of a list, when it holds all that is named; else what all that is named shares."""
    return next((each for each in beside if folder.startswith(each)), folder)

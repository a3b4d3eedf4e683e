"""Images that a list names: paths and URIs, with columns of the user, in JSONL, CSV or plain text.

A list is read line by line, each time it is listed. Size and time of the images are looked up for
some rows at a time.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from reir.attributes import BadRow, validate_attributes
from reir.errors import SourceError
from reir.records import Attributes
from reir_ingestion.sources.columns import IMAGE_COLUMNS, image_column
from reir_ingestion.sources.contract import OnError, SourceFile, ignore_error
from reir_ingestion.sources.list_rows import Record, read_records
from reir_ingestion.sources.uri_reader import UriReader
from reir_ingestion.sources.uri_set import UriSet

ROWS_AT_ONCE = 256

ListRow = tuple[str, Attributes]
"""Canonical URI of an image, and its attributes."""


@dataclass(frozen=True)
class ListSource:
    """The images that a number of lists name.

    Attributes:
        text: as the user wrote it.
        lists: URIs of the lists.
        reader: reads the lists and the images.
        image_column: column with the images; if empty, the first of `IMAGE_COLUMNS` that exists.
    """

    text: str
    lists: tuple[str, ...]
    reader: UriReader
    image_column: str = ""

    def uris(self, on_error: OnError = ignore_error) -> Iterator[str]:
        """Yield the canonical URIs of the images, in the order of the lists.

        Raises:
            SourceError: a list cannot be read.
        """
        return (uri for uri, _ in self._rows(on_error))

    def files(self, on_error: OnError = ignore_error) -> Iterator[SourceFile]:
        """Yield the images in the order of the lists; lines without an image go to `on_error`.

        Raises:
            SourceError: a list cannot be read.
        """
        return with_statuses(self._rows(on_error), self.reader)

    def read(self, file: SourceFile) -> bytes:
        """Return the bytes of an image.

        Raises:
            ImageError: MISSING, UNREADABLE, UNREACHABLE or TOO_LARGE.
        """
        return self.reader.read(file.uri)

    def has_lost(self, uri: str) -> bool:
        """Return whether `uri` is in a folder that the lists cover, but no longer named by them.

        Such a folder is the one that all their images share. Where a line cannot be used, nothing
        counts as lost: that line may have named the image.
        """
        return self._coverage.has_lost(uri)

    @cached_property
    def _coverage(self) -> ListCoverage:
        return ListCoverage.of(self, self.lists)

    def _rows(self, on_error: OnError) -> Iterator[ListRow]:
        self.__dict__.pop("_coverage", None)  # the coverage of an earlier run
        for name in self.lists:
            number, form = 0, name.partition("?")[0]
            try:
                with self.reader.stream(name) as stream:
                    for number, record in read_records(stream, form, self.image_column):
                        try:
                            yield self._row(record, name)
                        except (BadRow, SourceError, UnicodeError) as error:
                            on_error(f"{name} line {number}", error)
            except (OSError, EOFError, zlib.error) as error:
                raise SourceError(f"{name} cannot be read after line {number}: {error}") from error

    def _row(self, record: Record, name: str) -> ListRow:
        if isinstance(record, BadRow):
            raise record
        if isinstance(record, str):
            return self.reader.uri_of(record, name), {}
        return row_of(dict(record), self.image_column, self.reader, name)


def row_of(columns: dict[str, object], column: str, reader: UriReader, base: str) -> ListRow:
    """Return the row of some columns: one names the image, the others are attributes.

    Raises:
        BadRow: no column names an image, or a value cannot be an attribute.
        SourceError: the name is not a path or URI that the list may name.
    """
    found = image_column(columns, column)
    if found is None:
        wanted = f"column {column!a}" if column else f"column named {', '.join(IMAGE_COLUMNS)}"
        raise BadRow(f"no {wanted} names an image; choose a column with --image-column")
    name_in_list = columns.pop(found)
    if not isinstance(name_in_list, str):
        raise BadRow(f"column {found!a} must name an image, got {type(name_in_list).__name__}")
    return reader.uri_of(name_in_list, base), validate_attributes(columns)


def with_statuses(rows: Iterator[ListRow], reader: UriReader) -> Iterator[SourceFile]:
    """Yield the images of the rows with size and time, looked up for some rows at a time."""
    while chunk := list(islice(rows, ROWS_AT_ONCE)):
        statuses = reader.statuses([uri for uri, _ in chunk])
        for (uri, attributes), status in zip(chunk, statuses, strict=True):
            yield SourceFile(uri, *status, attributes)


@dataclass(frozen=True)
class ListCoverage:
    """The images that lists name and the folders they cover, to tell which images are lost.

    Attributes:
        uris: URIs of the images.
        folders: for each host or bucket the folder that contains all of its images, with a slash
            at the end.
    """

    uris: UriSet
    folders: tuple[str, ...]

    @classmethod
    def of(cls, source: ListSource, lists: tuple[str, ...]) -> ListCoverage:
        """Read the lists to their end."""
        folders: dict[str, str] = {}
        problems: set[str] = set()

        def collect() -> Iterator[str]:
            for uri in source.uris(lambda *_: problems.add("a line")):
                host = _host(uri)
                folder = folders.setdefault(host, _parent(uri))
                while not uri.startswith(folder):
                    folder = folders[host] = _parent(folder[:-1])
                yield uri

        uris = UriSet(collect())
        if problems:
            return cls(uris, ())
        list_folders = [_parent(name) for name in lists]
        return cls(uris, tuple(_widened(folder, list_folders) for folder in folders.values()))

    def has_lost(self, uri: str) -> bool:
        """Return whether `uri` is in one of the folders and not named."""
        return uri.startswith(self.folders) and uri not in self.uris


def _host(uri: str) -> str:
    return uri[: uri.index("/", uri.index("://") + 3)]


def _parent(uri: str) -> str:
    return uri[: uri.rindex("/") + 1]


def _widened(folder: str, list_folders: list[str]) -> str:
    """Return the folder of a list if it contains all images; otherwise the folder they share."""
    return next((each for each in list_folders if folder.startswith(each)), folder)

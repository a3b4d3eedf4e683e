"""Images that are named by a list in JSONL, CSV or plain text, by path or URI.

The other columns of a list become attributes. A list is read line by line, and again for each
listing. The sizes and times of the images are looked up for some rows at a time.
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

# Enough rows for the web reader to look up in parallel, and few enough to keep in memory.
ROWS_AT_ONCE = 256

ListRow = tuple[str, Attributes]
"""Canonical URI of an image, and its attributes."""


@dataclass(frozen=True)
class ListSource:
    """The images that a number of lists name.

    Attributes:
        text: the source as the user wrote it.
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
        """Yield the images in the order of the lists; `on_error` is called for each bad line.

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
        """Return whether `uri` is in a folder that the lists cover, but is no longer in the lists.

        The lists cover the folder that all their images share. If any line cannot be used, no image
        counts as lost, because that line may name the image.
        """
        return self._coverage.has_lost(uri)

    @cached_property
    def _coverage(self) -> ListCoverage:
        return ListCoverage.of(self, self.lists)

    def _rows(self, on_error: OnError) -> Iterator[ListRow]:
        # The same source may serve several runs, and `has_lost` must compare with this listing. The
        # dataclass is frozen, but `cached_property` keeps its value in `__dict__`.
        self.__dict__.pop("_coverage", None)
        for name in self.lists:
            number, form = 0, name.partition("?")[0]  # the suffix comes before the query of a URL
            try:
                with self.reader.stream(name) as stream:
                    for number, record in read_records(stream, form, self.image_column):
                        try:
                            yield self._row(record, name)
                        except (BadRow, SourceError, UnicodeError) as error:
                            on_error(f"{name} line {number}", error)
            # For a .gz file, EOFError means that it is truncated, zlib.error that it is damaged.
            # Nothing is known about the rest of the list, so this stops the run.
            except (OSError, EOFError, zlib.error) as error:
                raise SourceError(f"{name} cannot be read after line {number}: {error}") from error

    def _row(self, record: Record, name: str) -> ListRow:
        if isinstance(record, BadRow):
            raise record
        if isinstance(record, str):
            return self.reader.uri_of(record, name), {}
        return row_of(dict(record), self.image_column, self.reader, name)


def row_of(columns: dict[str, object], column: str, reader: UriReader, base: str) -> ListRow:
    """Return the image that one of the columns names, with the other columns as attributes.

    Removes the column of the image from `columns`.

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
    """Yield the images of the rows with size and time, which are looked up for many at a time."""
    while chunk := list(islice(rows, ROWS_AT_ONCE)):
        statuses = reader.statuses([uri for uri, _ in chunk])
        for (uri, attributes), status in zip(chunk, statuses, strict=True):
            yield SourceFile(uri, *status, attributes)


@dataclass(frozen=True)
class ListCoverage:
    """The images that lists name, and the folders that the lists cover.

    Attributes:
        uris: URIs of the images.
        folders: for each host or bucket, the folder that contains all of its images, with a slash
            at the end; empty if a line cannot be used.
    """

    uris: UriSet
    folders: tuple[str, ...]

    @classmethod
    def of(cls, source: ListSource, lists: tuple[str, ...]) -> ListCoverage:
        """Read the lists to their end, and return what they cover."""
        folders: dict[str, str] = {}
        problems: set[str] = set()

        def collect() -> Iterator[str]:
            for uri in source.uris(lambda *_: problems.add("a line")):
                host = _host(uri)
                folder = folders.setdefault(host, _parent(uri))
                # Ends at the root of the host at the latest, since the URI has the same host.
                while not uri.startswith(folder):
                    folder = folders[host] = _parent(folder[:-1])
                yield uri

        uris = UriSet(collect())
        if problems:  # without a folder, no image counts as lost; see `ListSource.has_lost`
            return cls(uris, ())
        list_folders = [_parent(name) for name in lists]
        return cls(uris, tuple(_widened(folder, list_folders) for folder in folders.values()))

    def has_lost(self, uri: str) -> bool:
        """Return whether `uri` is in one of the folders, but not in the lists."""
        return uri.startswith(self.folders) and uri not in self.uris


def _host(uri: str) -> str:
    return uri[: uri.index("/", uri.index("://") + 3)]


def _parent(uri: str) -> str:
    return uri[: uri.rindex("/") + 1]


def _widened(folder: str, list_folders: list[str]) -> str:
    """Return the folder of a list if it contains all images; otherwise the folder they share.

    Otherwise a list that has lost all images of one subfolder would no longer cover that subfolder.
    """
    return next((each for each in list_folders if folder.startswith(each)), folder)

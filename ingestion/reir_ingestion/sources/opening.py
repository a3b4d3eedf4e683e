"""Opens the source that a text names: a folder, pattern, list, archive or table."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reir.errors import SourceError
from reir.images.photo_files import BUCKET_SCHEMES
from reir.index_report import format_counts
from reir_ingestion.sources.contract import IMAGE_SUFFIXES, WEB_SCHEMES, Source
from reir_ingestion.sources.local import LocalSource
from reir_ingestion.sources.patterns import ANY_DEPTH, has_wildcard, split_pattern

if TYPE_CHECKING:
    from reir_ingestion.sources.uri_reader import UriReader

_PLAIN_LISTS = (".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
LIST_SUFFIXES = (*_PLAIN_LISTS, *(f"{ending}.gz" for ending in _PLAIN_LISTS))
ARCHIVE_SUFFIX = ".tar"
TABLE_SUFFIX = ".parquet"
LANCE_SUFFIX = ".lance"

# Archives with these suffixes are refused, with an error that says what to do instead.
_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What a source may access, and which column names its images.

    Attributes:
        allow_http: whether images, and lists of them, may be downloaded from the web.
        allow_private: whether downloads may come from private networks and from this machine.
        image_column: column of a table or list with the images; detected if empty.
        follow_links: whether to follow symlinks whose targets are outside the folder or pattern.
    """

    allow_http: bool = False
    allow_private: bool = False
    image_column: str = ""
    follow_links: bool = False


def open_source(source: str | Path, options: SourceOptions | None = None) -> Source:
    """Return the source that `source` names.

    Args:
        source: a folder, one file, or a pattern such as `photos/**/*.jpg`, in which `**` matches
            any number of folders; on this machine, or under `s3://bucket/` or `gs://bucket/`. A
            file is recognized by its suffix as a list (.jsonl, .csv, .tsv, .txt), an archive (.tar)
            or a table (.parquet, .lance) that names or contains the images. If a file with
            wildcards in its name exists, the text is not a pattern.
        options: see `SourceOptions`.

    Raises:
        SourceError: the source does not exist, contains no images, or is not allowed.
        ConfigError: `image_column` is not a column.
    """
    text, options = os.fspath(source), options or SourceOptions()
    opened, looked_for = _open(text, options)
    problems: list[str] = []

    def note(part: str, error: Exception) -> None:
        if not problems:  # one is enough for the message; there may be one for every line of a list
            problems.append(f"; {part}: {error}")

    # An empty source is probably a mistake, such as a disk that is not mounted, and not an order to
    # remove all photos.
    if next(opened.uris(note), None) is None:
        details = "".join(problems)
        if isinstance(opened, LocalSource) and opened.skipped:
            details = f"; skipped: {format_counts(opened.skipped)}{details}"
        raise SourceError(
            f"source {_without_secrets(text)!a} contains no images; "
            f"looked for {looked_for}{details}"
        )
    return opened


def _without_secrets(text: str) -> str:
    if not text.startswith(BUCKET_SCHEMES):
        return text
    from reir.object_storage import without_secrets

    return without_secrets(text)


def _open(text: str, options: SourceOptions) -> tuple[Source, str]:
    """Return the source, and a description of what it looks for."""
    # Modules of sources are imported where they are used: some need pyarrow, botocore or Lance,
    # which a local folder does not.
    # Not `Path.expanduser`, which raises an error for a name such as "~photo.jpg".
    path = Path(os.path.expanduser(text))
    # A Lance table is a folder, and is recognized first because `_name` ignores names of folders.
    if path.suffix == LANCE_SUFFIX and path.is_dir():
        from reir_ingestion.sources.lance import open_lance

        return open_lance(text, path, options.image_column), "rows"
    name = _name(text)
    if name.startswith(WEB_SCHEMES):
        return _lists(text, options)
    if name.endswith(_COMPRESSED_TARS):
        raise SourceError(
            f"source {text!a} is compressed, so its members cannot be read one by one; decompress "
            f"it to a .tar"
        )
    if name.endswith(LIST_SUFFIXES):
        return _lists(text, options)
    if name.endswith(ARCHIVE_SUFFIX):
        from reir_ingestion.sources.tars import TarSource

        archives = _files(text, (ARCHIVE_SUFFIX,), options)
        return TarSource(
            text, archives, _uri_reader(text, options)
        ), "members with the suffix of an image"
    if name.endswith(TABLE_SUFFIX):
        from reir_ingestion.sources.parquet import open_parquet

        tables = _files(text, (TABLE_SUFFIX,), options)
        return open_parquet(text, tables, _uri_reader(text, options), options.image_column), "rows"
    looked_for = f"files ending in {' '.join(IMAGE_SUFFIXES)} that are not hidden"
    return _files(text, IMAGE_SUFFIXES, options), looked_for


def _name(text: str) -> str:
    """Return the name whose suffix shows the form of a source; empty for a folder.

    So a folder may have any name, such as `photos.tar`.
    """
    if "://" in text:  # what follows a "?" are options of the bucket, or the query of an address
        return text.partition("?")[0].lower()
    return "" if os.path.isdir(os.path.expanduser(text)) else text.lower()


def _lists(text: str, options: SourceOptions) -> tuple[Source, str]:
    from reir_ingestion.sources.lists import ListSource

    reader = _uri_reader(text, options)
    on_web = text.lower().startswith(WEB_SCHEMES)
    # For a web address, `uri_of` also checks that downloads are allowed.
    lists = [reader.uri_of(text, text)] if on_web else _files(text, LIST_SUFFIXES, options).uris()
    looked_for = "a path or URI in each line"
    return ListSource(text, tuple(lists), reader, options.image_column), looked_for


def _uri_reader(text: str, options: SourceOptions) -> UriReader:
    """Return the reader of a list, an archive or a table, and of the images it names."""
    from reir_ingestion.sources.uri_reader import UriReader
    from reir_ingestion.sources.web_reader import WebReader

    web = WebReader(options.allow_private) if options.allow_http else None
    if not text.startswith(BUCKET_SCHEMES):
        return UriReader(web)
    from reir_ingestion.sources.bucket_reader import split_uri

    name = split_uri(text)
    return UriReader(web, name.login, name.options)


def _files(text: str, suffixes: tuple[str, ...], options: SourceOptions) -> Source:
    """Return the files of a folder or pattern, or a single file, with one of the suffixes."""
    if text.startswith(BUCKET_SCHEMES):
        from reir_ingestion.sources.buckets import open_bucket

        return open_bucket(text, suffixes)
    return _local_files(text, suffixes, follow_links=options.follow_links)


def _local_files(text: str, suffixes: tuple[str, ...], *, follow_links: bool) -> LocalSource:
    path = os.path.abspath(os.path.expanduser(text))
    if os.path.isdir(path):
        return LocalSource(text, os.fsencode(path), (ANY_DEPTH,), suffixes, follow_links)
    # An existing file may have brackets in its name, so this comes before the wildcards. `lexists`
    # is also true for a broken symlink, which is listed so that the ledger says what is wrong.
    if os.path.lexists(path):
        return LocalSource(text, os.fsencode(path), (), suffixes)
    if has_wildcard(os.fsencode(path)):
        # The root of a pattern such as "/*.jpg" is empty, hence `root or b"/"` below.
        root, pattern = split_pattern(os.fsencode(path))
        if os.path.isdir(root or b"/"):
            return LocalSource(text, root or b"/", pattern, suffixes, follow_links)
        raise SourceError(
            f"source {text!a} does not exist: there is no folder {os.fsdecode(root)!a}"
        )
    raise SourceError(
        f"source {text!a} does not exist; give a folder, an image file, a pattern such as "
        f"'photos/**/*.jpg', or another form of SOURCE that `reir index --help` lists"
    )

"""From the text of a source to the source: what each form of SOURCE is taken for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reir.errors import SourceError
from reir_ingestion.report import counted
from reir_ingestion.sources.contract import BUCKETS, IMAGE_ENDINGS, WEB, Source
from reir_ingestion.sources.local import LocalSource
from reir_ingestion.sources.patterns import ANY_DEPTH, has_magic, split_pattern

if TYPE_CHECKING:
    from reir_ingestion.sources.places import Places

_PLAIN_LISTS = (".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
LIST_ENDINGS = (*_PLAIN_LISTS, *(f"{ending}.gz" for ending in _PLAIN_LISTS))
ARCHIVE_ENDING = ".tar"
TABLE_ENDING = ".parquet"
LANCE_ENDING = ".lance"

_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What a source may access, and where its images are.

    Attributes:
        allow_http: fetch images, and lists of them, from http:// and https:// addresses.
        allow_private: also from addresses of private networks and of this machine.
        image_column: column of a table or list that has the images; detected when empty.
        follow_links: also follow symlinks whose targets are outside the folder or pattern.
    """

    allow_http: bool = False
    allow_private: bool = False
    image_column: str = ""
    follow_links: bool = False


def open_source(source: str | Path, options: SourceOptions | None = None) -> Source:
    """Return the source that `source` names.

    Args:
        source: a folder, one file, or a pattern such as `photos/**/*.jpg`, in which `**` stands for
            any number of folders; on this machine or below `s3://bucket/` or `gs://bucket/`. Files
            that end like a list (.jsonl, .csv, .tsv, .txt), an archive (.tar) or a table (.parquet,
            .lance) give the images that they name or hold. What exists under the literal name is
            never taken for a pattern.
        options: see `SourceOptions`.

    Raises:
        SourceError: it does not exist, holds no image, or is not allowed; the message says what
            was looked for.
        ConfigError: `image_column` names no column.
    """
    text, options = os.fspath(source), options or SourceOptions()
    found, looked_for = _open(text, options)
    problems: list[str] = []

    def note(part: str, error: Exception) -> None:
        if not problems:
            problems.append(f"; {part}: {error}")

    if next(found.uris(note), None) is None:
        details = "".join(problems)
        if isinstance(found, LocalSource) and found.passed_over:
            details = f"; skipped: {counted(found.passed_over)}{details}"
        raise SourceError(
            f"source {_shown(text)!a} holds no image; looked for {looked_for}{details}"
        )
    return found


def _shown(text: str) -> str:
    if not text.startswith(BUCKETS):
        return text
    from reir.object_storage import without_secrets

    return without_secrets(text)


def _open(text: str, options: SourceOptions) -> tuple[Source, str]:
    """The source, and what it looks for, in words."""
    path = Path(text).expanduser()
    if path.suffix == LANCE_ENDING and path.is_dir():
        from reir_ingestion.sources.lance import open_lance

        return open_lance(text, path, options.image_column), "rows"
    name = _name(text)
    if name.startswith(WEB):
        return _lists(text, options)
    if name.endswith(_PACKED):
        raise SourceError(
            f"source {text!a} is compressed, so its members cannot be read one by one; unpack it "
            f"to a .tar"
        )
    if name.endswith(LIST_ENDINGS):
        return _lists(text, options)
    if name.endswith(ARCHIVE_ENDING):
        from reir_ingestion.sources.tars import TarSource

        archives = _files(text, (ARCHIVE_ENDING,), options)
        return TarSource(text, archives, _places(text, options)), "members that end like images"
    if name.endswith(TABLE_ENDING):
        from reir_ingestion.sources.parquet import open_parquet

        tables = _files(text, (TABLE_ENDING,), options)
        return open_parquet(text, tables, _places(text, options), options.image_column), "rows"
    looked_for = f"files ending in {' '.join(IMAGE_ENDINGS)} that are not hidden"
    return _files(text, IMAGE_ENDINGS, options), looked_for


def _name(text: str) -> str:
    """What the form of a source is told by: empty for a folder, whatever its name."""
    if "://" in text:
        return text.partition("?")[0].lower()
    return "" if os.path.isdir(os.path.expanduser(text)) else text.lower()


def _lists(text: str, options: SourceOptions) -> tuple[Source, str]:
    from reir_ingestion.sources.lists import ListSource

    places = _places(text, options)
    on_web = text.lower().startswith(WEB)
    lists = [places.uri_of(text, text)] if on_web else _files(text, LIST_ENDINGS, options).uris()
    looked_for = "a path or an address in each line"
    return ListSource(text, tuple(lists), places, options.image_column), looked_for


def _places(text: str, options: SourceOptions) -> Places:
    """What a list, an archive or a table of this name may read."""
    from reir_ingestion.sources.http import Web
    from reir_ingestion.sources.places import Places

    web = Web(options.allow_private) if options.allow_http else None
    if not text.startswith(BUCKETS):
        return Places(web)
    from reir_ingestion.sources.objects import split_uri

    name = split_uri(text)
    return Places(web, name.login, name.options)


def _files(text: str, endings: tuple[str, ...], options: SourceOptions) -> Source:
    """The files of a folder, a glob or a single name: images, or what holds or names them."""
    if text.startswith(BUCKETS):
        from reir_ingestion.sources.buckets import open_bucket

        return open_bucket(text, endings)
    return _local_files(text, endings, follow_links=options.follow_links)


def _local_files(text: str, endings: tuple[str, ...], *, follow_links: bool) -> LocalSource:
    path = os.path.abspath(os.path.expanduser(text))
    if os.path.isdir(path):
        return LocalSource(text, os.fsencode(path), (ANY_DEPTH,), endings, follow_links)
    if os.path.lexists(path):
        return LocalSource(text, os.fsencode(path), (), endings)
    if has_magic(os.fsencode(path)):
        root, pattern = split_pattern(os.fsencode(path))
        if os.path.isdir(root or b"/"):
            return LocalSource(text, root or b"/", pattern, endings, follow_links)
        raise SourceError(
            f"source {text!a} does not exist: there is no folder {os.fsdecode(root)!a}"
        )
    raise SourceError(
        f"source {text!a} does not exist; give a folder, an image file, a pattern such as "
        f"'photos/**/*.jpg', or another form of SOURCE that `reir index --help` names"
    )

"""Reads the objects of buckets: looks them up, lists folder by folder, and returns their bytes.

Credentials come from the environment (AWS_*, GOOGLE_*) or from the role of the machine. Temporary
errors of the storage are distinguished from permanent ones, and only the former are retried.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from posixpath import normpath
from typing import IO, NamedTuple
from urllib.parse import quote, unquote

from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType

from reir.errors import ImageError, ImageFailure, SourceError
from reir.object_storage import STORAGE_ERRORS, open_filesystem, without_secrets
from reir_ingestion.sources.contract import FileStatus
from reir_ingestion.sources.network_retries import (
    Answer,
    LocationUnreachable,
    list_with_retries,
    read_with_retries,
)
from reir_ingestion.sources.s3_pages import Entry, S3Pages

# Each read from an object is a request to the server, and lists, archives and tables are read in
# small pieces.
STREAM_BUFFER_BYTES = 1024**2

# A "?" starts the options only if "name=" follows. DOTALL, because a key may contain line breaks.
_URI = re.compile(
    r"(?P<scheme>s3|gs)://(?:(?P<login>[^@/]*)@)?(?P<bucket>[^/?@]+)"
    r"(?:/(?P<key>.*?))?(?:\?(?P<options>\w+=.*))?",
    re.DOTALL,
)
# pyarrow passes the error of the storage on as text only. Of the HTTP errors 4xx, 408 (timeout) and
# 429 (too many requests) are temporary.
_PERMANENT = re.compile(
    r"ACCESS_DENIED|PERMISSION_DENIED|UNAUTHENTICATED|NO_SUCH|NOT_FOUND|INVALID_|SIGNATURE"
    r"|HTTP (?:status|response code) 4(?!08|29)|Empty path component"
)
"""Matches errors that another attempt would not change."""


class ObjectUri(NamedTuple):
    """The parts of a URI of object storage; `key` is not percent-encoded."""

    scheme: str
    login: str
    bucket: str
    key: str
    options: str

    @property
    def uri(self) -> str:
        """Canonical URI, without login and options."""
        return f"{self.scheme}://{self.bucket}/{quote(self.key)}"


def split_uri(uri: str) -> ObjectUri:
    """Return the parts of "s3://bucket/key?options" or "gs://...".

    Raises:
        SourceError: it is not such a URI.
    """
    found = _URI.fullmatch(uri)
    if found is None:
        raise SourceError(
            f"{without_secrets(uri)!a} is not a URI of object storage; "
            f"write s3://bucket/prefix or gs://bucket/prefix"
        )
    parts = {name: value or "" for name, value in found.groupdict().items()}
    return ObjectUri(**(parts | {"key": unquote(parts["key"])}))


@dataclass(frozen=True)
class BucketReader:
    """Reads the objects of buckets.

    Attributes:
        login: the part before the "@", as in "gs://anonymous@bucket".
        options: the part after the "?", such as "endpoint_override=...".
    """

    login: str = ""
    options: str = ""

    def uri_of(self, text: str) -> str:
        """Return the canonical URI of an object.

        Raises:
            SourceError: `text` is not such a URI.
        """
        return split_uri(text).uri

    def resolve(self, base: str, text: str) -> str:
        """Return the canonical URI of the path `text`, which starts in the folder of `base`."""
        name = split_uri(base)
        folder = name.key.rpartition("/")[0]
        return name._replace(key=normpath(f"{folder}/{text}").lstrip("/")).uri

    def statuses(self, uris: Sequence[str]) -> list[FileStatus | None]:
        """Return size and time of objects in one bucket; None for those that do not exist.

        pyarrow can list keys with an empty segment (`a//b`), but not look them up, so these keys
        get None.

        Raises:
            LocationUnreachable: another attempt may succeed.
            OSError: the server refused the request.
        """
        names = [split_uri(uri) for uri in uris]
        queried = [name for name in names if "//" not in name.key]
        look_up = self._filesystem(names[0].scheme, names[0].bucket).get_file_info
        infos = _translate_errors(partial(look_up, [_path(name) for name in queried]), names[0].uri)
        found = dict(zip((name.uri for name in queried), map(_status, infos), strict=True))
        return [found.get(name.uri) for name in names]

    def folder(self, name: ObjectUri) -> Iterator[Entry]:
        """Yield the files and folders directly in a folder, sorted by name.

        A folder that does not exist is empty. On S3 the listing comes in pages; within a page, the
        files come before the folders. On other storage, pyarrow returns the whole folder at once.

        Raises:
            SourceError: the folder cannot be listed, even after retries.
        """
        if name.scheme != "s3":
            yield from list_with_retries(partial(self._whole_folder, name), name.uri)
            return
        pages = _pages(self.login, name.bucket, self.options)
        prefix, token = f"{name.key}/" if name.key else "", None
        while True:
            # Retries start at the page that failed and not at the beginning of the folder.
            page = list_with_retries(partial(pages.page, name.bucket, prefix, token), name.uri)
            yield from page.entries
            token = page.token
            if token is None:
                return

    def _whole_folder(self, name: ObjectUri) -> list[Entry]:
        selector = FileSelector(_path(name), allow_not_found=True)
        filesystem = self._filesystem(name.scheme, name.bucket)
        infos = _translate_errors(partial(filesystem.get_file_info, selector), name.uri)
        found = (Entry(str(info.base_name), _status(info)) for info in infos)
        # By name only: if a file and a folder have the same name, the status of the folder is None,
        # which cannot be compared.
        return sorted(found, key=lambda entry: entry.name)

    def open(self, uri: str) -> IO[bytes]:
        """Open an object for reading from any position.

        Raises:
            FileNotFoundError: there is no such object.
            LocationUnreachable: another attempt may succeed; later reads raise plain OSErrors.
            OSError: the server refused the request.
        """
        name = split_uri(uri)
        filesystem = self._filesystem(name.scheme, name.bucket)
        raw = _translate_errors(partial(filesystem.open_input_file, _path(name)), uri)
        return io.BufferedReader(raw, STREAM_BUFFER_BYTES)

    def read(self, uri: str, max_bytes: int, span: tuple[int, int] | None = None) -> bytes:
        """Return the bytes of an object, or `span` (offset, size) of them.

        Raises:
            ImageError: MISSING, TOO_LARGE, UNREADABLE or UNREACHABLE.
        """
        name = split_uri(uri)

        def read_once() -> bytes:
            filesystem = self._filesystem(name.scheme, name.bucket)
            with filesystem.open_input_file(_path(name)) as file:
                offset, size = span or (0, file.size())
                if size > max_bytes:
                    raise ImageError(
                        ImageFailure.TOO_LARGE,
                        f"{uri} has {size} bytes; the limit for an image is {max_bytes}",
                    )
                return bytes(file.read_at(size, offset))

        try:
            return read_with_retries(lambda: _translate_errors(read_once, uri))
        except FileNotFoundError as error:
            raise ImageError(ImageFailure.MISSING, f"{uri} does not exist") from error
        except OSError as error:
            raise ImageError(ImageFailure.UNREADABLE, f"{uri}: {error}") from error

    def _filesystem(self, scheme: str, bucket: str) -> FileSystem:
        return _filesystem(scheme, self.login, bucket, self.options)


# Connections are cached here and not in `BucketReader`, because sources are compared with one
# another and pickled for other processes.
@lru_cache(maxsize=64)
def _pages(login: str, bucket: str, options: str) -> S3Pages:
    """Return the lister of an S3 bucket; each process makes one per bucket."""
    return S3Pages(_filesystem("s3", login, bucket, options))


@lru_cache(maxsize=64)
def _filesystem(scheme: str, login: str, bucket: str, options: str) -> FileSystem:
    """Return the connection to a bucket; each process opens one per bucket."""
    before, after = (f"{login}@" if login else ""), (f"?{options}" if options else "")
    return open_filesystem(f"{scheme}://{before}{bucket}{after}")[0]


def _path(name: ObjectUri) -> str:
    return f"{name.bucket}/{name.key}".rstrip("/")


def _status(info: FileInfo) -> FileStatus | None:
    if info.type != FileType.File:
        return None
    return FileStatus(info.size, info.mtime_ns)


def _translate_errors(call: Callable[[], Answer], name: str) -> Answer:
    """Return the result of `call()`; raise `LocationUnreachable` where a retry may succeed."""
    try:
        return call()
    except (FileNotFoundError, PermissionError):  # another attempt would not change these
        raise
    except STORAGE_ERRORS as error:
        if _PERMANENT.search(str(error)):
            raise OSError(str(error)) from error
        raise LocationUnreachable(f"{without_secrets(name)}: {error}") from error

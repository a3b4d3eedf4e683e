"""Objects of buckets by URI: looked up, listed folder by folder, and read.

Credentials come from the environment (AWS_*, GOOGLE_*) or from the machine's role. Errors that may
pass are told from those that will not.
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
from reir_ingestion.sources.contract import Status
from reir_ingestion.sources.retrying import Answer, Unreachable, listing, reading
from reir_ingestion.sources.s3_pages import Entry, S3Pages

STREAM_BUFFER_BYTES = 1024**2

_URI = re.compile(
    r"(?P<scheme>s3|gs)://(?:(?P<login>[^@/]*)@)?(?P<bucket>[^/?@]+)"
    r"(?:/(?P<key>.*?))?(?:\?(?P<options>\w+=.*))?",
    re.DOTALL,
)
_FINAL = re.compile(
    r"ACCESS_DENIED|PERMISSION_DENIED|UNAUTHENTICATED|NO_SUCH|NOT_FOUND|INVALID_|SIGNATURE"
    r"|HTTP (?:status|response code) 4(?!08|29)|Empty path component"
)
"""Of an answer that another attempt would not change."""


class ObjectName(NamedTuple):
    """A URI of object storage in its parts; `key` without percent-encoding."""

    scheme: str
    login: str
    bucket: str
    key: str
    options: str

    @property
    def uri(self) -> str:
        """Canonical URI, without login and options."""
        return f"{self.scheme}://{self.bucket}/{quote(self.key)}"


def split_uri(uri: str) -> ObjectName:
    """Return the parts of "s3://bucket/key?options" or "gs://...".

    Raises:
        SourceError: it is no such URI.
    """
    found = _URI.fullmatch(uri)
    if found is None:
        raise SourceError(
            f"{without_secrets(uri)!a} names no place in object storage; "
            f"write s3://bucket/prefix or gs://bucket/prefix"
        )
    parts = {name: value or "" for name, value in found.groupdict().items()}
    return ObjectName(**(parts | {"key": unquote(parts["key"])}))


@dataclass(frozen=True)
class Objects:
    """Reads buckets.

    Attributes:
        login: stands before the bucket, as in "gs://anonymous@bucket".
        options: follow the "?", such as "endpoint_override=...".
    """

    login: str = ""
    options: str = ""

    def uri_of(self, text: str) -> str:
        """Return the canonical URI of an object.

        Raises:
            SourceError: `text` is no such URI.
        """
        return split_uri(text).uri

    def beside(self, base: str, text: str) -> str:
        """Return the canonical URI of `text`, relative to the folder of `base`."""
        name = split_uri(base)
        folder = name.key.rpartition("/")[0]
        return name._replace(key=normpath(f"{folder}/{text}").lstrip("/")).uri

    def statuses(self, uris: Sequence[str]) -> list[Status | None]:
        """Size and time of objects in one bucket; None for those that do not exist.

        Keys with an empty segment (`a//b`) cannot be looked up, only listed; they get None.

        Raises:
            Unreachable: another attempt may succeed.
            OSError: refused.
        """
        names = [split_uri(uri) for uri in uris]
        asked = [name for name in names if "//" not in name.key]
        look_up = self._filesystem(names[0].scheme, names[0].bucket).get_file_info
        infos = _asked(partial(look_up, [_path(name) for name in asked]), names[0].uri)
        found = dict(zip((name.uri for name in asked), map(_status, infos), strict=True))
        return [found.get(name.uri) for name in names]

    def folder(self, name: ObjectName) -> Iterator[Entry]:
        """What lies directly in a folder, which need not exist, in the order of the names.

        Of S3 a page at a time: files and folders take turns, each in their order. Elsewhere pyarrow
        hands over the whole folder.

        Raises:
            SourceError: it cannot be listed, also after retries.
        """
        if name.scheme != "s3":
            yield from listing(partial(self._whole_folder, name), name.uri)
            return
        pages = _pages(self.login, name.bucket, self.options)
        prefix, token = f"{name.key}/" if name.key else "", None
        while True:
            page = listing(partial(pages.page, name.bucket, prefix, token), name.uri)
            yield from page.entries
            token = page.token
            if token is None:
                return

    def _whole_folder(self, name: ObjectName) -> list[Entry]:
        selector = FileSelector(_path(name), allow_not_found=True)
        filesystem = self._filesystem(name.scheme, name.bucket)
        infos = _asked(partial(filesystem.get_file_info, selector), name.uri)
        found = (Entry(str(info.base_name), _status(info)) for info in infos)
        return sorted(found, key=lambda entry: entry.name)  # a file and a folder may share a name

    def open(self, uri: str) -> IO[bytes]:
        """Open an object for reading at any place.

        Raises:
            FileNotFoundError: there is none.
            Unreachable: another attempt may succeed; reads of the file raise plain OSErrors.
            OSError: refused.
        """
        name = split_uri(uri)
        filesystem = self._filesystem(name.scheme, name.bucket)
        raw = _asked(partial(filesystem.open_input_file, _path(name)), uri)
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
                        f"{uri} has {size} bytes, at most {max_bytes} are read",
                    )
                return bytes(file.read_at(size, offset))

        try:
            return reading(lambda: _asked(read_once, uri))
        except FileNotFoundError as error:
            raise ImageError(ImageFailure.MISSING, f"{uri} does not exist") from error
        except OSError as error:
            raise ImageError(ImageFailure.UNREADABLE, f"{uri}: {error}") from error

    def _filesystem(self, scheme: str, bucket: str) -> FileSystem:
        return _filesystem(scheme, self.login, bucket, self.options)


@lru_cache(maxsize=64)
def _pages(login: str, bucket: str, options: str) -> S3Pages:
    """What lists a bucket of S3, one a process."""
    return S3Pages(_filesystem("s3", login, bucket, options))


@lru_cache(maxsize=64)
def _filesystem(scheme: str, login: str, bucket: str, options: str) -> FileSystem:
    """The connection to a bucket, one a process."""
    before, after = (f"{login}@" if login else ""), (f"?{options}" if options else "")
    return open_filesystem(f"{scheme}://{before}{bucket}{after}")[0]


def _path(name: ObjectName) -> str:
    return f"{name.bucket}/{name.key}".rstrip("/")


def _status(info: FileInfo) -> Status | None:
    if info.type != FileType.File:
        return None
    return Status(info.size, info.mtime_ns)


def _asked(call: Callable[[], Answer], what: str) -> Answer:
    """Return `call()`; an error that another attempt may mend comes as `Unreachable`."""
    try:
        return call()
    except (FileNotFoundError, PermissionError):
        raise
    except STORAGE_ERRORS as error:
        if _FINAL.search(str(error)):
            raise OSError(str(error)) from error
        raise Unreachable(f"{without_secrets(what)}: {error}") from error

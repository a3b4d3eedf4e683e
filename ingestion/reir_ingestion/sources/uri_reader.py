"""Reads the file of a URI, on this machine, in a bucket or, if allowed, on the web."""

from __future__ import annotations

import gzip
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import IO, TYPE_CHECKING, cast
from urllib.parse import quote, urljoin, urlsplit

from reir.errors import ImageError, ImageFailure, SourceError
from reir.images.decode import DEFAULT_MAX_BYTES, canonical_uri, path_of_uri, read_bytes
from reir.images.photo_files import BUCKET_SCHEMES
from reir_ingestion.sources.contract import (
    ABSENT_FILE,
    UNKNOWN_TIME_NS,
    WEB_SCHEMES,
    FileStatus,
)
from reir_ingestion.sources.local import status_of_file
from reir_ingestion.sources.network_retries import list_with_retries
from reir_ingestion.sources.web_reader import WebReader

if TYPE_CHECKING:
    from reir_ingestion.sources.bucket_reader import BucketReader

LOCAL_SCHEME = "file:///"

MAX_NAME_CHARS = 8192
"""Maximum length of a path or an address, because a URI has to fit into a column of the store."""

# Characters with a meaning in URLs, and "%", since most addresses are percent-encoded already.
_UNQUOTED_IN_URLS = "%/:=&?#~+!$,;'@()*[]"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class UriReader:
    """Reads the files of URIs.

    Attributes:
        web: reads files on the web; None if that is not allowed.
        login, options: for buckets, see `reir_ingestion.sources.bucket_reader.BucketReader`.
    """

    web: WebReader | None = None
    login: str = ""
    options: str = ""

    def uri_of(self, text: str, base: str) -> str:
        """Return the canonical URI of an image that a list names.

        Args:
            text: a URI, or a path as the file system has it.
            base: URI of the list; relative paths start in its folder.

        Raises:
            SourceError: the text is not a path or URI, or the list must not name it.
            UnicodeError: the text has characters that a file name cannot have.
        """
        # Functions of `os` raise a ValueError for a path with a zero byte.
        if not text or "\0" in text or len(text) > MAX_NAME_CHARS:
            raise SourceError(
                f"{text[:80]!a} ({len(text)} characters) is not the name of an image; a name has "
                f"1 to {MAX_NAME_CHARS} characters"
            )
        if text.startswith(BUCKET_SCHEMES):
            return self._buckets.uri_of(text)
        if text.lower().startswith(WEB_SCHEMES):
            return self._url(text)
        if base.startswith(LOCAL_SCHEME):
            path = path_of_uri(text) if text.startswith(LOCAL_SCHEME) else text
            return canonical_uri(os.path.join(_folder(base), path))
        # Whoever wrote a list on a server must not be able to read files of this machine.
        if text.startswith(("/", LOCAL_SCHEME)):
            raise SourceError(
                f"{text[:80]!a} is a local file; only a local list may name local files"
            )
        if base.startswith(WEB_SCHEMES):
            return self._url(urljoin(base, quote(text)))
        return self._buckets.resolve(base, text)

    def statuses(self, uris: Sequence[str]) -> list[FileStatus]:
        """Return size and time of each URI, looked up together for each bucket and for the web.

        If a bucket does not answer, the time is unknown. Reading, which is retried, then finds the
        reason.

        Raises:
            SourceError: a URI is a web address, and downloads are not allowed.
        """
        found: dict[str, FileStatus | None] = {}
        for uri in uris:
            if uri.startswith(LOCAL_SCHEME):
                found[uri] = status_of_file(os.fsencode(path_of_uri(uri)))
        if urls := [uri for uri in uris if uri.startswith(WEB_SCHEMES)]:
            found |= zip(urls, self._allowed_web(urls[0]).statuses(urls), strict=True)
        keys: dict[str, list[str]] = {}
        for uri in uris:
            if uri.startswith(BUCKET_SCHEMES):
                keys.setdefault(uri.split("/")[2], []).append(uri)
        for of_bucket in keys.values():
            found |= zip(of_bucket, self._statuses_in_bucket(of_bucket), strict=True)
        return [found[uri] or ABSENT_FILE for uri in uris]

    def _statuses_in_bucket(self, uris: Sequence[str]) -> Sequence[FileStatus | None]:
        try:
            return list_with_retries(partial(self._buckets.statuses, uris), uris[0])
        except SourceError as error:
            # A list may name many buckets, and one of them must not stop the run. Images with an
            # unknown time are read, which records each of this bucket as unreachable.
            logger.warning("%s", error)
            return [FileStatus(0, UNKNOWN_TIME_NS)] * len(uris)

    def read(self, uri: str) -> bytes:
        """Return the bytes of a whole file.

        Raises:
            ImageError: MISSING, TOO_LARGE, UNREADABLE or UNREACHABLE.
        """
        if uri.startswith(LOCAL_SCHEME):
            return read_bytes(path_of_uri(uri))
        if uri.startswith(WEB_SCHEMES):
            return self._allowed_web(uri).read(uri, DEFAULT_MAX_BYTES)
        return self._buckets.read(uri, DEFAULT_MAX_BYTES)

    def read_span(self, uri: str, offset: int, size: int) -> bytes:
        """Return `size` bytes of a local file or an object, starting at `offset`.

        Raises:
            ImageError: MISSING, TOO_LARGE, UNREADABLE or UNREACHABLE.
        """
        if size > DEFAULT_MAX_BYTES:
            raise ImageError(
                ImageFailure.TOO_LARGE,
                f"{uri} has {size} bytes at {offset}; the limit is {DEFAULT_MAX_BYTES}",
            )
        if not uri.startswith(LOCAL_SCHEME):
            return self._buckets.read(uri, DEFAULT_MAX_BYTES, (offset, size))
        try:
            with open(path_of_uri(uri), "rb") as file:
                file.seek(offset)
                return file.read(size)
        except FileNotFoundError as error:
            raise ImageError(ImageFailure.MISSING, f"{uri} does not exist") from error
        except OSError as error:
            raise ImageError(ImageFailure.UNREADABLE, f"{uri}: {error.strerror}") from error

    @contextmanager
    def stream(self, uri: str) -> Iterator[IO[bytes]]:
        """Open the file of a URI for reading; a .gz file is decompressed.

        Raises:
            SourceError: the file cannot be reached or opened.
        """
        with self.open(uri) as file:
            if uri.partition("?")[0].endswith(".gz"):
                with gzip.GzipFile(fileobj=file) as unpacked:
                    yield cast(IO[bytes], unpacked)
            else:
                yield file

    def open(self, uri: str) -> IO[bytes]:
        """Open the file of a URI for reading, from any position unless it is on the web.

        Raises:
            SourceError: the file cannot be reached or opened.
        """

        def open_once() -> IO[bytes]:
            if uri.startswith(LOCAL_SCHEME):
                return open(path_of_uri(uri), "rb")
            if uri.startswith(WEB_SCHEMES):
                return self._allowed_web(uri).open(uri)
            return self._buckets.open(uri)

        return list_with_retries(open_once, uri)

    @property
    def _buckets(self) -> BucketReader:
        # Imports pyarrow, which takes time and is not needed for local files.
        from reir_ingestion.sources.bucket_reader import (
            BucketReader,
        )

        return BucketReader(self.login, self.options)

    def _allowed_web(self, url: str) -> WebReader:
        if self.web is None:
            raise SourceError(
                f"{url[:200]!a} would have to be downloaded; --allow-http permits that"
            )
        return self.web

    def _url(self, text: str) -> str:
        """Return the canonical form of an address: scheme and host in lower case, no fragment.

        Raises:
            SourceError: the address is not valid, or downloads are not allowed.
        """
        self._allowed_web(text)
        try:
            parts = urlsplit(quote(text.strip(), safe=_UNQUOTED_IN_URLS))
            if not parts.hostname or parts.username is not None:
                raise ValueError("it needs a host, and must not contain a user name")
        except ValueError as error:
            raise SourceError(f"{text[:200]!a} is not a valid address: {error}") from error
        return parts._replace(
            scheme=parts.scheme.lower(),
            netloc=parts.netloc.lower(),
            path=parts.path or "/",
            fragment="",
        ).geturl()


@lru_cache(maxsize=8)
def _folder(base: str) -> str:
    """Return the folder of a local list; cached, since it is needed for every line of the list."""
    return os.fspath(path_of_uri(base).parent)

"""What a URI names, wherever that is: this machine, a bucket or, where allowed, the web."""

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
from reir.images import DEFAULT_MAX_BYTES, canonical_uri, path_of_uri, read_bytes
from reir_ingestion.sources.contract import BUCKETS, NOWHERE, UNKNOWN_TIME_NS, WEB, Status
from reir_ingestion.sources.http import Web
from reir_ingestion.sources.local import status_of_file
from reir_ingestion.sources.retrying import listing

if TYPE_CHECKING:
    from reir_ingestion.sources.objects import Objects

LOCAL = "file:///"

MAX_NAME_CHARS = 8192
"""Of a path or an address; a URI has to fit into a column of the store."""

_KEPT_IN_URLS = "%/:=&?#~+!$,;'@()*[]"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Places:
    """Reads URIs.

    Attributes:
        web: fetches what is on the web; None when that is not allowed.
        login, options: of buckets, see `reir_ingestion.sources.objects.Objects`.
    """

    web: Web | None = None
    login: str = ""
    options: str = ""

    def uri_of(self, text: str, base: str) -> str:
        """Return the canonical URI of what a list names.

        Args:
            text: a URI, or a path as the file system has it.
            base: URI of the list; a relative path starts from its folder.

        Raises:
            SourceError: it names no place, or one that the list must not name.
            UnicodeError: it has characters that no name has.
        """
        if not text or "\0" in text or len(text) > MAX_NAME_CHARS:
            raise SourceError(f"{text[:80]!a} ({len(text)} characters) names no image")
        if text.startswith(BUCKETS):
            return self._buckets.uri_of(text)
        if text.lower().startswith(WEB):
            return self._url(text)
        if base.startswith(LOCAL):
            path = path_of_uri(text) if text.startswith(LOCAL) else text
            return canonical_uri(os.path.join(_folder(base), path))
        if text.startswith(("/", LOCAL)):
            raise SourceError(f"{text[:80]!a} is local; only a local list may name local files")
        if base.startswith(WEB):
            return self._url(urljoin(base, quote(text)))
        return self._buckets.beside(base, text)

    def statuses(self, uris: Sequence[str]) -> list[Status]:
        """Size and time of each URI; those of one bucket, and those of the web, are asked together.

        If a bucket does not answer, the status is unknown; reading retries and reports the reason.

        Raises:
            SourceError: a URI is a web address, and those are not allowed.
        """
        found: dict[str, Status | None] = {}
        for uri in uris:
            if uri.startswith(LOCAL):
                found[uri] = status_of_file(os.fsencode(path_of_uri(uri)))
        if urls := [uri for uri in uris if uri.startswith(WEB)]:
            found |= zip(urls, self._allowed_web(urls[0]).statuses(urls), strict=True)
        keys: dict[str, list[str]] = {}
        for uri in uris:
            if uri.startswith(BUCKETS):
                keys.setdefault(uri.split("/")[2], []).append(uri)
        for of_bucket in keys.values():
            found |= zip(of_bucket, self._statuses_in_bucket(of_bucket), strict=True)
        return [found[uri] or NOWHERE for uri in uris]

    def _statuses_in_bucket(self, uris: Sequence[str]) -> Sequence[Status | None]:
        try:
            return listing(partial(self._buckets.statuses, uris), uris[0])
        except SourceError as error:
            logger.warning("%s", error)
            return [Status(0, UNKNOWN_TIME_NS)] * len(uris)

    def read(self, uri: str) -> bytes:
        """Return the bytes of a whole file.

        Raises:
            ImageError: MISSING, TOO_LARGE, UNREADABLE or UNREACHABLE.
        """
        if uri.startswith(LOCAL):
            return read_bytes(path_of_uri(uri))
        if uri.startswith(WEB):
            return self._allowed_web(uri).read(uri, DEFAULT_MAX_BYTES)
        return self._buckets.read(uri, DEFAULT_MAX_BYTES)

    def read_span(self, uri: str, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on, of a local file or an object.

        Raises:
            ImageError: MISSING, TOO_LARGE, UNREADABLE or UNREACHABLE.
        """
        if size > DEFAULT_MAX_BYTES:
            raise ImageError(
                ImageFailure.TOO_LARGE,
                f"{uri} has {size} bytes at {offset}, at most {DEFAULT_MAX_BYTES} are read",
            )
        if not uri.startswith(LOCAL):
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
        """Open what a URI names for reading, unpacked where it ends in .gz.

        Raises:
            SourceError: it cannot be reached, or refused.
        """
        with self.open(uri) as file:
            if uri.partition("?")[0].endswith(".gz"):
                with gzip.GzipFile(fileobj=file) as unpacked:
                    yield cast(IO[bytes], unpacked)
            else:
                yield file

    def open(self, uri: str) -> IO[bytes]:
        """Open what a URI names for reading; at any place, unless it is on the web.

        Raises:
            SourceError: it cannot be reached, or refused.
        """

        def opened() -> IO[bytes]:
            if uri.startswith(LOCAL):
                return open(path_of_uri(uri), "rb")
            if uri.startswith(WEB):
                return self._allowed_web(uri).open(uri)
            return self._buckets.open(uri)

        return listing(opened, uri)

    @property
    def _buckets(self) -> Objects:
        from reir_ingestion.sources.objects import Objects  # needs pyarrow, local files do not

        return Objects(self.login, self.options)

    def _allowed_web(self, url: str) -> Web:
        if self.web is None:
            raise SourceError(f"{url[:200]!a} would have to be fetched; --allow-http permits that")
        return self.web

    def _url(self, text: str) -> str:
        """An address with scheme and host in lower case, what is no ASCII encoded, no fragment."""
        self._allowed_web(text)
        try:
            parts = urlsplit(quote(text.strip(), safe=_KEPT_IN_URLS))
            if not parts.hostname or parts.username is not None:
                raise ValueError("it needs a host, and takes no user name")
        except ValueError as error:
            raise SourceError(f"{text[:200]!a} is no address: {error}") from error
        return parts._replace(
            scheme=parts.scheme.lower(),
            netloc=parts.netloc.lower(),
            path=parts.path or "/",
            fragment="",
        ).geturl()


@lru_cache(maxsize=8)
def _folder(base: str) -> str:
    """The folder of a local list."""
    return os.fspath(path_of_uri(base).parent)

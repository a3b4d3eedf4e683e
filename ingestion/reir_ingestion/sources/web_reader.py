"""Reads files over HTTP, by default from public addresses only.

A list from the internet may name addresses inside the user's own network. So a host name is
resolved first and the address checked, at every redirect too, and the connection goes to the very
address that was checked: a second look-up might give another one. No proxy is used, since a proxy
resolves names by itself.
"""

from __future__ import annotations

import hashlib
import http.client
import ipaddress
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.message import Message
from email.utils import parsedate_to_datetime
from functools import cache, partial
from typing import IO, Any
from urllib.error import HTTPError, URLError

from reir.errors import ImageError, ImageFailure
from reir.store.filters import MAX_INT
from reir_ingestion.sources.contract import UNKNOWN_TIME_NS, FileStatus
from reir_ingestion.sources.network_retries import Answer, LocationUnreachable, read_with_retries

CONNECT_TIMEOUT_S = 20.0
FETCH_TIMEOUT_S = 120.0
"""Timeout of one whole image. `CONNECT_TIMEOUT_S` applies to each read of a connection, so it alone
would let a server send one byte at a time."""

NUM_STATUS_THREADS = 16

# Images are read in parts, so that the limits of size and time are checked in between.
_READ_BYTES = 256 * 1024
# In nanoseconds, and with a hash in place of those, a later time would exceed 64 bits.
_MAX_SECONDS = MAX_INT // 10**9 - 1
_GONE = frozenset({404, 410})
_RETRYABLE = frozenset({408, 425, 429, 500, 502, 503, 504})
# urllib does not decompress bodies, and `Content-Length` has to be the size of the file.
_HEADERS = {"User-Agent": "reir", "Accept-Encoding": "identity"}


class RequestRefused(OSError):
    """The address must not be contacted, or its server refused the request; never retried."""


@dataclass(frozen=True)
class WebReader:
    """Reads files from http:// and https:// addresses.

    Attributes:
        allow_private: whether private networks and this machine may be contacted.
    """

    allow_private: bool = False

    def statuses(self, urls: Sequence[str]) -> list[FileStatus | None]:
        """Return size and time of each file; None if it does not exist.

        The time is unknown if no header contains it, or if the server does not answer. In the
        latter case, reading the file, which is retried, finds the reason.
        """
        with ThreadPoolExecutor(NUM_STATUS_THREADS, thread_name_prefix="reir-head") as pool:
            return list(pool.map(self._status, urls))

    def open(self, url: str) -> IO[bytes]:
        """Open the file at an address as a stream.

        Raises:
            FileNotFoundError: there is no such file.
            LocationUnreachable: another attempt may succeed.
            OSError: the server refused the request.
        """
        return _translate_errors(lambda: self._request(url, "GET"), url)

    def read(self, url: str, max_bytes: int) -> bytes:
        """Return the bytes of the file at an address.

        Raises:
            ImageError: MISSING, TOO_LARGE, UNREADABLE or UNREACHABLE.
        """
        try:
            return read_with_retries(
                lambda: _translate_errors(partial(self._fetch, url, max_bytes), url)
            )
        except FileNotFoundError as error:
            raise ImageError(ImageFailure.MISSING, f"{url}: {error}") from error
        except OSError as error:
            raise ImageError(ImageFailure.UNREADABLE, f"{url}: {error}") from error

    def _fetch(self, url: str, max_bytes: int) -> bytes:
        deadline_s = time.monotonic() + FETCH_TIMEOUT_S
        with self._request(url, "GET") as response:
            parts: list[bytes] = []
            num_bytes, expected = 0, response.length  # None if the server does not say
            while num_bytes != expected:
                # `read1` returns what has arrived; `read` would wait for all of it, so that a slow
                # server could keep it beyond the deadline.
                wanted = _READ_BYTES if expected is None else expected - num_bytes
                part = response.read1(min(_READ_BYTES, wanted))
                if not part:
                    break
                num_bytes += len(part)
                if num_bytes > max_bytes:
                    raise ImageError(
                        ImageFailure.TOO_LARGE,
                        f"{url} is larger than {max_bytes} bytes, the limit for an image",
                    )
                if time.monotonic() > deadline_s:
                    raise LocationUnreachable(
                        f"{url}: download not complete after {FETCH_TIMEOUT_S:g} s"
                    )
                parts.append(part)
            # `read1` does not raise an error when the connection breaks off.
            if expected is not None and num_bytes < expected:
                raise LocationUnreachable(
                    f"{url}: the connection broke off {expected - num_bytes} bytes before the end"
                )
            return b"".join(parts)

    def _status(self, url: str) -> FileStatus | None:
        try:
            with _translate_errors(lambda: self._request(url, "HEAD"), url) as response:
                return _status_of(response.headers)
        except FileNotFoundError:
            return None
        except OSError:  # includes servers that allow GET but not HEAD
            return FileStatus(0, UNKNOWN_TIME_NS)

    def _request(self, url: str, method: str) -> Any:
        request = urllib.request.Request(url, headers=_HEADERS, method=method)
        return self._opener().open(request, timeout=CONNECT_TIMEOUT_S)

    def _opener(self) -> urllib.request.OpenerDirector:
        """Return an opener for HTTP and HTTPS only.

        The default opener of urllib would also follow a redirect to file:// or ftp://.
        """
        opener = urllib.request.OpenerDirector()
        for handler in (
            _CheckedHandler(self.allow_private),
            urllib.request.HTTPRedirectHandler(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.UnknownHandler(),
        ):
            opener.add_handler(handler)
        return opener


class _CheckedHandler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens connections to checked addresses."""

    def __init__(self, allow_private: bool) -> None:
        # Not that of `HTTPSHandler`, which may create a TLS context: `_TlsConnection` has its own.
        urllib.request.AbstractHTTPHandler.__init__(self)
        self._allow_private = allow_private

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_Connection, allow_private=self._allow_private), request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_TlsConnection, allow_private=self._allow_private), request)


class _Connection(http.client.HTTPConnection):
    def __init__(self, host: str, *, allow_private: bool, **options: Any) -> None:
        super().__init__(host, **options)
        self._allow_private = allow_private

    def connect(self) -> None:
        self.sock = connect_checked(self.host, self.port, self._allow_private, self.timeout)


class _TlsConnection(_Connection):
    default_port = http.client.HTTPS_PORT

    def connect(self) -> None:
        super().connect()
        # The certificate is compared with the name, although the connection goes to an address.
        self.sock = _tls().wrap_socket(self.sock, server_hostname=self.host)


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()  # reads the system's certificates, so only once


def connect_checked(
    host: str, port: int, allow_private: bool, timeout_s: float | None
) -> socket.socket:
    """Connect to a host, if all of its addresses are allowed.

    Raises:
        RequestRefused: one of the addresses of the host is private.
        OSError: the host name is unknown, or the host does not answer.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    private = [each for each in addresses if not is_public(each)]
    # One private address is enough to refuse the host, since any of them may be used below.
    if private and not allow_private:
        raise RequestRefused(
            f"{host} has the private address {private[0]}; --allow-private permits that"
        )
    failure: OSError | None = None
    for address in addresses:
        try:
            return socket.create_connection((address, port), timeout_s)
        except OSError as error:
            failure = error
    raise failure or OSError(f"{host} has no address")


def is_public(address: str) -> bool:
    """Return whether an IP address is part of the public internet."""
    found = ipaddress.ip_address(address.partition("%")[0])  # a link-local one may end in "%eth0"
    if isinstance(found, ipaddress.IPv6Address):
        # These forms embed an IPv4 address, to which the packets are sent in the end.
        inner = found.ipv4_mapped or found.sixtofour
        if inner is not None:
            return is_public(str(inner))
        if found in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            return is_public(str(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)))
    return found.is_global and not found.is_multicast  # Python counts multicast as global


def _status_of(headers: Message) -> FileStatus:
    """Return size and time from the headers of a response.

    `Last-Modified` counts whole seconds, so the nanoseconds hold a hash of the ETag. The time
    therefore changes if either of the two headers changes.
    """
    length, modified, etag = (headers[each] for each in ("Content-Length", "Last-Modified", "ETag"))
    size_bytes = _number(length)
    if not modified and not etag:
        return FileStatus(size_bytes, UNKNOWN_TIME_NS)
    digest = hashlib.blake2b((etag or "").encode(), digest_size=8).digest()
    return FileStatus(
        size_bytes, _seconds(modified) * 10**9 + int.from_bytes(digest, "big") % 10**9
    )


def _number(length: str | None) -> int:
    try:
        return max(0, int(length or ""))
    except ValueError:  # also for more digits than Python converts
        return 0


def _seconds(modified: str | None) -> int:
    try:
        seconds = int(parsedate_to_datetime(modified or "").timestamp())
        return max(0, min(seconds, _MAX_SECONDS))
    except (ValueError, OverflowError):
        return 0


def _translate_errors(call: Callable[[], Answer], url: str) -> Answer:
    """Return the result of `call()`; raise `LocationUnreachable` where a retry may succeed."""
    try:
        return call()
    except HTTPError as error:
        message = f"{error.code} {error.reason}"
        error.close()  # the error is also the response, and keeps its connection open
        if error.code in _GONE:
            raise FileNotFoundError(message) from error
        if error.code in _RETRYABLE:
            raise LocationUnreachable(f"{url}: {message}") from error
        raise RequestRefused(message) from error
    except URLError as error:  # urllib wraps whatever `connect` raises
        if isinstance(error.reason, RequestRefused | ssl.SSLCertVerificationError):
            raise RequestRefused(str(error.reason)) from error
        raise LocationUnreachable(f"{url}: {error.reason}") from error
    except (http.client.InvalidURL, ValueError) as error:  # ValueError: not a valid host
        raise RequestRefused(str(error)) from error
    except http.client.HTTPException as error:
        raise LocationUnreachable(f"{url}: {type(error).__name__} {error}") from error
    except (ConnectionError, TimeoutError) as error:
        raise LocationUnreachable(f"{url}: {error}") from error

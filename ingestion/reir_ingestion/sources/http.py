"""Fetching over HTTP, from public addresses only unless private ones are allowed.

The address is checked after the name is resolved, at each redirect too, and the connection goes to
the very address that was checked. No proxy is used, since a proxy resolves names by itself.
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
from reir_ingestion.sources.contract import UNKNOWN_TIME_NS, Status
from reir_ingestion.sources.retrying import Answer, Unreachable, reading

CONNECT_TIMEOUT_S = 20.0
FETCH_TIMEOUT_S = 120.0
"""For one image, however slowly its bytes drip in."""

NUM_LOOKUPS = 16
"""Addresses asked about at once."""

_PART_BYTES = 256 * 1024
_GONE = frozenset({404, 410})
_MAY_PASS = frozenset({408, 425, 429, 500, 502, 503, 504})
_HEADERS = {"User-Agent": "reir", "Accept-Encoding": "identity"}


class Refused(OSError):
    """An address that must not be asked, or that refused to answer."""


@dataclass(frozen=True)
class Web:
    """Reads what http:// and https:// addresses name.

    Attributes:
        allow_private: also ask addresses of private networks and of this machine.
    """

    allow_private: bool = False

    def statuses(self, urls: Sequence[str]) -> list[Status | None]:
        """Size and time of each, None where there is nothing; unknown where no header tells.

        A failure to answer counts as unknown: reading, which is patient, finds the reason.
        """
        with ThreadPoolExecutor(NUM_LOOKUPS, thread_name_prefix="reir-head") as pool:
            return list(pool.map(self._status, urls))

    def open(self, url: str) -> IO[bytes]:
        """Open what is at an address, as a stream.

        Raises:
            FileNotFoundError: there is nothing.
            Unreachable: another attempt may succeed.
            OSError: refused.
        """
        return _asked(lambda: self._request(url, "GET"), url)

    def read(self, url: str, max_bytes: int) -> bytes:
        """Return the bytes at an address.

        Raises:
            ImageError: MISSING, TOO_LARGE, UNREADABLE or UNREACHABLE.
        """
        try:
            return reading(lambda: _asked(partial(self._fetch, url, max_bytes), url))
        except FileNotFoundError as error:
            raise ImageError(ImageFailure.MISSING, f"{url}: {error}") from error
        except OSError as error:
            raise ImageError(ImageFailure.UNREADABLE, f"{url}: {error}") from error

    def _fetch(self, url: str, max_bytes: int) -> bytes:
        deadline_s = time.monotonic() + FETCH_TIMEOUT_S
        with self._request(url, "GET") as response:
            parts: list[bytes] = []
            held_bytes = 0
            while part := response.read(_PART_BYTES):
                held_bytes += len(part)
                if held_bytes > max_bytes:
                    raise ImageError(
                        ImageFailure.TOO_LARGE, f"{url}: at most {max_bytes} bytes are read"
                    )
                if time.monotonic() > deadline_s:
                    raise Unreachable(f"{url}: not all there after {FETCH_TIMEOUT_S:g} s")
                parts.append(part)
            if response.length:  # `read` in parts does not tell of a connection that was cut
                raise Unreachable(f"{url}: cut off, {response.length} bytes are missing")
            return b"".join(parts)

    def _status(self, url: str) -> Status | None:
        try:
            with _asked(lambda: self._request(url, "HEAD"), url) as response:
                return _status_of(response.headers)
        except FileNotFoundError:
            return None
        except OSError:
            return Status(0, UNKNOWN_TIME_NS)

    def _request(self, url: str, method: str) -> Any:
        request = urllib.request.Request(url, headers=_HEADERS, method=method)
        return self._opener().open(request, timeout=CONNECT_TIMEOUT_S)

    def _opener(self) -> urllib.request.OpenerDirector:
        """An opener that knows HTTP and HTTPS, and nothing else."""
        opener = urllib.request.OpenerDirector()
        for handler in (
            _Handler(self.allow_private),
            urllib.request.HTTPRedirectHandler(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.UnknownHandler(),
        ):
            opener.add_handler(handler)
        return opener


class _Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens checked connections."""

    def __init__(self, allow_private: bool) -> None:
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
        self.sock = _tls().wrap_socket(self.sock, server_hostname=self.host)


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def connect_checked(
    host: str, port: int, allow_private: bool, timeout_s: float | None
) -> socket.socket:
    """Connect to a host at an address that may be asked.

    Raises:
        Refused: the name leads to a private address; one is enough.
        OSError: the name is not known, or nobody answers.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    private = [each for each in addresses if not is_public(each)]
    if private and not allow_private:
        raise Refused(
            f"{host} leads to the private address {private[0]}; --allow-private permits that"
        )
    failure: OSError | None = None
    for address in addresses:
        try:
            return socket.create_connection((address, port), timeout_s)
        except OSError as error:
            failure = error
    raise failure or OSError(f"{host} has no address")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        # each of these carries an IPv4 address that the packets end up at
        inner = found.ipv4_mapped or found.sixtofour
        if inner is not None:
            return is_public(str(inner))
        if found in ipaddress.ip_network("64:ff9b::/96"):
            return is_public(str(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)))
    return found.is_global and not found.is_multicast


def _status_of(headers: Message) -> Status:
    """Length and time that an answer tells.

    Times are whole seconds, so their nanoseconds are free to hold a hash of the ETag: whatever of
    the two changes, the time does.
    """
    length, modified, etag = (headers[each] for each in ("Content-Length", "Last-Modified", "ETag"))
    size_bytes = int(length) if length and length.isdecimal() else 0
    if not modified and not etag:
        return Status(size_bytes, UNKNOWN_TIME_NS)
    digest = hashlib.blake2b((etag or "").encode(), digest_size=8).digest()
    return Status(size_bytes, _seconds(modified) * 10**9 + int.from_bytes(digest, "big") % 10**9)


def _seconds(modified: str | None) -> int:
    try:
        return max(0, int(parsedate_to_datetime(modified or "").timestamp()))
    except (ValueError, OverflowError):
        return 0


def _asked(call: Callable[[], Answer], url: str) -> Answer:
    """Return `call()`; an error that another attempt may mend comes as `Unreachable`."""
    try:
        return call()
    except HTTPError as error:
        said = f"{error.code} {error.reason}"
        error.close()
        if error.code in _GONE:
            raise FileNotFoundError(said) from error
        if error.code in _MAY_PASS:
            raise Unreachable(f"{url}: {said}") from error
        raise Refused(said) from error
    except URLError as error:
        if isinstance(error.reason, Refused | ssl.SSLCertVerificationError):
            raise Refused(str(error.reason)) from error
        raise Unreachable(f"{url}: {error.reason}") from error
    except (http.client.InvalidURL, ValueError) as error:  # also a host that cannot be a name
        raise Refused(str(error)) from error
    except http.client.HTTPException as error:
        raise Unreachable(f"{url}: {type(error).__name__} {error}") from error
    except (ConnectionError, TimeoutError) as error:
        raise Unreachable(f"{url}: {error}") from error

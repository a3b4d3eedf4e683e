"""`Client`: searches the galleries of a server that `reir serve` runs, over HTTP.

It has the methods of `Gallery` and returns the same results as a gallery in this process. Requests
are sent with the standard library, so that the client needs no further package.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack
from urllib.parse import quote, urlencode, urlsplit

from reir.client.parsing import (
    Json,
    gallery_of,
    image_of,
    localization_of,
    photo_search_of,
    result_of,
)
from reir.client.problems import BUSY, error_of
from reir.client.requests import Body, form_body, json_body, options_json, search_request
from reir.errors import (
    ConfigError,
    ImageError,
    ImageFailure,
    ImageNotFound,
    ReirError,
    ServerError,
    ServerUnavailable,
)
from reir.operations.feedback import Verdict
from reir.operations.feedback.records import check_key, new_key
from reir.query.every_photo import EveryPhoto, EveryPhotoOptions
from reir.query.request import Query, SearchOptions
from reir.records import Attributes, Box, ImageRecord
from reir.results import GalleryInfo, Localization, PhotoReader, SearchResult
from reir.store.contract import InstanceRow

DEFAULT_URL = "http://127.0.0.1:8000"
KEY_VARIABLE = "REIR_API_KEY"
# Used if a server does not say when to try again, and doubled after each attempt up to the maximum.
FIRST_PAUSE_S, MAX_PAUSE_S = 0.2, 2.0
_DEFAULT_PORTS = {"http": http.client.HTTP_PORT, "https": http.client.HTTPS_PORT}


class Client(AbstractContextManager["Client"]):
    """Sends requests to a server; use it as a context manager, or call `close`.

    Only one thread at a time can use a client, because it has a single connection. If the server is
    busy or cannot reach its store, the client waits for as long as the server says (`Retry-After`)
    and tries again, for up to `patience_s`. All methods raise `ServerUnavailable` if there is no
    answer in that time, `AccessDenied` if the key is not valid or lacks a permission, and
    `GalleryNotFound` for a gallery that the key cannot read.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        key: str | None = None,
        timeout_s: float = 30.0,
        patience_s: float = 10.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Set up a client; the first request opens the connection.

        Args:
            url: address of the server, `http://` or `https://`, including a path prefix if the
                server has one.
            key: API key; None takes the environment variable REIR_API_KEY, if it is set.
            timeout_s: maximum time for one answer.
            patience_s: maximum time for all attempts at a busy server; 0 means a single attempt.
            sleep: function that waits between attempts.

        Raises:
            ConfigError: the address is not valid.
        """
        self.url = url.rstrip("/")
        self._connection, self._prefix = _connection(url, timeout_s)
        self._key = os.environ.get(KEY_VARIABLE, "") if key is None else key
        self._timeout_s, self._patience_s, self._sleep = timeout_s, patience_s, sleep

    def search(
        self, expression: str, gallery: str = "default", **options: Unpack[SearchOptions]
    ) -> SearchResult:
        """Find the instances that an expression describes, best first.

        Raises:
            QueryError: an argument is out of range; `field` names it.
        """
        asked = {"gallery": gallery, "expression": expression, **options_json(options)}
        return result_of(self._json("POST", "/v1/search", asked), self._reader(gallery))

    def ask(self, queries: Sequence[Query], gallery: str = "default") -> list[SearchResult]:
        """Answer queries, in the order given, with one request for each.

        The server's batch route cannot be used, because it applies the same options to all
        expressions.

        Raises:
            QueryError: a part is out of range, neither the first expression with a positive weight
                nor an instance has weight 1, or a term has a vector, which a server does not
                accept.
        """
        read = self._reader(gallery)
        answers = [self._json("POST", *search_request(query, gallery)) for query in queries]
        return [result_of(each, read) for each in answers]

    def search_batch(
        self,
        expressions: Sequence[str],
        gallery: str = "default",
        **options: Unpack[SearchOptions],
    ) -> list[SearchResult]:
        """Answer several expressions at once, in the order given.

        Raises:
            QueryError: an argument is out of range; `field` names it.
        """
        asked = {"gallery": gallery, "expressions": list(expressions), **options_json(options)}
        answers = self._json("POST", "/v1/search/batch", asked)["answers"]
        return [result_of(each, self._reader(gallery)) for each in answers]

    def every_photo(
        self, expression: str, gallery: str = "default", **options: Unpack[EveryPhotoOptions]
    ) -> EveryPhoto:
        """Find every photo that has the instance that an expression describes, not the k best.

        The photos are received while they are iterated over, on a connection of their own.

        Args:
            expression: describes one instance.
            gallery: gallery to search.
            options: `where`, `verify`, and at most one of `min_presence`, `precision` and `recall`;
                see `EveryPhotoQuery`.

        Raises:
            QueryError: an argument is out of range, or no threshold reaches the precision.
            ServerError: also while iterating: the answer ended before it was complete.
        """
        asked = {"gallery": gallery, "expression": expression, **options}
        # This answer may last long, and the client must be able to send other requests meanwhile.
        other = Client(
            self.url,
            key=self._key,
            timeout_s=self._timeout_s,
            patience_s=self._patience_s,
            sleep=self._sleep,
        )
        answer, _ = other._answer("POST", "/v1/search/all", json_body(asked), stream=True)
        lines = other._lines(answer)
        return photo_search_of(next(lines), lines)

    def similar(
        self,
        like: str | bytes | Path,
        gallery: str = "default",
        *,
        box: Box | None = None,
        expression: str | None = None,
        **options: Unpack[SearchOptions],
    ) -> SearchResult:
        """Find instances like another one.

        Args:
            like: id of an instance of the gallery; or a photo, as bytes or as the path of its file.
            gallery: gallery to search.
            box: of the instance in the photo, xyxy in [0, 1]; None takes the whole photo.
            expression: added to the query.
            options: see `SearchOptions`.

        Raises:
            QueryError: an argument is out of range; `field` names it.
            ImageError: the photo cannot be decoded.
        """
        asked = {"gallery": gallery, "expression": expression, **options_json(options)}
        # The route takes JSON for an instance of the gallery, and a form for a photo.
        if isinstance(like, str):
            asked |= {"instance_id": like, "box": box}
            return result_of(self._json("POST", "/v1/search/similar", asked), self._reader(gallery))
        form = form_body(like, {"request": json.dumps({**asked, "box": box})})
        return result_of(self._parsed("POST", "/v1/search/similar", form), self._reader(gallery))

    def localize(
        self, photo: bytes | Path, expression: str, k: int = 5, *, masks: bool = False
    ) -> Localization:
        """Find the instances of one photo, of a gallery or not, that an expression describes.

        Raises:
            ImageError: the photo cannot be decoded.
            QueryError: the expression is empty or too long.
        """
        form = form_body(
            photo, {"expression": expression, "k": str(k), "masks": str(masks).lower()}
        )
        return localization_of(self._parsed("POST", "/v1/localize", form))

    def feedback(  # noqa: PLR0913, each is a part of the request
        self,
        gallery: str,
        expression: str,
        verdict: Verdict,
        instance_id: str = "",
        *,
        image_id: str = "",
        box: Box | None = None,
        idempotency_key: str = "",
    ) -> bool:
        """Tell the server what is right or wrong about the answer to a search.

        If the connection fails, the client sends the feedback again for up to `patience_s`, with
        the same idempotency key, so that it is recorded once.

        Args:
            gallery: gallery that was searched.
            expression: what was searched for.
            verdict: "right" or "wrong" about an instance, "box" if the object is in a box instead,
                or "absent" if it is not in the gallery.
            instance_id: the hit that is right or wrong; empty for other verdicts.
            image_id, box: where the object is for "box": a photo, and xyxy in [0, 1].
            idempotency_key: key of a call that is repeated; empty makes a new one.

        Returns:
            Whether the verdict is on the server's disk; False if the server cannot write it.

        Raises:
            QueryError: the verdict is not one of these, a part is missing or superfluous, or other
                feedback had this key.
            ImageNotFound: the gallery has no such instance or photo.
            ServerError: the server records no feedback.
        """
        told = {"gallery": gallery, "expression": expression, "verdict": verdict}
        about = {"instance_id": instance_id, "image_id": image_id, "box": box and list(box)}
        body = json_body({**told, **{name: each for name, each in about.items() if each}})
        body = replace(body, idempotency_key=check_key(idempotency_key or new_key()))
        return bool(self._parsed("POST", "/v1/feedback", body)["recorded"])

    def galleries(self) -> list[GalleryInfo]:
        """List the galleries that the key may read."""
        return [gallery_of(each) for each in self._json("GET", "/v1/galleries")["galleries"]]

    def add_image(
        self,
        photo: bytes | Path,
        gallery: str = "default",
        attributes: Attributes | None = None,
    ) -> ImageRecord:
        """Add a photo; searches find it as soon as this method returns.

        Raises:
            ImageError: the photo cannot be decoded; nothing is stored.
            QueryError: an attribute cannot be stored.
        """
        form = form_body(photo, {"attributes": json.dumps(dict(attributes or {}))})
        answer = self._parsed("POST", _place(gallery), form)
        return ImageRecord(
            image_id=answer["image_id"],
            uri=answer["uri"],
            status="indexed",
            num_instances=answer["num_instances"],
            attributes=dict(attributes or {}),
        )

    def delete_image(self, image_id: str, gallery: str = "default") -> bool:
        """Delete a photo; return False if the gallery has no photo of that id."""
        return self._known("DELETE", f"{_place(gallery)}/{quote(image_id, safe='')}") is not None

    def image(
        self, image_id: str, gallery: str = "default"
    ) -> tuple[ImageRecord, list[InstanceRow]] | None:
        """Return the ledger row and the instances of a photo; None if the gallery lacks it."""
        found = self._known("GET", f"{_place(gallery)}/{quote(image_id, safe='')}")
        return None if found is None else image_of(json.loads(found))

    def picture(
        self,
        image_id: str,
        gallery: str = "default",
        *,
        width: int | None = None,
        boxes: bool = False,
    ) -> bytes | None:
        """Return an encoded picture of a photo; None if the gallery has no photo of that id.

        Args:
            image_id: id of the photo.
            gallery: its gallery.
            width: maximum width in pixels; None returns the stored file.
            boxes: draw the boxes of all instances.
        """
        told = {"gallery": gallery, **({"width": width} if width else {})}
        query = urlencode({**told, **({"boxes": 1} if boxes else {})})
        return self._known("GET", f"/v1/images/{quote(image_id, safe='')}?{query}")

    def ready(self) -> bool:
        """Return whether the server is ready to answer; makes a single attempt."""
        try:
            self._send("GET", "/readyz", Body(), patience_s=0.0)
        except ServerError:  # includes `ServerUnavailable`, if nothing answers at all
            return False
        return True

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        self._connection.close()

    def __exit__(self, *_: object) -> None:
        """Close the connection."""
        self.close()

    def __repr__(self) -> str:
        return f"Client({self.url!r})"

    def _reader(self, gallery: str) -> PhotoReader:
        """Return the function with which the hits of a gallery read their photos."""

        def read(image_id: str) -> bytes:
            data = self.picture(image_id, gallery)
            if data is None:
                raise ImageError(
                    ImageFailure.MISSING, f"gallery '{gallery}' has no photo {image_id} any more"
                )
            return data

        return read

    def _json(self, method: str, path: str, body: Json | None = None) -> Any:
        return self._parsed(method, path, Body() if body is None else json_body(body))

    def _parsed(self, method: str, path: str, body: Body) -> Any:
        return json.loads(self._send(method, path, body))

    def _known(self, method: str, path: str) -> bytes | None:
        """Return the body of an answer; None if there is no such photo."""
        try:
            return self._send(method, path, Body())
        except ImageNotFound:
            return None

    def _send(self, method: str, path: str, body: Body, patience_s: float | None = None) -> bytes:
        """Send a request and return the body of the answer; see `_answer`."""
        return self._answer(method, path, body, patience_s)[1]

    def _answer(
        self,
        method: str,
        path: str,
        body: Body,
        patience_s: float | None = None,
        *,
        stream: bool = False,
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """Send a request and return the answer with its body; a busy server is tried again.

        A server that does not answer is tried again if the request has an idempotency key. With
        `stream`, the body is left for the caller to read.

        Raises:
            ReirError: the error that the server reported, after the last attempt.
        """
        patience_s = self._patience_s if patience_s is None else patience_s
        end_s = time.monotonic() + patience_s
        pause_s = FIRST_PAUSE_S
        while True:
            wait_s, may_repeat = pause_s, bool(body.idempotency_key)
            try:
                answer, data = self._exchange(method, path, body, stream)
                if answer.status < 400:
                    return answer, data
                wait_s = _seconds(answer.getheader("retry-after"), pause_s)
                may_repeat = answer.status in BUSY
                raise error_of(self.url, answer.status, data)
            except ReirError:
                # If the time left is shorter than the wait, the client gives up without waiting.
                if not may_repeat or time.monotonic() + wait_s > end_s:
                    raise
            self._sleep(wait_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)

    def _exchange(
        self, method: str, path: str, body: Body, stream: bool
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """Send one request on the open connection, or on a new one if the server has closed it.

        Raises:
            ServerUnavailable: the connection failed, or there was no answer in time.
        """
        headers = {"Accept": "application/json"}
        if body.media_type:
            headers["Content-Type"] = body.media_type
        if body.idempotency_key:
            headers["Idempotency-Key"] = f'"{body.idempotency_key}"'
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        # A server closes a connection that was idle for long, which the client notices only when it
        # sends the next request. So an open connection gets a second attempt, a new one does not. A
        # request may then be processed twice, which is safe: every request can be repeated.
        for is_last in (self._connection.sock is None, True):
            try:
                self._connection.request(method, self._prefix + path, body.data or None, headers)
                answer = self._connection.getresponse()
                return answer, b"" if stream and answer.status < 400 else answer.read()
            except BaseException as error:
                # Also after Ctrl-C: the connection would still wait for the answer, and refuse the
                # next request.
                self._connection.close()
                if not isinstance(error, OSError | http.client.HTTPException):
                    raise
                # Other errors, such as a timeout, do not mean that the connection had been closed.
                stale = isinstance(error, ConnectionError | http.client.BadStatusLine)
                if is_last or not stale:
                    raise ServerUnavailable(
                        f"server {self.url} does not answer: {error or type(error).__name__}; is "
                        f"`reir serve` running there?"
                    ) from error
        raise AssertionError("the last attempt returns or raises")

    def _lines(self, answer: http.client.HTTPResponse) -> Iterator[Json]:
        """Yield the values of a stream's lines, at last its end, then close the connection.

        Raises:
            ReirError: the server reported an error, or the answer ended before it was complete.
        """
        reason = ""
        with self:
            try:
                while text := answer.readline():
                    value = json.loads(text)
                    if "error" in value:
                        told = value["error"]
                        raise error_of(self.url, told["status"], json.dumps(told).encode())
                    yield value
                    if "end" in value:
                        return
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = f" ({error or type(error).__name__})"
        raise ServerError(
            f"the answer of server {self.url} ended before it was complete{reason}: the server was "
            f"stopped, or the answer took longer than its setting `limits.request_timeout_s`"
        )


def _connection(url: str, timeout_s: float) -> tuple[http.client.HTTPConnection, str]:
    """Return a connection to a server, which is not open yet, and the path prefix of its address.

    Raises:
        ConfigError: the address is not valid.
    """
    try:
        place = urlsplit(url)
        # Without a port, `http.client` would take the last part of an IPv6 address for one.
        host, port = place.hostname or "", place.port or _DEFAULT_PORTS.get(place.scheme)
    except ValueError:  # of a port or an IPv6 address that cannot be one
        host = ""
    if not host or place.scheme not in _DEFAULT_PORTS:
        raise ConfigError(
            f"server address {url!r} is not valid; expected http://HOST:PORT or https://HOST:PORT"
        )
    if place.scheme == "http":
        connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    else:
        context = ssl.create_default_context()
        connection = http.client.HTTPSConnection(host, port, timeout=timeout_s, context=context)
    return connection, place.path.rstrip("/")


def _seconds(told: str | None, otherwise: float) -> float:
    try:
        # HTTP also allows a date here, which a proxy before the server may send.
        return max(0.0, float(told or ""))
    except ValueError:
        return otherwise


def _place(gallery: str) -> str:
    return f"/v1/galleries/{quote(gallery, safe='')}/images"

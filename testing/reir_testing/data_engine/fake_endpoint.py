"""An OpenAI-compatible endpoint on this machine that answers well, or fails in one of many ways."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Fault(StrEnum):
    """What is wrong with an answer."""

    NONE = "none"
    RATE_LIMIT = "429 once, with Retry-After"
    SERVER_ERROR = "500 at each attempt"
    TIME_OUT = "no answer in time"
    TRUNCATED_JSON = "the body ends within the JSON"
    SHORT_BODY = "the body is shorter than announced"
    WRONG_SCHEMA = "the text has another form"
    HUGE_ANSWER = "the text has one million characters"
    EMPTY_ANSWER = "the text is empty"
    WRONG_CONTENT_TYPE = "JSON with the type of plain text"
    CONNECTION_RESET = "the connection is reset"
    SLOW_DRIP = "the body comes byte by byte"
    HTML = "a page instead of JSON"
    WRONG_NUMBERS = "the text names objects that were not asked for"
    DUPLICATE_NUMBERS = "the text names an object twice"
    CONTROL_CHARACTERS = "the expressions have control characters of other scripts"
    REDIRECT = "a redirect to another host"
    NO_ACCESS = "401"
    NEGATIVE_USAGE = "a negative number of tokens"
    INVALID_UTF8 = "the body is not UTF-8"
    EXTRA_FIELDS = "unknown fields everywhere"
    SCRIPT = "the expressions contain a script"
    NOT_TEXT = "the text is a number"


FAULTS = tuple(each for each in Fault if each is not Fault.NONE)


@dataclass
class FakeEndpoint:
    """The server's state.

    Attributes:
        url: base URL of the endpoint.
        faults: faults of the questions, in the order in which they first arrive; later ones get
            good answers.
        delay_s: how long each good answer takes.
        requests: key of each request, in the order of arrival.
        answered: keys of the requests that got a status of 200.
        bodies: the bodies of all requests.
        fault_of: key -> its fault.
    """

    url: str = ""
    faults: Sequence[Fault] = ()
    delay_s: float = 0.0
    requests: list[str] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    fault_of: dict[str, Fault] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def arrive(self, key: str, body: bytes) -> tuple[Fault, int]:
        """Note a request; return its fault, and how often it has arrived."""
        with self.lock:
            if key not in self.fault_of:
                number = len(self.fault_of)
                fault = self.faults[number] if number < len(self.faults) else Fault.NONE
                self.fault_of[key] = fault
            self.requests.append(key)
            self.bodies.append(body)
            return self.fault_of[key], Counter(self.requests)[key]


@contextmanager
def fake_endpoint(faults: Sequence[Fault] = (), *, delay_s: float = 0.0) -> Iterator[FakeEndpoint]:
    """Run an endpoint on a free port of this machine until the block ends."""
    state = FakeEndpoint(faults=faults, delay_s=delay_s)

    class Handler(_Handler):
        endpoint = state

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def good_text(asked: Mapping[str, Any]) -> str:
    """Return a good answer to a writer's or a judge's question."""
    if "expressions" in asked:
        checks = ("good_language", "grounded", "unique_in_photo", "unique_in_gallery")
        verdicts = [
            {"id": each["id"], **dict.fromkeys(checks, True), "reason": ""}
            for each in asked["expressions"]
        ]
        return json.dumps({"verdicts": verdicts})
    return json.dumps({"objects": [_written(each) for each in _wanted(asked)]})


def _wanted(asked: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [each for each in asked["objects"] if each["number"] in asked["describe"]]


def _written(instance: Mapping[str, Any], text: str = "") -> dict[str, Any]:
    name = LETTERS[instance["number"] % len(LETTERS)] * 3
    texts = [text or f"{instance['class'] or 'thing'} that people call {name}"]
    return {"number": instance["number"], "expressions": texts}


class _Handler(BaseHTTPRequestHandler):
    endpoint: FakeEndpoint

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, of the base class
        """Print nothing."""

    def do_POST(self) -> None:
        """Answer a request."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        key = self.headers["Idempotency-Key"]
        fault, attempt = self.endpoint.arrive(key, body)
        time.sleep(self.endpoint.delay_s)
        try:
            self._fail(fault, attempt, body, key)
        except OSError:  # the client has left
            self.close_connection = True

    def _fail(self, fault: Fault, attempt: int, body: bytes, key: str) -> None:
        asked = json.loads(json.loads(body)["messages"][1]["content"][0]["text"])
        data = self._data(fault, asked)
        if fault is Fault.RATE_LIMIT and attempt == 1:
            self._send(429, b"{}", {"Retry-After": "0.05"})
        elif fault is Fault.SERVER_ERROR:
            self._send(500, b"{}")
        elif fault is Fault.NO_ACCESS:
            self._send(401, b"{}")
        elif fault is Fault.REDIRECT:
            self._send(307, b"", {"Location": "http://192.0.2.1/v1/chat/completions"})
        elif fault is Fault.TIME_OUT:
            time.sleep(3)
        elif fault is Fault.CONNECTION_RESET:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
        elif fault is Fault.SLOW_DRIP:
            self._drip(data)
        else:
            with self.endpoint.lock:
                self.endpoint.answered.append(key)
            self._send(200, data, _headers(fault, data))

    def _send(self, status: int, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        usual = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        for name, value in (usual | dict(headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _drip(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        for byte in data[:60]:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            time.sleep(0.1)

    def _data(self, fault: Fault, asked: Mapping[str, Any]) -> bytes:
        text = _text(fault, asked)
        usage = {"prompt_tokens": 1000, "completion_tokens": 100}
        if fault is Fault.NEGATIVE_USAGE:
            usage = {"prompt_tokens": -1_000_000, "completion_tokens": -5}
        answer: dict[str, Any] = {
            "choices": [{"message": {"content": text}, "finish_reason": "stop"}],
            "usage": usage,
        }
        if fault is Fault.EXTRA_FIELDS:
            answer |= {"id": "x", "service_tier": {"a": [1]}}
        data = json.dumps(answer).encode()
        if fault is Fault.TRUNCATED_JSON:
            return data[: len(data) // 2]
        if fault is Fault.INVALID_UTF8:
            return data.replace(b"people", b"peo\xff\xfe")
        if fault is Fault.HTML:
            return b"<html><script>alert(1)</script>502 Bad Gateway</html>"
        return data


def _headers(fault: Fault, data: bytes) -> dict[str, str]:
    if fault is Fault.SHORT_BODY:
        return {"Content-Length": str(len(data) + 100)}
    if fault is Fault.WRONG_CONTENT_TYPE:
        return {"Content-Type": "text/plain"}
    return {"Content-Type": "text/html"} if fault is Fault.HTML else {}


def _text(fault: Fault, asked: Mapping[str, Any]) -> Any:
    """Return the text of an answer."""
    wanted = _wanted(asked)
    written = [_written(each) for each in wanted]
    if fault is Fault.EMPTY_ANSWER:
        return ""
    if fault is Fault.NOT_TEXT:
        return 17
    if fault is Fault.HUGE_ANSWER:
        return "x" * 1_000_000
    if fault is Fault.WRONG_SCHEMA:
        return json.dumps({"answer": ["a dog"]})
    if fault is Fault.WRONG_NUMBERS:
        return json.dumps({"objects": [{"number": -7, "expressions": ["a red dog"]}]})
    if fault is Fault.DUPLICATE_NUMBERS:
        return json.dumps({"objects": [*written, *written]})
    if fault is Fault.CONTROL_CHARACTERS:
        odd = "\u202eeht \u0000 \u0627\u0644\u0643\u0644\u0628 \u200b\x1b[31m \u72d7"
        return json.dumps({"objects": [_written(each, odd) for each in wanted]})
    if fault is Fault.SCRIPT:
        code = "the dog <img src=x onerror=alert(1)> on the left"
        return json.dumps({"objects": [_written(each, code) for each in wanted]})
    if fault is Fault.EXTRA_FIELDS:
        return json.dumps({"objects": [each | {"mood": 3} for each in written], "x": None})
    return good_text(asked)

"""A collector of traces: a small HTTP server that decodes what an OTLP exporter sends to it."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class CollectedSpan:
    """One span as the collector received it.

    Attributes:
        service: name of the service that sent it.
        parent_id: id of the span that contains it; empty if there is none.
        failed: whether its status is an error.
        num_events: number of its events.
    """

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    failed: bool
    num_events: int
    attributes: dict[str, Any]


@dataclass
class Collector:
    """The spans that arrived, and the address to send them to."""

    endpoint: str
    spans: list[CollectedSpan] = field(default_factory=list)

    def wait_for(self, name: str, timeout_s: float = 20.0) -> CollectedSpan:
        """Return the first span with this name, as soon as it arrives.

        Raises:
            TimeoutError: none has arrived in time; the message lists those that have.
        """
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s:
            for span in list(self.spans):
                if span.name == name:
                    return span
            time.sleep(0.05)
        raise TimeoutError(f"no span {name!r}, only {sorted({each.name for each in self.spans})}")

    def children(self, parent: CollectedSpan) -> list[CollectedSpan]:
        """Return the spans directly within a span, in the order of their start."""
        found = [each for each in self.spans if each.parent_id == parent.span_id]
        return sorted(found, key=lambda each: each.start_ns)


@contextmanager
def trace_collector() -> Iterator[Collector]:
    """Run a collector on a free port of this machine."""
    collector = Collector("")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            assert self.path == "/v1/traces", self.path
            collector.spans += _decode(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield collector
        server.shutdown()
        thread.join()


def _decode(request: ExportTraceServiceRequest) -> Iterator[CollectedSpan]:
    for group in request.resource_spans:
        service = _values(group.resource.attributes).get("service.name", "")
        for scope in group.scope_spans:
            for span in scope.spans:
                yield CollectedSpan(
                    service=service,
                    name=span.name,
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    start_ns=span.start_time_unix_nano,
                    end_ns=span.end_time_unix_nano,
                    failed=span.status.code == span.status.STATUS_CODE_ERROR,
                    num_events=len(span.events),
                    attributes=_values(span.attributes),
                )


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}

"""Serves the metrics of one machine on a port of their own, for scrapers on a cluster.

Behind a load balancer, a replica on any machine answers `/metrics`, so a scraper that asks each
machine would get the metrics of another one. The replicas of a machine share the port: the kernel
chooses one of them, and each of them answers with the metrics of all (`metrics.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client.exposition import CONTENT_TYPE_LATEST


def serve_metrics(port: int, text: Callable[[], bytes]) -> None:
    """Answer `GET` with metrics on all interfaces, in a thread that ends with this process.

    Args:
        port: port to listen on; other processes may do so, too.
        text: returns the metrics in Prometheus's text format; called from other threads.

    Raises:
        OSError: a process that does not share the port listens on it.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = text()
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE_LATEST)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Write no log: a scraper asks every few seconds."""

    server = _SharedPortServer(("", port), Handler)
    threading.Thread(target=server.serve_forever, name="reir-metrics", daemon=True).start()


class _SharedPortServer(ThreadingHTTPServer):
    allow_reuse_port = True
    daemon_threads = True

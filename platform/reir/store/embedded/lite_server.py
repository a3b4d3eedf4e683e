"""`LiteServer`: finds or starts the process that serves an embedded store.

Milvus Lite allows only one process per data directory. The first client starts a server process on
127.0.0.1; later clients read its address from the directory and share it. If the server dies, the
next call of any client starts another. A server keeps running while any client uses the store, even
after the client that started it has ended, and ends by itself once no client does. All of this
relies on file locks, since the kernel releases them even after a kill -9.

    server.json    process id, port and start time, written by the server when it is ready
    server.lock    held by the server while it runs
    clients.lock   shared by every client while it has the store open
    start.lock     held while looking for a server or starting one
    server.log     output of the server
    milvus/        the data
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from reir.errors import StoreUnavailable
from reir.store.embedded.lite_server_process import ADDRESS_FILE, CLIENTS_LOCK, SERVER_LOCK
from reir.store.embedded.locks import FileLock, exclusive, is_locked

IDLE_S = 20.0
"""How long an unused server keeps running, so that the next command need not start one."""

_START_TIMEOUT_S = 60.0
_POLL_S = 0.02
_LOG_LIMIT_BYTES = 1 << 20

_started: list[subprocess.Popen[bytes]] = []
"""Servers that this process started. Kept to collect their exit codes, since they may outlive the
`LiteServer` that started them."""


@dataclass(frozen=True)
class Address:
    """Process id and port of a running server."""

    pid: int
    port: int
    started: int = 0

    @property
    def uri(self) -> str:
        """The address in the form that Milvus clients accept."""
        return f"http://127.0.0.1:{self.port}"

    def answers(self) -> bool:
        """Whether a process listens at the port."""
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True


class LiteServer:
    """The server of one directory, as one client of it sees it."""

    def __init__(
        self,
        directory: Path,
        *,
        idle_s: float = IDLE_S,
        copy: tempfile.TemporaryDirectory[str] | None = None,
    ) -> None:
        """Open `directory`, creating it if it is missing; no server is started yet.

        Args:
            directory: directory of the store.
            idle_s: how long the server keeps running when no client uses it.
            copy: a copy of the directory, which is served instead of it because it is read-only;
                deleted by `close`.

        Raises:
            StoreUnavailable: the directory is not writable.
        """
        self.place = directory
        self.directory = directory if copy is None else Path(copy.name)
        self._copy = copy
        self._idle_s = idle_s
        self._process: subprocess.Popen[bytes] | None = None
        self._ahead: Future[Address] | None = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._clients_lock = FileLock(self.directory / CLIENTS_LOCK)
        except OSError as error:
            raise StoreUnavailable(str(directory), f"cannot be written ({error})") from error

    def start_ahead(self) -> None:
        """Find or start a server in a thread; the first call of `address` waits for the result."""
        pool = ThreadPoolExecutor(1, thread_name_prefix="reir-lite-server")
        self._ahead = pool.submit(self._find_or_start)
        # This does not cancel the task. It only lets the thread end after it.
        pool.shutdown(wait=False)

    def address(self) -> Address:
        """Return the address of the server, and start one if there is none.

        Raises:
            StoreUnavailable: no server starts; or one runs, but does not write its address; or the
                directory no longer exists.
        """
        ahead, self._ahead = self._ahead, None
        return self._find_or_start() if ahead is None else ahead.result()

    def _find_or_start(self) -> Address:
        self._relock()
        # The lock comes first: an idle server ends only with an exclusive lock on this file, so the
        # one that is found below keeps running.
        deadline = time.monotonic() + _START_TIMEOUT_S
        if not self._clients_lock.acquire(shared=True, timeout_s=_START_TIMEOUT_S):
            raise self._unavailable("the previous server has not finished closing")
        with exclusive(self.directory / "start.lock"):
            process: subprocess.Popen[bytes] | None = None
            while time.monotonic() < deadline:
                # By its lock, not by the address file: after a kill, another program may have that
                # process id and port. A server that runs but does not answer may still be starting.
                if not self.is_running():
                    if process is None:
                        process = self._start()
                    elif process.poll() is not None:
                        problem = f"the server ended with exit code {process.returncode}"
                        raise self._unavailable(problem)
                address = self._read_address()
                if address is not None and address.answers():
                    return address
                time.sleep(_POLL_S)
        raise self._unavailable(f"no server answered within {_START_TIMEOUT_S:.0f} s")

    def is_running(self) -> bool:
        """Whether a process serves the directory."""
        return is_locked(self.directory / SERVER_LOCK)

    def close(self) -> None:
        """Stop using the store. Its server ends once no client uses it; that of a copy ends now."""
        if self._ahead is not None:
            # The thread may be starting a server, for which it needs the lock that is closed below.
            wait([self._ahead])
        self._clients_lock.close()
        if self._copy is not None:
            if self._process is not None:
                self._process.terminate()
                self._process.wait()
            self._copy.cleanup()

    def _relock(self) -> None:
        """Lock the directory again if it was deleted and created anew since the last call."""
        if self._clients_lock.is_current:
            return
        if not self.directory.is_dir():
            raise StoreUnavailable(
                str(self.place),
                "its folder no longer exists; restore it, or index into a new store",
            )
        self._clients_lock.close()
        self._clients_lock = FileLock(self.directory / CLIENTS_LOCK)

    def _start(self) -> subprocess.Popen[bytes]:
        (self.directory / ADDRESS_FILE).unlink(missing_ok=True)  # that of a killed server
        command = [
            sys.executable,
            "-m",
            "reir.store.embedded.lite_server_process",
            str(self.directory),
        ]
        log = self.directory / "server.log"
        fresh = not log.exists() or log.stat().st_size > _LOG_LIMIT_BYTES
        with log.open("wb" if fresh else "ab") as output:
            process = subprocess.Popen(
                [*command, "--idle-s", str(self._idle_s)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that Ctrl-C in a terminal does not end it
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self._process = process
        _started[:] = [each for each in _started if each.poll() is None] + [process]
        return process

    def _read_address(self) -> Address | None:
        """Return the address that a server has written, if there is one."""
        try:
            return Address(**json.loads((self.directory / ADDRESS_FILE).read_text()))
        except (OSError, ValueError, TypeError):  # missing or incomplete
            return None

    def _unavailable(self, problem: str) -> StoreUnavailable:
        log = self.directory / "server.log"
        return StoreUnavailable(str(self.place), f"{problem}; see its log {log}")

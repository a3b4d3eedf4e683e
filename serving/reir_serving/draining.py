"""HAProxy finishes what it has, and ends: no new connections, no answer cut.

Told to stop softly, HAProxy closes its ports at once and ends every connection with the answer to
the next request on it. A connection that stays idle would keep it until a time-out, so it is asked
what is under way: on a line that was open before, since it takes no new ones any more.

Knows no Ray.
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

from reir_serving.processes import Reader, is_running, with_settings_in

HAPROXY = "haproxy"
"""The program; others that read the same settings watch over it, and end with it."""

POLL_S = 0.1
QUIET_POLLS = 5
"""So often in a row nothing may be under way before idle connections are closed: a client that asks
as soon as it has its answer hears with the next answer that it was the last."""

_TIMEOUT_S = 5.0
_PROMPT = b"\n> "


def drain(folder: Path, within_s: float) -> None:
    """End the HAProxies of a server, those too that Ray Serve starts meanwhile.

    Args:
        folder: where their settings lie.
        within_s: what is still under way then is cut.
    """
    deadline_s, quiet = time.monotonic() + within_s, 0
    with ExitStack() as opened:
        lines: dict[int, Line | None] = {}
        told: set[int] = set()
        while quiet < QUIET_POLLS and time.monotonic() < deadline_s:
            newcomers = {p: each for p, each in with_settings_in(folder).items() if p not in told}
            _listen(newcomers, lines, opened)
            for pid in newcomers:
                _send(pid, signal.SIGUSR1)
            told |= set(newcomers)
            is_busy = any(_is_busy(pid, line) for pid, line in lines.items())
            quiet = 0 if is_busy else quiet + 1
            time.sleep(POLL_S)
    for pid in with_settings_in(folder):
        _send(pid, signal.SIGKILL)


def _listen(
    newcomers: Mapping[int, Reader], lines: dict[int, Line | None], opened: ExitStack
) -> None:
    """Open a line to each HAProxy, while it still takes one.

    Args:
        newcomers: processes that read settings.
        lines: gets those of the HAProxies among them; None for one that another had replaced
            before, and that ends by itself.
        opened: closes the lines.
    """
    for pid, each in newcomers.items():
        if each.program == HAPROXY:
            lines.setdefault(pid, None)
            with suppress(OSError):
                line = opened.enter_context(closing(Line(_address_in(each.settings))))
                lines[line.pid] = line


class Line:
    """A connection to the administration of one HAProxy.

    Attributes:
        pid: of that HAProxy.
    """

    def __init__(self, address: str) -> None:
        """Connect to the socket at `address`.

        Raises:
            OSError: nobody answers there.
        """
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(_TIMEOUT_S)
            self._socket.connect(address)
            self._ask("prompt")  # without it HAProxy takes one command only
            self.pid = int(re.findall(r"^Pid: (\d+)", self._ask("show info"), re.MULTILINE)[0])
        except (OSError, IndexError) as error:
            self._socket.close()
            raise OSError(f"no HAProxy answers at {address}: {error}") from error

    def num_requests(self) -> int:
        """Return how many requests wait or are being answered.

        Raises:
            OSError: it has ended.
        """
        rows = csv.DictReader(self._ask("show stat").lstrip("# \n").splitlines())
        return sum(int(row["scur"]) for row in rows if row["svname"] == "BACKEND")

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def _ask(self, command: str) -> str:
        self._socket.sendall(f"{command}\n".encode())
        answer = b""
        while not answer.endswith(_PROMPT):
            part = self._socket.recv(1 << 16)
            if not part:
                raise ConnectionResetError("hung up")
            answer += part
        return answer.removesuffix(_PROMPT).decode()


def _is_busy(pid: int, line: Line | None) -> bool:
    if not is_running(pid):
        return False
    try:
        return line is None or line.num_requests() > 0
    except OSError:
        return is_running(pid)


def _address_in(settings: Path) -> str:
    """Where a HAProxy of these settings is administrated; empty where it is not known."""
    with suppress(OSError):
        found = re.search(r"^\s+stats socket (\S+)", settings.read_text(), re.MULTILINE)
        return found[1] if found else ""
    return ""


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)

"""Starts the server process that runs Ray, controls it, and cleans up after it.

Ray's processes and HAProxy stay in the process group in which they were started, and some of them
exit as soon as they receive a signal. The server process therefore runs in a session of its own.
Ctrl-C does not reach that session, so open requests can be finished first. If Ray does not shut
down cleanly, its remaining processes are found by their session and killed.

This module does not import Ray.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from reir.errors import ReirError
from reir_serving.config import LiveSettings, ServeConfig
from reir_serving.ray.processes import of_session
from reir_serving.ray.server import FAILED, MESSAGE, MISSING_PACKAGE, READY

STDERR = 2
ENDED = "ended"
GRACE_S = 30.0
"""Seconds that Ray may take to shut down after the drain time has passed."""


class StatusMessage(NamedTuple):
    """A status message from the server process.

    Attributes:
        kind: one of the kinds in `server.py`, or `ENDED`, which every process sends last.
        text: content of the message; its meaning depends on `kind`.
    """

    kind: str
    text: str

    def message(self) -> str:
        """Return the message to show to the user.

        Raises:
            ReirError: the server could not start, or has exited.
            ModuleNotFoundError: the server needs a package that is not installed.
        """
        if self.kind == MESSAGE:
            return self.text
        if self.kind == MISSING_PACKAGE:
            raise ModuleNotFoundError(self.text)
        if self.kind == FAILED:
            raise ReirError(self.text)
        raise ReirError("the server process exited unexpectedly; see its output above")


def ready_address(status: StatusMessage) -> str:
    """Return the server's address from its first status message.

    Raises:
        ReirError, ModuleNotFoundError: see `StatusMessage.message`.
    """
    return status.text if status.kind == READY else status.message()


class ServerProcess:
    """A `reir_serving.ray.server` process in a session of its own.

    Leaving the context kills every process of that session that is still running.
    """

    def __init__(
        self, config: ServeConfig, folder: Path, on_status: Callable[[StatusMessage], None]
    ) -> None:
        """Start the server process.

        Args:
            config: settings to serve with.
            folder: folder that only this server uses; see `environment.server_folder`.
            on_status: called with each status message, from a background thread.
        """
        read_end, write_end = os.pipe()
        # With `-P`, Python does not import modules from the current folder.
        command = [sys.executable, "-P", "-m", "reir_serving.ray.server"]
        self._process = subprocess.Popen(
            [*command, str(folder), str(write_end)],
            stdin=subprocess.PIPE,
            stdout=STDERR,  # Ray prints errors to stdout, and our stdout may have to be JSON
            text=True,
            pass_fds=[write_end],
            start_new_session=True,
        )
        os.close(write_end)  # only the child writes; its exit then ends the pipe
        self._send(config.model_dump_json())
        threading.Thread(target=_read, args=(read_end, on_status), daemon=True).start()

    def reconfigure(self, live: LiveSettings) -> None:
        """Send new live settings to the server process."""
        self._send(live.model_dump_json())

    def stop(self, timeout_s: float) -> None:
        """Tell the server process to finish open requests and stop, and wait until it exits.

        Args:
            timeout_s: seconds that open requests may take.

        Raises:
            ReirError: the process did not exit in time, or exited with an error.
        """
        self._close_input()  # the end of its input tells the process to stop
        try:
            status = self._process.wait(timeout_s + GRACE_S)
        except subprocess.TimeoutExpired as error:
            raise ReirError(
                f"the server process did not exit within {timeout_s + GRACE_S:g} s and was killed"
            ) from error
        if status:
            raise ReirError(f"the server process exited with status {status}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        """Kill the processes of the session that are still running."""
        # `start_new_session` made the id of the process the id of its session.
        for pid in of_session(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._close_input()
        self._process.wait()

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the process has exited, as its last status message says
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def _close_input(self) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()


def _read(read_end: int, on_status: Callable[[StatusMessage], None]) -> None:
    """Read status messages until the server process exits."""
    with os.fdopen(read_end, encoding="utf-8") as lines:
        for line in lines:
            on_status(StatusMessage(*json.loads(line)))
    on_status(StatusMessage(ENDED, ""))

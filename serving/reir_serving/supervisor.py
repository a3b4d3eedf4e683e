"""Starts the server process that runs Ray, controls it, and cleans up after it.

Ray's processes and HAProxy stay in the process group in which they were started, and some of them
exit as soon as they receive a signal. The server process therefore runs in a session of its own:
Ctrl-C does not reach it, so open requests can be finished first. If Ray does not shut down cleanly,
its remaining processes are found by their session and killed.

Does not import Ray.
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
from reir_serving.processes import of_session
from reir_serving.server import MISSING, READY, REFUSED, SAID

STDERR = 2
ENDED = "ended"
GRACE_S = 30.0
"""Seconds that Ray may take to shut down after the drain time has passed."""


class Report(NamedTuple):
    """A status message from the server process.

    Attributes:
        kind: one of the kinds in `reir_serving.server`, or `ENDED`, which is always the last one.
        text: content of the message; its meaning depends on `kind`.
    """

    kind: str
    text: str

    @property
    def said(self) -> str:
        """The message to show to the user.

        Raises:
            ReirError: the server could not start, or has exited.
            ModuleNotFoundError: the server needs a package that is not installed.
        """
        if self.kind == SAID:
            return self.text
        if self.kind == MISSING:
            raise ModuleNotFoundError(self.text)
        if self.kind == REFUSED:
            raise ReirError(self.text)
        raise ReirError("the server process exited unexpectedly; see its output above")


def ready_address(report: Report) -> str:
    """Return the server's address from its first report.

    Raises:
        ReirError, ModuleNotFoundError: see `Report.said`.
    """
    return report.text if report.kind == READY else report.said


class Server:
    """A `reir_serving.server` process in a session of its own.

    Leaving the context kills every process of that session that is still running.
    """

    def __init__(self, config: ServeConfig, folder: Path, tell: Callable[[Report], None]) -> None:
        """Start the server process.

        Args:
            config: settings to serve with.
            folder: folder that only this server uses; see `environment.own_folder`.
            tell: called with each report, from a background thread.
        """
        report, told = os.pipe()
        command = [sys.executable, "-m", "reir_serving.server", str(folder), str(told)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=STDERR,  # Ray prints errors to stdout, and our stdout may have to be JSON
            text=True,
            pass_fds=[told],
            start_new_session=True,
        )
        os.close(told)
        self._order(config.model_dump_json())
        threading.Thread(target=_read, args=(report, tell), daemon=True).start()

    def change(self, live: LiveSettings) -> None:
        """Send new live settings to the server process."""
        self._order(live.model_dump_json())

    def stop(self, drain_s: float) -> None:
        """Tell the server process to finish open requests and stop, and wait until it exits.

        Args:
            drain_s: seconds that open requests may take.

        Raises:
            ReirError: the process did not exit in time, or exited with an error.
        """
        self._hang_up()
        try:
            status = self._process.wait(drain_s + GRACE_S)
        except subprocess.TimeoutExpired as error:
            raise ReirError(
                f"the server process did not exit within {drain_s + GRACE_S:g} s and was killed"
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
        for pid in of_session(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._hang_up()
        self._process.wait()

    def _order(self, line: str) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the process has exited, which its last report says
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def _hang_up(self) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()


def _read(report: int, tell: Callable[[Report], None]) -> None:
    with os.fdopen(report, encoding="utf-8") as lines:
        for line in lines:
            tell(Report(*json.loads(line)))
    tell(Report(ENDED, ""))

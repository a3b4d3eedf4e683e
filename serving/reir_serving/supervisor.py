"""Starts the process that holds Ray, tells it what to do, and clears away what it leaves.

Ray's processes and HAProxy stay in the process group that they are started in, and some of them end
at a signal at once. In a session of their own they hear nothing of Ctrl-C, so requests that are
under way can be answered first. Should Ray end in another way than it ought to, its processes are
known by that session.

Knows no Ray.
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
"""How long Ray may take to end when nothing is under way any more."""


class Report(NamedTuple):
    """What a server tells of itself.

    Attributes:
        kind: of `reir_serving.server`, or `ENDED`, which comes last.
        text: depends on the kind.
    """

    kind: str
    text: str

    @property
    def said(self) -> str:
        """A line for the user.

        Raises:
            ReirError: the server does not start, or has ended.
            ModuleNotFoundError: it needs a package that is not installed.
        """
        if self.kind == SAID:
            return self.text
        if self.kind == MISSING:
            raise ModuleNotFoundError(self.text)
        if self.kind == REFUSED:
            raise ReirError(self.text)
        raise ReirError("the process that serves has ended by itself; what it wrote is above")


def ready_address(report: Report) -> str:
    """Return the address that a server's first report names.

    Raises:
        ReirError, ModuleNotFoundError: as `Report.said`.
    """
    return report.text if report.kind == READY else report.said


class Server:
    """One `reir_serving.server` in a session of its own; a context manager that leaves nothing."""

    def __init__(self, config: ServeConfig, folder: Path, tell: Callable[[Report], None]) -> None:
        """Start to serve.

        Args:
            config: what.
            folder: of this server alone; see `environment.own_folder`.
            tell: gets all reports, in a thread.
        """
        report, told = os.pipe()
        command = [sys.executable, "-m", "reir_serving.server", str(folder), str(told)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=STDERR,  # where Ray prints what went wrong; ours may have to be JSON
            text=True,
            pass_fds=[told],
            start_new_session=True,
        )
        os.close(told)
        self._order(config.model_dump_json())
        threading.Thread(target=_read, args=(report, tell), daemon=True).start()

    def change(self, live: LiveSettings) -> None:
        """Have it take other live settings."""
        self._order(live.model_dump_json())

    def stop(self, drain_s: float) -> None:
        """Have it answer what is under way, and wait for its end.

        Raises:
            ReirError: it has not ended as it should.
        """
        self._hang_up()
        try:
            status = self._process.wait(drain_s + GRACE_S)
        except subprocess.TimeoutExpired as error:
            said = f"the process that serves has not ended within {drain_s + GRACE_S:g} s"
            raise ReirError(f"{said}; it was killed") from error
        if status:
            raise ReirError(f"the process that serves has ended with status {status}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        """End whatever of it is left."""
        for pid in of_session(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._hang_up()
        self._process.wait()

    def _order(self, line: str) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended; its report says so
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

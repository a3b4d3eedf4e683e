"""Finds running processes in `/proc`; on systems without `/proc`, it finds none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple


class ConfiguredProcess(NamedTuple):
    """A process that was started with a settings file, `-f FILE`.

    Attributes:
        program: name of its executable.
        settings: the settings file FILE.
    """

    program: str
    settings: Path


def of_session(session: int) -> list[int]:
    """Return the ids of all processes in a session."""
    return [pid for pid in _all() if _session_of(pid) == session]


def with_settings_in(folder: Path) -> dict[int, ConfiguredProcess]:
    """Return the processes whose settings file (`-f FILE`) lies in `folder`, by process id."""
    found = {}
    for pid in _all():
        words = _command_of(pid)
        for option, value in pairwise(words):
            if option == "-f" and Path(value).is_relative_to(folder):
                found[pid] = ConfiguredProcess(Path(words[0]).name, Path(value))
    return found


def is_running(pid: int) -> bool:
    """Return whether a process is running.

    A process that has exited, but was not reaped, does not count: its command line is empty.
    """
    return bool(_command_of(pid)[0])


def _all() -> Iterator[int]:
    try:
        names = os.listdir("/proc")
    except OSError:
        return
    yield from sorted(int(name) for name in names if name.isdecimal())


def _session_of(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:  # the process has exited in the meantime
        return -1


def _command_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return [""]

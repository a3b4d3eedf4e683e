"""Processes of this machine, as `/proc` has them; elsewhere there are none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple


class Reader(NamedTuple):
    """A process, and what it was told.

    Attributes:
        program: its name.
        settings: the file that it reads.
    """

    program: str
    settings: Path


def of_session(session: int) -> list[int]:
    """Return the process ids of a session."""
    return [pid for pid in _all() if _session_of(pid) == session]


def with_settings_in(folder: Path) -> dict[int, Reader]:
    """Return those that read a file of settings (`-f FILE`) from a folder, by process id."""
    found = {}
    for pid in _all():
        words = _command_of(pid)
        for option, value in pairwise(words):
            if option == "-f" and Path(value).is_relative_to(folder):
                found[pid] = Reader(Path(words[0]).name, Path(value))
    return found


def is_running(pid: int) -> bool:
    """Whether there is such a process, one that has ended and is not yet forgotten left out."""
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
    except OSError:  # it has ended meanwhile
        return -1


def _command_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return [""]

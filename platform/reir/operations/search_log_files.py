"""The files of the search log: their names, their lines, and the locks that protect both.

Several processes use them at the same time: each appends to files of its own, `remove_events`
rewrites files of all of them, and old files are deleted. Whoever changes a file holds the lock on
it, and then checks that it is still the file at its path.
"""

from __future__ import annotations

import json
import os
import re
import socket
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from reir.errors import DataError
from reir.store.embedded.locks import FileLock
from reir.store.names import check_name

Event = Mapping[str, Any]

_ALWAYS = ("time", "event", "request_id", "version", "tenant", "expression")
_KEYS = {
    "search": (*_ALWAYS, "k", "where", "presence", "found", "hits"),
    # Written by earlier releases; see `reir.operations.feedback`.
    "feedback": (*_ALWAYS, "verdict", "instance_id", "image_id", "uri", "box"),
}
_SUFFIX, _REWRITTEN = ".jsonl", ".tmp"
_DATED = re.compile(r"\d{4}-\d\d-\d\d-.+\.jsonl")


def path_of(folder: Path, gallery: str, day: str) -> Path:
    """Return the path of this process's file for a gallery and a day."""
    host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())
    return gallery_folder(folder, gallery) / f"{day}-{host}-{os.getpid()}{_SUFFIX}"


def files_of(folder: Path, gallery: str) -> list[Path]:
    """Return the files of a gallery, ordered by date, even if only a part of one is left."""
    place = gallery_folder(folder, gallery)
    try:
        found = [_without_ending(path) for path in place.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(place, error) from error
    return sorted({path for path in found if _DATED.fullmatch(path.name)})


def delete_files_before(folder: Path, day: str) -> None:
    """Delete the files of earlier days, of all galleries."""
    for path in {_without_ending(found) for found in folder.glob(f"*/*{_SUFFIX}*")}:
        if not _DATED.fullmatch(path.name) or path.name[:10] >= day:
            continue
        # A file that is locked is being rewritten, which would bring it back.
        with suppress(OSError), FileLock(path) as lock:
            if lock.acquire():
                path.with_name(path.name + _REWRITTEN).unlink(missing_ok=True)
                path.unlink()


def _without_ending(path: Path) -> Path:
    """Return the path of a file of the log for itself, or for what `_rewrite` left of it."""
    return path.with_name(path.name.removesuffix(_REWRITTEN))


class LogFile:
    """A file that one process appends to. It stays open from one event to the next."""

    def __init__(self, path: Path) -> None:
        """Append to the file at `path`, which is created for the first line."""
        self.path = path
        self._lock: FileLock | None = None
        self._file = -1

    def append(self, line: bytes) -> None:
        """Append a whole line, or nothing.

        Raises:
            OSError: the line was not written.
        """
        with self._locked():
            size = os.fstat(self._file).st_size
            try:
                written = 0
                while written < len(line):
                    written += os.write(self._file, line[written:])
            except OSError:
                # A full disk may have had room for a part of it.
                os.ftruncate(self._file, size)
                raise

    def close(self) -> None:
        """Close the file; the next line opens it again."""
        if self._file >= 0:
            os.close(self._file)
        if self._lock is not None:
            self._lock.close()
        self._lock, self._file = None, -1

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock on the file that is at the path now."""
        while True:
            if self._lock is None:
                # Not its parents: without the folder of the log, nothing may be written.
                self.path.parent.mkdir(mode=0o700, exist_ok=True)
                self._lock = FileLock(self.path)
            self._lock.acquire(timeout_s=None)
            if self._lock.is_current:
                break
            self.close()  # `remove_events` has put another file in its place
        try:
            if self._file < 0:
                self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
                self._remove_partial_line()
            yield
        finally:
            if self._lock is not None:
                self._lock.release()

    def _remove_partial_line(self) -> None:
        # Of a process with the same id that was killed; a container starts with the same ids again.
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.ftruncate(self._file, self.path.read_bytes().rfind(b"\n") + 1)


def events_in(path: Path) -> Iterator[dict[str, Any]]:
    """Read the events of a file. A last line that is not complete is left out.

    Raises:
        DataError: the file cannot be read, or a line is damaged.
    """
    try:
        with path.open("rb") as file:
            for _, event in _parsed_lines(path, file):
                yield event
    except FileNotFoundError:
        return  # it was deleted after it was found, because it was old
    except OSError as error:
        raise _unreadable(path, error) from error


def remove_from(path: Path, matches: Callable[[Event], bool]) -> int:
    """Replace a file by one without the events that match; return how many these are.

    Raises:
        DataError: a line is damaged; the file stays as it was.
        OSError: the file cannot be replaced.
    """
    while True:
        with FileLock(path) as lock:
            lock.acquire(timeout_s=None)
            if lock.is_current:
                return _rewrite(path, matches)


def _rewrite(path: Path, matches: Callable[[Event], bool]) -> int:
    """Remove events from a file that this process has locked."""
    rewritten = path.with_name(path.name + _REWRITTEN)
    removed = 0
    try:
        with path.open("rb") as old, rewritten.open("wb") as new:
            before = os.fstat(old.fileno())
            os.fchmod(new.fileno(), stat.S_IMODE(before.st_mode))
            # Its process must still be able to write to it if somebody else removes events.
            os.fchown(new.fileno(), before.st_uid, before.st_gid)
            for line, event in _parsed_lines(path, old):
                is_match = matches(event)
                removed += is_match
                if not is_match:
                    new.write(line)
            new.flush()
            os.fsync(new.fileno())
            left_bytes = new.tell()
        if left_bytes == 0:
            path.unlink()
        elif left_bytes < before.st_size:  # a partial line, too, may be about what was removed
            os.replace(rewritten, path)
        sync(path.parent)
    finally:
        rewritten.unlink(missing_ok=True)
    return removed


def _parsed_lines(path: Path, lines: Iterable[bytes]) -> Iterator[tuple[bytes, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            return
        try:
            event = _parse(line)
        except ValueError as error:
            raise DataError(
                f"{path}, line {number}: {error}; the file is damaged: remove this line, or delete "
                f"the file"
            ) from error
        yield line, event


def _parse(line: bytes) -> dict[str, Any]:
    event = json.loads(line)
    if not isinstance(event, dict):
        raise ValueError(f"an event must be a JSON object, got {line[:60]!r}")
    kind = event.get("event")
    if kind not in [*_KEYS]:
        raise ValueError(f"'event' must be one of {', '.join(_KEYS)}, got {kind!r}")
    if missing := [key for key in _KEYS[kind] if key not in event]:
        raise ValueError(f"the event lacks '{missing[0]}'")
    if not isinstance(event["time"], str) or not isinstance(event["expression"], str):
        raise ValueError("'time' and 'expression' must be texts")
    if kind == "feedback" and (event["box"] is None) != (event["verdict"] == "absent"):
        raise ValueError(f"the verdict {event['verdict']!r} does not go with box {event['box']}")
    return event


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot read the search log {path}: {error.strerror}; name a folder that `reir serve "
        f"--search-log` writes, and read it as the user who runs that command"
    )


def gallery_folder(folder: Path, gallery: str) -> Path:
    """Return the folder of a gallery.

    Raises:
        ConfigError: the name is not allowed.
    """
    return folder / check_name("gallery", gallery)


def sync(folder: Path) -> None:
    """Have the disk remember that files of a folder were replaced or deleted."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

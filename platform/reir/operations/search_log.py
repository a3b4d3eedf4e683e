"""The search log: what users searched for, what they found, and what they said about it.

    FOLDER/GALLERY/2026-11-24-HOST-PID.jsonl     one JSON object in each line, in order of time

Each process appends to files of its own, one for each gallery and day (UTC), so processes wait for
each other only while `remove_events` rewrites a file. Canaries are made from these events
(`reir.operations.canary_make`). Expressions are personal data: nobody but the owner of the files
can read them, and files are deleted after some days. Knows neither HTTP nor Ray.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reir.config import reir_home
from reir.errors import DataError
from reir.store.embedded.locks import FileLock
from reir.store.names import check_name

if TYPE_CHECKING:
    from reir.records import Box
    from reir.results import SearchResult
    from reir.store.contract import InstanceRow

Event = Mapping[str, Any]
Verdict = Literal["right", "wrong", "absent"]

KEEP_DAYS = 30
NUM_HITS = 3
"""Number of first hits that the event of a search contains."""

MAX_WAITING = 10_000
"""Maximum number of events that wait to be written; further ones are dropped."""

MAX_OPEN = 64
"""Maximum number of files that a process keeps open, one for each gallery."""

_ALWAYS = ("time", "event", "request_id", "version", "tenant", "expression")
_KEYS = {
    "search": (*_ALWAYS, "k", "where", "presence", "found", "hits"),
    "feedback": (*_ALWAYS, "verdict", "instance_id", "image_id", "uri", "box"),
}
_SUFFIX, _REWRITTEN = ".jsonl", ".tmp"
_DATED = re.compile(r"\d{4}-\d\d-\d\d-.+\.jsonl")

logger = logging.getLogger(__name__)


def default_folder() -> Path:
    """Return the folder in which commands look for the search log: `$REIR_HOME/searches`."""
    return reir_home() / "searches"


def search_event(
    result: SearchResult, *, request_id: str, tenant: str, k: int, where: str | None
) -> Event:
    """Return the event of a search.

    Args:
        result: the answer, whose expression is logged as the user wrote it.
        request_id: id of the request.
        tenant: tenant of the user's key; empty if there is none.
        k, where: maximum number of hits, and the filter, as the user gave them.
    """
    return {
        **_head("search", request_id, result.version, tenant, result.expression),
        "k": k,
        "where": where,
        "presence": result.presence,
        "found": result.found,
        "hits": [
            {
                "instance_id": hit.instance_id,
                "image_id": hit.image_id,
                "uri": hit.uri,
                "box": _rounded(hit.box),
                "score": hit.score,
                "presence": hit.presence,
            }
            for hit in result.hits[:NUM_HITS]
        ],
    }


def feedback_event(  # noqa: PLR0913, each is a part of the event
    verdict: Verdict,
    expression: str,
    instance: InstanceRow | None,
    *,
    request_id: str,
    version: str,
    tenant: str,
) -> Event:
    """Return the event of a user's verdict.

    Args:
        verdict: "right" or "wrong" about an instance, or "absent" about the whole gallery.
        expression: what the user searched for.
        instance: the instance; None for "absent".
        request_id: id of the request.
        version: version of the gallery that the user searched.
        tenant: tenant of the user's key; empty if there is none.
    """
    return {
        **_head("feedback", request_id, version, tenant, expression),
        "verdict": verdict,
        "instance_id": instance.instance_id if instance else "",
        "image_id": instance.image_id if instance else "",
        "uri": instance.uri if instance else "",
        "box": _rounded(instance.box) if instance else None,
    }


class SearchLog:
    """Appends events to the files of this process, in a thread of its own.

    A failure to write never reaches a user: the event is dropped, which is counted, and the first
    drop of a series is logged as a warning.
    """

    def __init__(
        self,
        folder: Path,
        keep_days: int = KEEP_DAYS,
        *,
        on_drop: Callable[[], None] = lambda: None,
    ) -> None:
        """Create the folder if it is missing.

        Args:
            folder: folder of the log. If it disappears later, for example because a disk was
                unmounted, it is not created again.
            keep_days: files of earlier days are deleted when this process opens another file.
            on_drop: called for each event that is dropped, in any thread.
        """
        self.folder, self.keep_days = folder, keep_days
        self._on_drop = on_drop
        self._files: dict[str, _LogFile] = {}  # by gallery; only the writer uses it
        self._cleaned = ""  # the day on which old files were last deleted
        self._is_dropping = False
        self._room = threading.BoundedSemaphore(MAX_WAITING)
        # One thread, so that events are written in the order in which they were given.
        self._writer = ThreadPoolExecutor(1, "reir-search-log")
        self._writer.submit(self._start)

    def append(self, gallery: str, event: Event) -> Future[bool]:
        """Write an event soon; returns at once.

        Returns:
            A future that says whether the event was written, or was dropped.
        """
        if self._room.acquire(blocking=False):
            return self._writer.submit(self._write, gallery, event)
        self._drop(f"{MAX_WAITING} events are waiting to be written")
        dropped: Future[bool] = Future()
        dropped.set_result(False)
        return dropped

    def close(self) -> None:
        """Write the events that are waiting, and close all files."""
        self._writer.submit(self._close_files)
        self._writer.shutdown()

    def _start(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._delete_old_files(datetime.now(UTC).date().isoformat())
        except OSError as error:
            logger.warning("the folder of the search log cannot be used: %s", error)

    def _write(self, gallery: str, event: Event) -> bool:
        try:
            line = json.dumps(event, separators=(",", ":")).encode("ascii")
            self._file(gallery, event["time"][:10]).append(line + b"\n")
        except OSError as error:
            self._close_file(gallery)
            self._drop(str(error))
            return False
        finally:
            self._room.release()
        self._is_dropping = False
        return True

    def _file(self, gallery: str, day: str) -> _LogFile:
        name = f"{day}-{_host()}-{os.getpid()}{_SUFFIX}"
        path = _gallery_folder(self.folder, gallery) / name
        known = self._files.get(gallery)
        if known is not None and known.path == path:
            return known
        self._close_file(gallery)
        if len(self._files) >= MAX_OPEN:
            self._close_file(next(iter(self._files)))
        self._delete_old_files(day)
        self._files[gallery] = _LogFile(path)
        return self._files[gallery]

    def _delete_old_files(self, today: str) -> None:
        if self._cleaned != today:
            first = date.fromisoformat(today) - timedelta(days=self.keep_days)
            _delete_files_before(self.folder, first.isoformat())
            self._cleaned = today

    def _close_file(self, gallery: str) -> None:
        if gallery in self._files:
            self._files.pop(gallery).close()

    def _close_files(self) -> None:
        for gallery in [*self._files]:
            self._close_file(gallery)

    def _drop(self, reason: str) -> None:
        self._on_drop()
        if not self._is_dropping:
            self._is_dropping = True
            logger.warning(
                "searches and feedback are not logged in %s: %s; searches work, and the log "
                "continues as soon as it can be written",
                self.folder,
                reason,
            )


class _LogFile:
    """A file that one process appends to. It stays open from one event to the next."""

    def __init__(self, path: Path) -> None:
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


def read_events(folder: Path, gallery: str) -> Iterator[dict[str, Any]]:
    """Read the events of a gallery, file by file, each in the order in which it was written.

    A last line that is not complete is left out: its process was killed, or is still writing it.

    Raises:
        DataError: a file cannot be read, or a line is damaged; the message names it.
    """
    for path in _files_of(folder, gallery):
        try:
            with path.open("rb") as file:
                for _, event in _parsed_lines(path, file):
                    yield event
        except FileNotFoundError:
            continue  # it was deleted in the meantime, because it was old
        except OSError as error:
            raise _unreadable(path, error) from error


def remove_events(folder: Path, gallery: str, matches: Callable[[Event], bool]) -> int:
    """Remove events from the log of a gallery, also while servers write to it.

    Each file is replaced at once by one without these events, or deleted if none are left.

    Returns:
        How many events were removed.

    Raises:
        DataError: a line is damaged, so it cannot be told whether it should be removed; its file
            stays as it was. The message names the line.
        OSError: a file cannot be replaced.
    """
    return sum(_remove_from(path, matches) for path in _files_of(folder, gallery))


def _remove_from(path: Path, matches: Callable[[Event], bool]) -> int:
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
        _sync(path.parent)
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


def _files_of(folder: Path, gallery: str) -> list[Path]:
    """Return the files of a gallery, ordered by date, even if only a part of one is left."""
    place = _gallery_folder(folder, gallery)
    try:
        found = [_without_ending(path) for path in place.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(place, error) from error
    return sorted({path for path in found if _DATED.fullmatch(path.name)})


def _delete_files_before(folder: Path, day: str) -> None:
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


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot read the search log {path}: {error.strerror}; name a folder that `reir serve "
        f"--search-log` writes, and read it as the user who runs that command"
    )


def _gallery_folder(folder: Path, gallery: str) -> Path:
    return folder / check_name("gallery", gallery)


def _head(
    event: str, request_id: str, version: str, tenant: str, expression: str
) -> dict[str, Any]:
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "event": event,
        "request_id": request_id,
        "version": version,
        "tenant": tenant,
        "expression": expression,
    }


def _rounded(box: Box) -> list[float]:
    return [round(side, 4) for side in box]


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())


def _sync(folder: Path) -> None:
    """Have the disk remember that files of a folder were replaced or deleted."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

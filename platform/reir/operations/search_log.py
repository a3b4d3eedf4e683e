"""The search log: what users searched for, and what they found.

    FOLDER/GALLERY/2026-11-24-HOST-PID.jsonl     one JSON object in each line, in order of time

Each process appends to files of its own, one for each gallery and day (UTC), so processes wait for
each other only while `remove_events` rewrites a file. A search is logged after its answer, and the
event is dropped if it cannot be written. What users say about searches may not be lost, so
`reir.operations.feedback` keeps it in a database beside these files. Expressions are personal data:
nobody but the owner of the files can read them, and both files and feedback are deleted after some
days. Knows neither HTTP nor Ray.
"""

from __future__ import annotations

import atexit
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reir.config import reir_home
from reir.errors import DataError
from reir.operations.feedback import delete_feedback_before
from reir.operations.search_log_files import Event as Event
from reir.operations.search_log_files import (
    LogFile,
    delete_files_before,
    events_in,
    files_of,
    path_of,
    remove_from,
)

if TYPE_CHECKING:
    from reir.records import Box
    from reir.results import SearchResult

KEEP_DAYS = 30
NUM_HITS = 3
"""Number of first hits that the event of a search contains."""

MAX_WAITING = 10_000
"""Maximum number of events that wait to be written; further ones are dropped."""

MAX_OPEN = 64
"""Maximum number of files that a process keeps open, one for each gallery."""

logger = logging.getLogger(__name__)


def default_folder() -> Path:
    """Return the folder in which commands look for the search log: `$REIR_HOME/searches`."""
    return reir_home() / "searches"


def search_event(
    result: SearchResult, *, request_id: str, tenant: str, k: int, where: str | None
) -> Event:
    """Return the event of a search, to which the log adds the time.

    Args:
        result: the answer, whose expression is logged as the user wrote it.
        request_id: id of the request.
        tenant: tenant of the user's key; empty if there is none.
        k, where: maximum number of hits, and the filter, as the user gave them.
    """
    return {
        "event": "search",
        "request_id": request_id,
        "version": result.version,
        "tenant": tenant,
        "expression": result.expression,
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


@dataclass(frozen=True)
class _Entry:
    """An event that waits to be written.

    Attributes:
        gallery: its gallery.
        time_s: Unix time at which it happened.
        make_event: returns the event, without the time.
        written: receives whether it was written.
    """

    gallery: str
    time_s: float
    make_event: Callable[[], Event]
    written: Future[bool] = field(default_factory=Future)


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
            keep_days: files and feedback of earlier days are deleted when this process opens
                another file.
            on_drop: called for each event that is dropped, in any thread.
        """
        self.folder, self.keep_days = folder, keep_days
        self._on_drop = on_drop
        self._files: dict[str, LogFile] = {}  # by gallery; only the writer uses it
        self._cleaned = ""  # the day on which old files were last deleted
        self._is_dropping, self._is_closed = False, False
        self._waiting: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        # Held to queue an event, and to close the log: nothing may be queued behind the end.
        self._closing = threading.Lock()
        self._writer = threading.Thread(target=self._run, name="reir-search-log", daemon=True)
        self._writer.start()
        atexit.register(self.close)  # which a daemon thread would not wait for

    def append(self, gallery: str, make_event: Callable[[], Event]) -> Future[bool]:
        """Write an event soon; the future says whether it was written or dropped.

        `make_event` is called in the thread of the log, to save time.
        """
        entry = _Entry(gallery, time.time(), make_event)
        self._put(entry)
        return entry.written

    def close(self) -> None:
        """Write the events that are waiting, and close all files; later ones are dropped."""
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
            self._waiting.put(None)
        self._writer.join()
        atexit.unregister(self.close)

    def _put(self, entry: _Entry) -> None:
        with self._closing:
            is_full = self._waiting.qsize() >= MAX_WAITING
            if not self._is_closed and not is_full:
                self._waiting.put(entry)
                return
            is_closed = self._is_closed
        if is_closed:
            self._drop(entry, "the log is closed")
        else:
            self._drop(entry, f"{MAX_WAITING} events are waiting to be written")

    def _run(self) -> None:
        """Write all events, in the order in which they were given."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._delete_old(datetime.now(UTC).date().isoformat())
        except OSError as error:
            logger.warning("the folder of the search log cannot be used: %s", error)
        # Here and below, the thread must survive, or nothing would be logged until the process
        # restarts.
        except Exception:
            logger.exception("a bug prevents that old searches are deleted")
        for entry in iter(self._waiting.get, None):
            try:
                self._write(entry)
            except OSError as error:
                # The next event opens the file anew, since the folder may be another one by then.
                self._close_file(entry.gallery)
                self._drop(entry, str(error))
            except Exception:
                logger.exception("a bug prevents that an event is logged")
                self._drop(entry, "a bug")
        for gallery in [*self._files]:
            self._close_file(gallery)

    def _write(self, entry: _Entry) -> None:
        # The time of the search and not of writing, which may be later, even on another day.
        stamp = datetime.fromtimestamp(entry.time_s, UTC).isoformat(timespec="milliseconds")
        event = {"time": stamp, **entry.make_event()}
        # JSON escapes the rest, also a lone surrogate of an expression, which UTF-8 cannot encode.
        line = json.dumps(event, separators=(",", ":")).encode("ascii")
        self._file(entry.gallery, event["time"][:10]).append(line + b"\n")
        self._is_dropping = False
        entry.written.set_result(True)

    def _file(self, gallery: str, day: str) -> LogFile:
        path = path_of(self.folder, gallery, day)
        known = self._files.get(gallery)
        if known is not None and known.path == path:
            return known
        self._close_file(gallery)
        if len(self._files) >= MAX_OPEN:
            # The one that was opened first: dictionaries keep the order of insertion.
            self._close_file(next(iter(self._files)))
        self._delete_old(day)
        self._files[gallery] = LogFile(path)
        return self._files[gallery]

    def _delete_old(self, today: str) -> None:
        """Delete files and feedback of days that are no longer kept, once a day."""
        if self._cleaned == today:
            return
        first = (date.fromisoformat(today) - timedelta(days=self.keep_days)).isoformat()
        delete_files_before(self.folder, first)
        try:
            delete_feedback_before(self.folder, first)
        except DataError as error:
            logger.warning("old feedback is deleted later: %s", error)
        self._cleaned = today

    def _close_file(self, gallery: str) -> None:
        if gallery in self._files:
            self._files.pop(gallery).close()

    def _drop(self, entry: _Entry, reason: str) -> None:
        self._on_drop()
        if not self._is_dropping:
            self._is_dropping = True
            logger.warning(
                "searches are not logged in %s: %s; searches work, and the log continues as soon "
                "as it can be written",
                self.folder,
                reason,
            )
        entry.written.set_result(False)


def read_events(folder: Path, gallery: str) -> Iterator[dict[str, Any]]:
    """Read the events of a gallery, file by file, each in the order in which it was written.

    A last line that is not complete is left out: its process was killed, or is still writing it.

    Raises:
        DataError: a file cannot be read, or a line is damaged; the message names it.
    """
    for path in files_of(folder, gallery):
        yield from events_in(path)


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
    return sum(remove_from(path, matches) for path in files_of(folder, gallery))


def _rounded(box: Box) -> list[float]:
    return [round(side, 4) for side in box]

"""Stores feedback durably and exactly once, in one SQLite file for each gallery.

    FOLDER/GALLERY/feedback.sqlite3     in the folder of the search log

Several replicas write at the same time, also on several machines that share a volume, and a
request may be repeated at another replica. So a unique constraint decides whether feedback is new,
and not the memory of a process. The journal is SQLite's rollback journal and not its write-ahead
log, whose index in shared memory works on one machine only (https://sqlite.org/wal.html). A commit
returns once everything is on disk. Each call opens the file and closes it again, so that the file
can be deleted, and the volume unmounted, while a server runs.

Earlier releases wrote feedback into the search log, where it stays until it is too old; it is read
from there as well.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from reir.errors import DataError, KeyReused
from reir.operations.feedback.records import Feedback, Submission
from reir.operations.search_log_files import events_in, files_of, gallery_folder, sync

NAME = "feedback.sqlite3"
BUSY_TIMEOUT_S = 10.0
"""How long to wait for other processes that use the file."""

_COLUMNS = (
    *("time", "request_id", "version", "tenant", "user", "expression", "verdict"),
    *("image_id", "instance_id", "uri", "box"),
)
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS feedback (
    id INTEGER PRIMARY KEY,
    {" TEXT NOT NULL, ".join(_COLUMNS[:-1])} TEXT NOT NULL,
    box TEXT,
    key TEXT NOT NULL,
    content TEXT NOT NULL,
    UNIQUE (user, key)
)"""
_INSERT = f"""
INSERT INTO feedback ({", ".join(_COLUMNS)}, key, content)
VALUES ({", ".join("?" * (len(_COLUMNS) + 2))})
ON CONFLICT (user, key) DO NOTHING"""


def add_feedback(folder: Path, gallery: str, said: Feedback, sent: Submission) -> bool:
    """Record feedback unless it was recorded before; afterwards it is on disk.

    Args:
        folder: folder of the search log, which must exist.
        gallery: name of the gallery.
        said: the feedback.
        sent: its submission; a repeated one changes nothing.

    Returns:
        Whether it is new.

    Raises:
        KeyReused: the user has sent other feedback with this key.
        OSError: the folder is missing.
        DataError: the file cannot be written or is damaged; nothing was recorded.
    """
    path = _path(folder, gallery)
    if not path.parent.exists():
        # Not its parents: without the folder of the log, nothing may be written.
        path.parent.mkdir(mode=0o700, exist_ok=True)
        sync(folder)
    with _transaction(path, create=True) as database:
        added = database.execute(_INSERT, (*_row(said), sent.key, sent.content)).rowcount == 1
        if not added:
            _check_same(database, said.user, sent)
    return added


def is_recorded(folder: Path, gallery: str, user: str, sent: Submission) -> bool:
    """Return whether a submission was recorded before.

    Raises:
        KeyReused: the user has sent other feedback with this key.
        DataError: the file cannot be read or is damaged.
    """
    path = _path(folder, gallery)
    if not path.exists():
        return False
    with _transaction(path) as database:
        return _check_same(database, user, sent)


def read_feedback(folder: Path, gallery: str) -> list[Feedback]:
    """Return all feedback about a gallery, in the order of time.

    Raises:
        DataError: a file cannot be read or is damaged; the message names it.
    """
    logged = (event for path in files_of(folder, gallery) for event in events_in(path))
    found = [_of_event(event) for event in logged if event["event"] == "feedback"]
    if (path := _path(folder, gallery)).exists():
        with _transaction(path) as database:
            found += [_of_row(row) for row in _rows(database)]
    return sorted(found, key=lambda each: each.time)


def require_feedback(folder: Path, gallery: str) -> list[Feedback]:
    """Return all feedback about a gallery, of which there must be some; see `read_feedback`.

    Raises:
        DataError: there is none, or a file cannot be read or is damaged.
    """
    found = read_feedback(folder, gallery)
    if not found:
        raise DataError(
            f"{folder} has no feedback about gallery '{gallery}'; `reir feedback`, the search page "
            f"and POST /v1/feedback give it"
        )
    return found


def remove_feedback(folder: Path, gallery: str, matches: Callable[[Feedback], bool]) -> int:
    """Remove feedback, and overwrite it on disk; return how many there was.

    Feedback of earlier releases is removed by `remove_events` of the search log.

    Raises:
        DataError: the file cannot be changed or is damaged; it stays as it was.
    """
    path = _path(folder, gallery)
    if not path.exists():
        return 0
    with _transaction(path) as database:
        gone = [(row[-1],) for row in _rows(database) if matches(_of_row(row))]
        database.executemany("DELETE FROM feedback WHERE id = ?", gone)
    return len(gone)


def withdraw_feedback(folder: Path, gallery: str, user: str, prefix: str) -> int:
    """Remove what a user has said by mistake, as `remove_feedback` does; return how much it was.

    Args:
        folder: folder of the search log.
        gallery: name of the gallery.
        user: see `Feedback.user`.
        prefix: the idempotency keys of the feedback begin with it.

    Raises:
        DataError: the file cannot be changed or is damaged; it stays as it was.
    """
    path = _path(folder, gallery)
    if not path.exists():
        return 0
    with _transaction(path) as database:
        # Not LIKE, for which "%" and "_" have a meaning, and capitals none.
        query = "DELETE FROM feedback WHERE user = ? AND substr(key, 1, ?) = ?"
        return database.execute(query, (user, len(prefix), prefix)).rowcount


def delete_feedback_before(folder: Path, day: str) -> None:
    """Delete the feedback of earlier days, of all galleries.

    Args:
        folder: folder of the search log.
        day: ISO date (UTC).

    Raises:
        DataError: files cannot be changed or are damaged; the message names them, and the feedback
            in all others was deleted.
    """
    failed: list[str] = []
    for path in sorted(folder.glob(f"*/{NAME}")):
        # One damaged file must not keep personal data of the other galleries.
        try:
            with _transaction(path) as database:
                database.execute("DELETE FROM feedback WHERE time < ?", (day,))
        except DataError as error:
            failed.append(str(error))
    if failed:
        raise DataError("; ".join(failed))


def _path(folder: Path, gallery: str) -> Path:
    return gallery_folder(folder, gallery) / NAME


@contextmanager
def _transaction(path: Path, *, create: bool = False) -> Iterator[sqlite3.Connection]:
    """Hold the lock on a file during a block, and write all of its changes or none.

    Raises:
        DataError: the file cannot be used.
    """
    address = f"{path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}"
    try:
        with closing(_connect(address)) as database:
            # "IMMEDIATE" takes the lock before anything is read, so that nobody else can write
            # between the check of a key and the commit.
            database.execute("BEGIN IMMEDIATE")
            # Also where the file exists: whoever created it may have been killed before this.
            database.execute(_SCHEMA)
            yield database
            database.execute("COMMIT")
    except sqlite3.Error as error:
        raise DataError(
            f"cannot use the feedback in {path}: {error}; check that the disk has space and that "
            f"this user may write there. If the file is damaged, move it away or restore it"
        ) from error


def _connect(address: str) -> sqlite3.Connection:
    database = sqlite3.connect(address, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None)
    # "EXTRA" also has the disk remember that the journal is gone, which is what commits.
    database.execute("PRAGMA synchronous = EXTRA")
    # What is deleted is overwritten with zeros, because it may be about an erased photo.
    database.execute("PRAGMA secure_delete = ON")
    return database


def _check_same(database: sqlite3.Connection, user: str, sent: Submission) -> bool:
    """Return whether a submission is in the file."""
    known = database.execute(
        "SELECT content FROM feedback WHERE user = ? AND key = ?", (user, sent.key)
    ).fetchone()
    if known is not None and known[0] != sent.content:
        raise KeyReused(
            "idempotency_key",
            f"{sent.key!r} was used for other feedback; send each feedback with a key of its own",
        )
    return known is not None


def _rows(database: sqlite3.Connection) -> list[tuple[Any, ...]]:
    """Return all rows, in the order in which they were written, each with its id at the end."""
    columns = ", ".join(_COLUMNS)
    return database.execute(f"SELECT {columns}, id FROM feedback ORDER BY id").fetchall()


def _row(said: Feedback) -> tuple[str | None, ...]:
    box = None if said.box is None else json.dumps(said.box)
    stamp = said.time.isoformat(timespec="milliseconds")
    return (stamp, *(getattr(said, name) for name in _COLUMNS[1:-1]), box)


def _of_row(row: tuple[Any, ...]) -> Feedback:
    values = dict(zip(_COLUMNS, row, strict=False))
    return _of_values({**values, "box": json.loads(row[-2]) if row[-2] else None})


def _of_event(event: dict[str, Any]) -> Feedback:
    """Return the feedback of an event in the search log; such events name no user."""
    return _of_values({name: event.get(name, "") for name in _COLUMNS})


def _of_values(values: dict[str, Any]) -> Feedback:
    box = values["box"]
    time = datetime.fromisoformat(values["time"])
    return Feedback(**{**values, "time": time, "box": tuple(box) if box else None})

"""The process that serves one embedded store: Milvus Lite on 127.0.0.1, on a free port.

Started by `reir.store.lite_server` as `python -m reir.store.lite_child DIRECTORY`. Two locks in the
directory control its lifetime. It holds `server.lock` as long as it runs, so there is never a
second one. Every client holds a shared lock on `clients.lock`; once no client has held one for a
while, the process ends.

If the directory is moved away, or deleted and created again, its path has another `server.lock` or
none. The process then ends at once, and touches nothing that its successor has written there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

from reir.store.locks import FileLock

RECORD = "server.json"
SERVER_LOCK = "server.lock"
CLIENTS_LOCK = "clients.lock"
DATA = "milvus"

_WAIT_FOR_PREDECESSOR_S = 5.0
_POLL_S = 0.25
_LOST_RECORD_S = 1.0

logger = logging.getLogger(__name__)


def serve(directory: Path, idle_s: float) -> int:
    """Serve the store in `directory` until no client has held it open for `idle_s` seconds.

    Returns:
        0, or 1 when another process serves this directory already.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with FileLock(directory / SERVER_LOCK) as lock, FileLock(directory / CLIENTS_LOCK) as clients:
        if not lock.acquire(timeout_s=_WAIT_FOR_PREDECESSOR_S):
            logger.error("another process serves %s", directory)
            return 1
        (directory / RECORD).unlink(missing_ok=True)  # left by a server that was killed
        _serve_until_idle(directory, lock, clients, stop, idle_s)
    return 0


def _serve_until_idle(
    directory: Path, lock: FileLock, clients: FileLock, stop: threading.Event, idle_s: float
) -> None:
    from milvus_lite.adapter.grpc.server import start_server_in_thread

    from reir.store.lite_files import guard

    guard()
    # One worker: Milvus Lite does not guard a collection against two writers at a time.
    server, database, port = start_server_in_thread(
        str(directory / DATA), host="127.0.0.1", port=0, max_workers=1
    )
    record = Record(directory / RECORD, port)
    record.keep()
    logger.info("serving %s on 127.0.0.1:%d", directory, port)
    try:
        _wait_until_idle(record, lock, clients, stop, idle_s)
    finally:
        record.remove()
        server.stop(grace=5).wait()
        if lock.is_current:
            database.close()
        logger.info("stopped serving %s", directory)


class Record:
    """The file in which clients find the address of this process."""

    def __init__(self, path: Path, port: int) -> None:
        """Prepare the record; nothing is written before `keep`."""
        self._path = path
        self._text = json.dumps({"pid": os.getpid(), "port": port, "started": time.time_ns()})

    @property
    def is_there(self) -> bool:
        """Whether the file is there as this process wrote it."""
        try:
            return self._path.read_text() == self._text
        except OSError:
            return False

    def keep(self) -> None:
        """Write the file unless it is there; that of an earlier process is replaced."""
        if not self.is_there:
            write_atomically(self._path, self._text)

    def remove(self) -> None:
        """Delete the file, unless another process wrote it."""
        if self.is_there:
            self._path.unlink(missing_ok=True)


def _wait_until_idle(
    record: Record, lock: FileLock, clients: FileLock, stop: threading.Event, idle_s: float
) -> None:
    """Return, with an exclusive lock on `clients`, when no client has used the store for `idle_s`.

    Return at once, without that lock, if `stop` is set or if the directory is no longer the one
    that is served. A record that is deleted or overwritten is restored, but only after a moment:
    the whole directory may be on the way to being deleted.
    """
    idle_for_s = lost_for_s = 0.0
    while lock.is_current:
        lost_for_s = 0.0 if record.is_there else lost_for_s + _POLL_S
        if lost_for_s >= _LOST_RECORD_S:
            with contextlib.suppress(
                OSError
            ):  # the disk is full, or the directory was just deleted
                record.keep()
        if stop.wait(_POLL_S):
            return
        if not clients.acquire():
            idle_for_s = 0.0
            continue
        if idle_for_s >= idle_s:
            return
        clients.release()
        idle_for_s += _POLL_S


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new text, never a part of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def main(arguments: list[str] | None = None) -> int:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(description="Serve an embedded store on 127.0.0.1.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--idle-s", type=float, required=True)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    return serve(options.directory, options.idle_s)


if __name__ == "__main__":
    sys.exit(main())

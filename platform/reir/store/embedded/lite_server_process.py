"""The process that serves one embedded store: Milvus Lite on 127.0.0.1, on a free port.

`lite_server.py` starts it as `python -m reir.store.embedded.lite_server_process DIRECTORY`. Two
locks in the directory control its lifetime. It holds `server.lock` as long as it runs, so there is
never a second one. Every client holds a shared lock on `clients.lock`; once no client has held one
for a while, the process ends.

If the directory is moved, or deleted and created again, the lock that this process holds is no
longer on the `server.lock` at that path. The process then ends at once, and does not touch files of
a process that serves the new directory.
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

from reir.store.embedded.locks import FileLock

ADDRESS_FILE = "server.json"
SERVER_LOCK = "server.lock"
CLIENTS_LOCK = "clients.lock"
DATA_FOLDER = "milvus"

_WAIT_FOR_PREDECESSOR_S = 5.0
_POLL_S = 0.25
_LOST_FILE_S = 1.0
"""Time after which a deleted address file is written again."""

logger = logging.getLogger(__name__)


def serve(directory: Path, idle_s: float) -> int:
    """Serve the store in `directory` until no client has had it open for `idle_s` seconds.

    Returns:
        Exit code: 0, or 1 if another process already serves the directory.
    """
    # A handler must not raise or close anything: the signal may interrupt any line of this thread.
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with FileLock(directory / SERVER_LOCK) as lock, FileLock(directory / CLIENTS_LOCK) as clients:
        # A single attempt could fail although no server runs: a client that asks whether one does
        # holds a shared lock for an instant (`is_locked`).
        if not lock.acquire(timeout_s=_WAIT_FOR_PREDECESSOR_S):
            logger.error("another process already serves %s", directory)
            return 1
        (directory / ADDRESS_FILE).unlink(missing_ok=True)  # a killed server leaves it
        _serve_until_idle(directory, lock, clients, stop, idle_s)
    return 0


def _serve_until_idle(
    directory: Path, lock: FileLock, clients: FileLock, stop: threading.Event, idle_s: float
) -> None:
    # Imported here, because clients import this module for its names and do not need Milvus Lite.
    from milvus_lite.adapter.grpc.server import start_server_in_thread

    from reir.store.embedded.lite_checksums import install_checksums
    from reir.store.embedded.lite_compaction import install_compaction

    install_checksums()
    install_compaction()
    # One worker thread, since Milvus Lite does not protect a collection from concurrent writes.
    server, database, port = start_server_in_thread(
        str(directory / DATA_FOLDER), host="127.0.0.1", port=0, max_workers=1
    )
    address_file = AddressFile(directory / ADDRESS_FILE, port)
    address_file.keep()
    logger.info("serving %s on 127.0.0.1:%d", directory, port)
    try:
        _wait_until_idle(address_file, lock, clients, stop, idle_s)
    finally:
        # First, so that no further client connects to a server that is about to stop.
        address_file.remove()
        server.stop(grace=5).wait()
        # Closing writes files, which must not end up in a directory of another server.
        if lock.is_current:
            database.close()
        logger.info("stopped serving %s", directory)


class AddressFile:
    """The file in which clients find the address of this process."""

    def __init__(self, path: Path, port: int) -> None:
        """Prepare the file; nothing is written before `keep`."""
        self._path = path
        # The time makes the text of each process different, so that `exists` recognizes its own.
        self._text = json.dumps({"pid": os.getpid(), "port": port, "started": time.time_ns()})

    @property
    def exists(self) -> bool:
        """Whether the file exists, with the content that this process wrote."""
        try:
            return self._path.read_text() == self._text
        except OSError:
            return False

    def keep(self) -> None:
        """Write the file unless it exists; one of an earlier process is replaced."""
        if not self.exists:
            write_atomically(self._path, self._text)

    def remove(self) -> None:
        """Delete the file, unless another process wrote it."""
        if self.exists:
            self._path.unlink(missing_ok=True)


def _wait_until_idle(
    address_file: AddressFile,
    lock: FileLock,
    clients: FileLock,
    stop: threading.Event,
    idle_s: float,
) -> None:
    """Return, with an exclusive lock on `clients`, when no client has used the store for `idle_s`.

    Return at once, without that lock, if `stop` is set or if the directory was replaced. An address
    file that somebody deleted or overwrote is restored, but not immediately: the whole directory
    may be being deleted.
    """
    idle_for_s = lost_for_s = 0.0
    while lock.is_current:
        lost_for_s = 0.0 if address_file.exists else lost_for_s + _POLL_S
        if lost_for_s >= _LOST_FILE_S:
            # It fails if the disk is full or the directory was deleted meanwhile.
            with contextlib.suppress(OSError):
                address_file.keep()
        if stop.wait(_POLL_S):
            return
        if not clients.acquire():
            idle_for_s = 0.0
            continue
        if idle_for_s >= idle_s:
            return
        # At once, because a client that opens the store now waits for this lock.
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

"""The process that serves one embedded store: Milvus Lite on 127.0.0.1, on a free port.

Started by `reir.store.lite_server` as `python -m reir.store.lite_child DIRECTORY`. Two locks in the
directory rule its life: it holds `server.lock` for as long as it lives, so there is never a second
one; every client holds a share of `clients.lock`, and once nobody has for a while, it ends.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path

from reir.store.locks import FileLock

RECORD = "server.json"
SERVER_LOCK = "server.lock"
CLIENTS_LOCK = "clients.lock"
DATA = "milvus"

_WAIT_FOR_PREDECESSOR_S = 5.0
_POLL_S = 0.25

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
        record = directory / RECORD
        record.unlink(missing_ok=True)
        _serve_until_idle(directory, clients, stop, idle_s)
    return 0


def _serve_until_idle(
    directory: Path, clients: FileLock, stop: threading.Event, idle_s: float
) -> None:
    from milvus_lite.adapter.grpc.server import start_server_in_thread

    # One worker: Milvus Lite does not guard a collection against two writers at a time.
    server, database, port = start_server_in_thread(
        str(directory / DATA), host="127.0.0.1", port=0, max_workers=1
    )
    record = directory / RECORD
    write_atomically(record, json.dumps({"pid": os.getpid(), "port": port}))
    logger.info("serving %s on 127.0.0.1:%d", directory, port)
    try:
        _wait_until_idle(clients, stop, idle_s)
    finally:
        record.unlink(missing_ok=True)
        server.stop(grace=5).wait()
        database.close()
        logger.info("stopped serving %s", directory)


def _wait_until_idle(clients: FileLock, stop: threading.Event, idle_s: float) -> None:
    """Return, holding `clients` exclusively unless told to stop, when nobody uses the store."""
    idle_for_s = 0.0
    while not stop.wait(_POLL_S):
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

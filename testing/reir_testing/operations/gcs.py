"""`local_gcs`: a Google Cloud Storage on this machine (package `gcp-storage-emulator`)."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

# In a process of its own: in this one, it could not answer while pyarrow waits for the answer.
_SERVER = """
import sys
from gcp_storage_emulator.server import create_server
server = create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket=sys.argv[2])
server.start()
sys.stdin.read()  # returns when the parent process ends, even if it is killed
server.stop()
"""
_START_TIMEOUT_S = 60.0


@contextmanager
def local_gcs(bucket: str) -> Iterator[str]:
    """Run a server with one bucket; yields the options of URIs, which contain its address.

    Raises:
        TimeoutError: it does not start.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER, str(port), bucket],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        _wait_for(port)
        yield f"?endpoint_override=127.0.0.1:{port}&scheme=http&retry_limit_seconds=20"
        process.communicate(timeout=30)


def _wait_for(port: int) -> None:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"nothing listens on port {port}") from None
            time.sleep(0.1)
        else:
            return

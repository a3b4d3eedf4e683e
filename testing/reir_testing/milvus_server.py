"""`milvus_server`: starts a Milvus server for tests and benchmarks (extra `milvus-server`)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Runs in a process of its own, so that the server stops even if the tests are killed.
_SERVER = """
import sys
from milvus import MilvusServer, MilvusServerConfig
server = MilvusServer(MilvusServerConfig())
server.set_base_dir(sys.argv[1])
server.start()
print(server.listen_port, server.server_proc.pid, flush=True)
sys.stdin.read()  # returns when the parent process ends, even if it is killed
server.stop()
"""
_ETCD = """
name: default
listen-peer-urls: http://127.0.0.1:{peer}
initial-advertise-peer-urls: http://127.0.0.1:{peer}
initial-cluster: default=http://127.0.0.1:{peer}
listen-client-urls: http://127.0.0.1:{client}
advertise-client-urls: http://127.0.0.1:{client}
data-dir: {data}
"""


@dataclass(frozen=True)
class RunningServer:
    """The address and the process id of a server."""

    uri: str
    pid: int


@contextmanager
def milvus_server(directory: Path) -> Iterator[RunningServer]:
    """Start a server that keeps its data in `directory`, and stop it at the end of the block.

    Raises:
        RuntimeError: the server does not start; the message names the folder of its logs.
    """
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=directory,
        env={**os.environ, "ETCD_CONFIG_PATH": str(_etcd_config(directory))},
    ) as process:
        assert process.stdout is not None
        answer = process.stdout.readline().split()
        if len(answer) != 2:
            raise RuntimeError(f"the Milvus server did not start; see {directory / 'logs'}")
        yield RunningServer(f"http://127.0.0.1:{answer[0]}", int(answer[1]))
        # Closes its input, which tells it to stop the server.
        process.communicate(timeout=60)


def _etcd_config(directory: Path) -> Path:
    """Write a configuration with free ports for etcd, the database inside the server.

    The default ports are fixed, so two servers on one machine would collide.
    """
    # Both are open at the same time, so that the system cannot give out one port twice.
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as two,
    ):
        peer, client = one.getsockname()[1], two.getsockname()[1]
    path = directory / "etcd.yaml"
    path.write_text(_ETCD.format(peer=peer, client=client, data=directory / "data" / "etcd.data"))
    return path

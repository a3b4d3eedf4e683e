"""A real Milvus server, started once for all tests that ask for it (marker `milvus`)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_SERVER = """
import sys
from milvus import MilvusServer, MilvusServerConfig
server = MilvusServer(MilvusServerConfig())
server.set_base_dir(sys.argv[1])
server.start()
print(server.listen_port, flush=True)
sys.stdin.read()  # until the tests end, however they end
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


@pytest.fixture(scope="session")
def milvus_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a real server: REIR_TEST_MILVUS, or one started for these tests."""
    if running := os.environ.get("REIR_TEST_MILVUS"):
        yield running
        return
    pytest.importorskip("milvus", reason="pip install reir-platform[milvus-server]")
    directory = tmp_path_factory.mktemp("milvus")
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=directory,
        env={**os.environ, "ETCD_CONFIG_PATH": str(_etcd_config(directory))},
    ) as process:
        assert process.stdout is not None
        port = process.stdout.readline()
        assert port, f"the server did not start; see {directory / 'logs'}"
        yield f"http://127.0.0.1:{int(port)}"
        process.communicate(timeout=60)


def _etcd_config(directory: Path) -> Path:
    """Free ports for the etcd inside the server: its own are fixed, so two would collide."""
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as two,
    ):
        peer, client = one.getsockname()[1], two.getsockname()[1]
    path = directory / "etcd.yaml"
    path.write_text(_ETCD.format(peer=peer, client=client, data=directory / "data" / "etcd.data"))
    return path

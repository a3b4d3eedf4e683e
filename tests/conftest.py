"""A real Milvus server, started once for all tests that ask for it (marker `milvus`)."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from reir_testing.milvus_server import milvus_server


@pytest.fixture(scope="session")
def milvus_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a real server: REIR_TEST_MILVUS, or one started for these tests."""
    if running := os.environ.get("REIR_TEST_MILVUS"):
        yield running
        return
    pytest.importorskip("milvus", reason="pip install reir-platform[milvus-server]")
    with milvus_server(tmp_path_factory.mktemp("milvus")) as server:
        yield server.uri

"""`open_store`: which location gives which store."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from reir.errors import ConfigError, StoreUnavailable
from reir.store import client, default_location, open_store
from reir.store.client import BACK_OFFS_S
from reir.store.memory import MemoryStore
from reir.store.milvus import MilvusStore


def test_the_location_memory_opens_a_memory_store() -> None:
    assert isinstance(open_store("memory:"), MemoryStore)


def test_a_directory_is_created_and_no_server_started(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "new" / "store"))
    assert isinstance(store, MilvusStore)
    assert not (tmp_path / "new" / "store" / "server.json").exists()
    store.close()


def test_the_default_location_depends_on_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REIR_STORE", raising=False)
    monkeypatch.delenv("REIR_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_location() == str(tmp_path / ".reir" / "store")
    monkeypatch.setenv("REIR_HOME", str(tmp_path / "home"))
    assert default_location() == str(tmp_path / "home" / "store")
    monkeypatch.setenv("REIR_STORE", "memory:")
    assert isinstance(open_store(), MemoryStore)


@pytest.mark.parametrize(
    "location",
    [
        "",
        "  ",
        "memory",
        "redis://host:1",
        "http://",
        "http://host:x",
        "tcp://h/path",
        "mem:",
        "a\0",
    ],
)
def test_other_locations_are_refused(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "memory").write_text("")
    with pytest.raises(ConfigError) as caught:
        open_store(location)
    assert "http://HOST:PORT" in str(caught.value)
    assert repr(location)[1:-1] in str(caught.value)


@pytest.mark.parametrize("scheme", ["http", "tcp"])
def test_the_error_names_an_unreachable_server(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "BACK_OFFS_S", (0.01, 0.01))
    store = open_store(f"{scheme}://127.0.0.1:1")
    with pytest.raises(StoreUnavailable, match=r"http://127\.0\.0\.1:1 is not reachable"):
        store.galleries()
    store.close()


def test_an_impatient_store_gives_up_soon() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    store = open_store(f"http://127.0.0.1:{port}", patient=False)
    started_s = time.monotonic()
    with pytest.raises(StoreUnavailable, match=str(port)):
        store.galleries()
    assert time.monotonic() - started_s < sum(BACK_OFFS_S)
    store.close()

"""`open_store`: from a location to the store that is there."""

from __future__ import annotations

import os
import re
from pathlib import Path

from reir.errors import ConfigError
from reir.store.contract import InstanceStore

_ALLOWED = "'memory:', a directory, http://HOST:PORT, https://HOST:PORT or tcp://HOST:PORT"
_SERVER = re.compile(r"(https?|tcp)://[^\s/:]+(:\d{1,5})?/?")


def default_location() -> str:
    """Where the store is unless told: $REIR_STORE, else $REIR_HOME/store, else ~/.reir/store."""
    home = os.environ.get("REIR_HOME") or str(Path.home() / ".reir")
    return os.environ.get("REIR_STORE") or str(Path(home) / "store")


def is_embedded(location: str | None = None) -> bool:
    """Whether `open_store` of this location starts the embedded server."""
    place = default_location() if location is None else location
    return place != "memory:" and "://" not in place


def open_store(location: str | None = None, *, patient: bool = True) -> InstanceStore:
    """Open a store; nothing is contacted before its first use.

    Args:
        location: "memory:" for this process only; a directory for the embedded store; the address
            of a Milvus server (access token in $REIR_MILVUS_TOKEN); None for the default.
        patient: try for some seconds to reach it; a service has somebody waiting, and does not.

    Raises:
        ConfigError: the location is none of these.
        StoreUnavailable: the directory does not exist and cannot be created, or is read-only
            and cannot be copied.
    """
    place = default_location() if location is None else location
    if place == "memory:":
        from reir.store.memory import MemoryStore

        return MemoryStore()
    if "://" in place:
        return _open_server(place, patient)
    if not place.strip() or re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", place) or "\0" in place:
        raise ConfigError(f"store location {place!r} is not one of {_ALLOWED}")
    return _open_directory(Path(place).expanduser().resolve(), patient)


def _open_server(address: str, patient: bool) -> InstanceStore:
    from reir.store.client import BACK_OFFS_S, SHORT_BACK_OFFS_S, MilvusConnection
    from reir.store.milvus import MilvusStore

    if not _SERVER.fullmatch(address):
        raise ConfigError(f"store location {address!r} is not one of {_ALLOWED}")
    uri = re.sub(r"^tcp://", "http://", address)
    token = os.environ.get("REIR_MILVUS_TOKEN", "")
    return MilvusStore(MilvusConnection(uri, token, BACK_OFFS_S if patient else SHORT_BACK_OFFS_S))


def _open_directory(directory: Path, patient: bool) -> InstanceStore:
    from reir.store.client import BACK_OFFS_S, SHORT_BACK_OFFS_S, MilvusConnection
    from reir.store.lite_server import LiteServer
    from reir.store.milvus import MilvusStore
    from reir.store.mirror import Mirror
    from reir.store.read_only import light_copy, why_read_only

    if os.path.exists(directory) and not os.path.isdir(directory):  # no error without permission
        raise ConfigError(f"store location {str(directory)!r} is a file; give one of {_ALLOWED}")
    read_only = why_read_only(directory)
    copy = light_copy(directory) if read_only else None
    server = LiteServer(directory, copy=copy)
    back_offs_s = BACK_OFFS_S if patient else SHORT_BACK_OFFS_S
    connection = MilvusConnection(server, back_offs_s=back_offs_s)
    return MilvusStore(connection, Mirror(server.directory / "reader"), read_only=read_only)

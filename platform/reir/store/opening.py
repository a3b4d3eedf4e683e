"""`open_store`: turns a store location into a store."""

from __future__ import annotations

import os
import re
from pathlib import Path

from reir.config import reir_home
from reir.errors import ConfigError
from reir.settings import store_setting
from reir.store.contract import InstanceStore

_ALLOWED = "'memory:', a directory, http://HOST:PORT, https://HOST:PORT or tcp://HOST:PORT"
_SERVER = re.compile(r"(https?|tcp)://[^\s/:]+(:\d{1,5})?/?")


def default_location() -> str:
    """Location of the default store.

    It is $REIR_STORE, or `store` in the settings file, or the folder `store` in $REIR_HOME.

    Raises:
        ConfigError: the settings file cannot be read.
    """
    named = store_setting()
    return str(reir_home() / "store") if named is None else named[0]


def is_embedded(location: str | None = None) -> bool:
    """Whether the location is a directory, for which `open_store` gives an embedded store."""
    place = default_location() if location is None else location
    return place != "memory:" and "://" not in place


def open_store(location: str | None = None, *, patient: bool = True) -> InstanceStore:
    """Open a store. Only the server of an embedded store starts at once; nothing is connected yet.

    Args:
        location: "memory:" for a store in the memory of this process; a directory for an embedded
            store; the address of a Milvus server, with its access token in $REIR_MILVUS_TOKEN; None
            for the default location.
        patient: whether a call retries for some seconds before it fails. A service does not: its
            clients are waiting for an answer.

    Raises:
        ConfigError: the location is none of the above.
        StoreUnavailable: the directory cannot be created, or is read-only and cannot be copied.
    """
    place = default_location() if location is None else location
    # Each store is imported only when it is opened: pymilvus takes long to import.
    if place == "memory:":
        from reir.store.memory import MemoryStore

        return MemoryStore()
    if "://" in place:
        return _open_server(place, patient)
    # A mistyped address, such as "http:/host", must not become a directory of that name.
    if not place.strip() or re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", place) or "\0" in place:
        raise ConfigError(f"store location {place!r} must be one of {_ALLOWED}")
    return _open_directory(Path(place).expanduser().resolve(), patient)


def _open_server(address: str, patient: bool) -> InstanceStore:
    from reir.store.client import BACK_OFFS_S, SHORT_BACK_OFFS_S, MilvusConnection
    from reir.store.milvus_server import MilvusServerStore

    if not _SERVER.fullmatch(address):
        raise ConfigError(f"store location {address!r} must be one of {_ALLOWED}")
    uri = re.sub(r"^tcp://", "http://", address)
    token = os.environ.get("REIR_MILVUS_TOKEN", "")
    back_offs_s = BACK_OFFS_S if patient else SHORT_BACK_OFFS_S
    return MilvusServerStore(MilvusConnection(uri, token, back_offs_s))


def _open_directory(directory: Path, patient: bool) -> InstanceStore:
    from reir.store.embedded.lite_server import LiteServer
    from reir.store.embedded.read_only import copy_with_symlinks, why_read_only

    # Not `Path.exists`, which raises an error if permission is missing.
    if os.path.exists(directory) and not os.path.isdir(directory):
        raise ConfigError(f"store location {str(directory)!r} is a file; use one of {_ALLOWED}")
    read_only = why_read_only(directory)
    copy = copy_with_symlinks(directory) if read_only else None
    server = LiteServer(directory, copy=copy)
    # The server takes about a second to start, and the imports below about as long.
    server.start_ahead()

    from reir.store.client import BACK_OFFS_S, SHORT_BACK_OFFS_S, MilvusConnection
    from reir.store.embedded.embedded_store import EmbeddedStore
    from reir.store.embedded.version_journals import VersionJournals

    back_offs_s = BACK_OFFS_S if patient else SHORT_BACK_OFFS_S
    connection = MilvusConnection(server, back_offs_s=back_offs_s)
    journals = VersionJournals(server.directory / "reader")
    return EmbeddedStore(connection, journals, read_only=read_only)

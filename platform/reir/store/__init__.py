"""Where instances live: one contract, a memory twin, and Milvus (embedded Lite or a server)."""

from reir.store.contract import (
    InstanceRow,
    InstanceStore,
    StoredPhoto,
    VersionInfo,
    VersionSpec,
)
from reir.store.opening import default_location, is_embedded, open_store

__all__ = [
    "InstanceRow",
    "InstanceStore",
    "StoredPhoto",
    "VersionInfo",
    "VersionSpec",
    "default_location",
    "is_embedded",
    "open_store",
]

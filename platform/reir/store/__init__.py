"""Stores of instances: one contract, implemented in memory, on Milvus Lite and on a Milvus server.

Milvus Lite runs embedded: its data is a directory, and a process of our own serves it.
"""

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

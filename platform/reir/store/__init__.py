"""Where instances live: one contract, a memory twin, and Milvus (embedded Lite or a server)."""

from reir.store.contract import InstanceRow, InstanceStore, VersionInfo, VersionSpec

__all__ = ["InstanceRow", "InstanceStore", "VersionInfo", "VersionSpec"]

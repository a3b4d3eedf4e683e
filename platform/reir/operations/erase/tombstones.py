"""Tombstones: what was erased from a gallery, so that it does not come back.

A source may still contain a photo that was erased. Each tombstone is a keyed hash of its URI, or of
its content and tenant: enough to recognize the photo when it is listed or read again, but nothing
from which it could be found. The key is a random number of the gallery.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from reir.attributes import tenant_of
from reir.records import ImageRecord
from reir.store.contract import InstanceStore

KIND = "erased"
"""Kind of the documents: one with the key of each gallery, and parts with its tombstones."""

PART_SIZE = 500
FRESH_S = 2.0
"""A long run reads the tombstones again after so many seconds, to notice an erasure meanwhile."""

_HEX_DIGITS = 32


_cached: WeakKeyDictionary[InstanceStore, dict[str, Tombstones]] = WeakKeyDictionary()


def tombstones_of(store: InstanceStore, gallery: str) -> Tombstones:
    """Return the tombstones of a gallery; the same object for the same store."""
    # Otherwise every batch of an indexing run would read them again.
    return _cached.setdefault(store, {}).setdefault(gallery, Tombstones(store, gallery))


class Tombstones:
    """The tombstones of one gallery."""

    def __init__(self, store: InstanceStore, gallery: str) -> None:
        """Read them at the first use."""
        self._store, self._gallery = store, gallery
        self._key = b""
        self._hashes: frozenset[str] = frozenset()
        self._parts: Mapping[str, Mapping[str, Any]] = {}
        self._read_s = float("-inf")

    def covers_uri(self, uri: str) -> bool:
        """Whether a photo with this URI was erased."""
        self._refresh_if_old()
        return bool(self._hashes) and self._hash("uri", uri) in self._hashes

    def covers(self, record: ImageRecord) -> bool:
        """Whether this photo, or one of the same tenant with the same content, was erased."""
        self._refresh_if_old()
        return bool(self._hashes) and not self._hashes.isdisjoint(self._hashes_of(record))

    def add(self, records: Collection[ImageRecord]) -> None:
        """Add photos that are about to be erased."""
        self.refresh()
        if not self._key:
            self._key = secrets.token_bytes(32)
            self._store.put_document(KIND, f"{self._gallery}/key", {"key": self._key.hex()})
        found = {each for record in records for each in self._hashes_of(record)} - self._hashes
        numbers = [int(name.rpartition("/")[2]) for name in self._parts]
        start = max(numbers, default=-1) + 1
        for number, part in enumerate(_chunks(sorted(found)), start):
            self._store.put_document(KIND, f"{self._gallery}/{number}", {"hashes": part})
        self.refresh()

    def remove(self, records: Iterable[ImageRecord]) -> None:
        """Remove photos that are wanted again."""
        self.refresh()
        wanted = {each for record in records for each in self._hashes_of(record)}
        for name, part in self._parts.items():
            kept = [each for each in part["hashes"] if each not in wanted]
            if len(kept) < len(part["hashes"]):
                self._store.put_document(KIND, name, {"hashes": kept})
        self.refresh()

    def _refresh_if_old(self) -> None:
        if time.monotonic() - self._read_s >= FRESH_S:
            self.refresh()

    def refresh(self) -> None:
        """Read the tombstones again."""
        found = self._store.find_documents(KIND, f"{self._gallery}/")
        key = found.pop(f"{self._gallery}/key", None)
        self._key = bytes.fromhex(key["key"]) if key else b""
        self._parts = found
        self._hashes = frozenset(each for part in found.values() for each in part["hashes"])
        self._read_s = time.monotonic()

    def _hashes_of(self, record: ImageRecord) -> Iterator[str]:
        yield self._hash("uri", record.uri)
        if record.content_hash:  # its bytes may never have been read
            # With the tenant, since two of them may own the same picture.
            yield self._hash("content", f"{tenant_of(record.attributes)}/{record.content_hash}")

    def _hash(self, kind: str, text: str) -> str:
        digest = hmac.new(self._key, f"{kind}:{text}".encode(), hashlib.sha256).hexdigest()
        return digest[:_HEX_DIGITS]


def _chunks(hashes: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(hashes), PART_SIZE):
        yield hashes[start : start + PART_SIZE]

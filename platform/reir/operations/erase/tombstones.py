"""Tombstones: what was erased from a gallery, so that it does not come back.

A source may still contain a photo that was erased. Each tombstone is a keyed hash of its URI, or of
its content and tenant: enough to recognize the photo when it is listed or read again, but nothing
from which it could be found. The key is a random number of the gallery. A gallery into which a
backup of another store was restored has the tombstones of both, each with their key.
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
"""Kind of the documents, each of which has some tombstones of a gallery, and their key."""

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
        self._parts: Mapping[str, Mapping[str, Any]] = {}
        self._hashes: Mapping[bytes, frozenset[str]] = {}
        self._read_s = float("-inf")

    def covers_uri(self, uri: str) -> bool:
        """Whether a photo with this URI was erased."""
        self._refresh_if_old()
        return any(_hash(key, "uri", uri) in hashes for key, hashes in self._hashes.items())

    def covers(self, record: ImageRecord) -> bool:
        """Whether this photo, or one of the same tenant with the same content, was erased."""
        self._refresh_if_old()
        return any(
            not hashes.isdisjoint(_hashes_of(key, record)) for key, hashes in self._hashes.items()
        )

    def add(self, records: Collection[ImageRecord]) -> None:
        """Add photos that are about to be erased."""
        self.refresh()
        key = next(iter(self._hashes), None) or secrets.token_bytes(32)
        self._add(key, {each for record in records for each in _hashes_of(key, record)})

    def merge(self, documents: Iterable[Mapping[str, Any]]) -> int:
        """Add the tombstones of a backup; return how many of its documents brought new ones."""
        self.refresh()
        return sum(self._add(bytes.fromhex(each["key"]), set(each["hashes"])) for each in documents)

    def remove(self, records: Collection[ImageRecord]) -> None:
        """Remove photos that are wanted again."""
        self.refresh()
        wanted = {
            each for key in self._hashes for record in records for each in _hashes_of(key, record)
        }
        for name, part in self._parts.items():
            kept = [each for each in part["hashes"] if each not in wanted]
            if len(kept) < len(part["hashes"]):
                self._store.put_document(KIND, name, {**part, "hashes": kept})
        self.refresh()

    def _refresh_if_old(self) -> None:
        if time.monotonic() - self._read_s >= FRESH_S:
            self.refresh()

    def refresh(self) -> None:
        """Read the tombstones again."""
        self._parts = self._store.find_documents(KIND, f"{self._gallery}/")
        hashes: dict[bytes, set[str]] = {}
        for part in self._parts.values():
            hashes.setdefault(bytes.fromhex(part["key"]), set()).update(part["hashes"])
        self._hashes = {key: frozenset(found) for key, found in hashes.items()}
        self._read_s = time.monotonic()

    def _add(self, key: bytes, hashes: set[str]) -> bool:
        """Add tombstones with their key; return whether any of them is new."""
        new = sorted(hashes - self._hashes.get(key, frozenset()))
        start = 1 + max((int(name.rpartition("/")[2]) for name in self._parts), default=-1)
        for number, part in enumerate(_chunks(new), start):
            values = {"key": key.hex(), "hashes": part}
            self._store.put_document(KIND, f"{self._gallery}/{number}", values)
        self.refresh()
        return bool(new)


def _hashes_of(key: bytes, record: ImageRecord) -> Iterator[str]:
    yield _hash(key, "uri", record.uri)
    if record.content_hash:  # its bytes may never have been read
        # With the tenant, since two of them may own the same picture.
        yield _hash(key, "content", f"{tenant_of(record.attributes)}/{record.content_hash}")


def _hash(key: bytes, kind: str, text: str) -> str:
    return hmac.new(key, f"{kind}:{text}".encode(), hashlib.sha256).hexdigest()[:_HEX_DIGITS]


def _chunks(hashes: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(hashes), PART_SIZE):
        yield hashes[start : start + PART_SIZE]

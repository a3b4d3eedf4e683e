"""Tracks which contents a version holds or is about to hold, so that each is encoded only once.

Images are processed in the order of the listing. The first image of a content is encoded and holds
the instances; later ones, in this run or any other, become duplicates of it. Photos with the same
content but different attributes are kept apart, since a filter must find each by its own
attributes. Depends on the contract of the store only.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from reir.records import ImageRecord, IndexedImage
from reir.store.contract import InstanceStore
from reir.store.duplicates import ContentKey, by_content, content_key, hand_over, merge_holders
from reir_ingestion.loading import Loaded
from reir_ingestion.writer import patiently

ASK_ALWAYS_ABOVE = 2_000_000
"""Above this many ledger rows, a query per batch is faster than reading all rows at the start."""

_CHUNK = 512
"""Number of contents in one look-up."""

_Holding = tuple[str, str]
"""Content hash, and id of the image that held it."""


class SeenHashes:
    """A Bloom filter of content hashes: says "surely new" or "maybe seen", in 16 MiB at any size.

    Of 10 million hashes 4 in 1,000 new ones are taken for maybe seen. The bits of a sha256 are as
    good as random, so they are the hash functions.
    """

    _BITS = 27
    _WORDS = 4

    def __init__(self) -> None:
        """Start empty."""
        self._bits = bytearray(1 << (self._BITS - 3))

    def add(self, content_hash: str) -> None:
        """Add a SHA-256 in hex."""
        for place in self._places(content_hash):
            self._bits[place >> 3] |= 1 << (place & 7)

    def __contains__(self, content_hash: str) -> bool:
        """Whether a SHA-256 may have been added."""
        return all(
            self._bits[place >> 3] >> (place & 7) & 1 for place in self._places(content_hash)
        )

    def _places(self, content_hash: str) -> list[int]:
        mask = (1 << self._BITS) - 1
        return [int(content_hash[8 * i : 8 * i + 8], 16) & mask for i in range(self._WORDS)]


class ConcurrentDuplicates:
    """Finds and merges contents that two concurrent runs may both have stored.

    Args:
        store: the store.
        gallery: name of the gallery.
        version: name of the version.
    """

    def __init__(self, store: InstanceStore, gallery: str, version: str) -> None:
        self._store = store
        self._place = gallery, version
        self._held = SeenHashes()
        self._suspects: set[str] = set()

    def add(self, rows: Sequence[ImageRecord]) -> None:
        """Look at ledger rows; every row of the version has to be added once."""
        named = {row.same_as for row in rows if row.same_as}
        holders = self._store.get_images(*self._place, list(named)) if named else {}
        for row in rows:
            if row.same_as:
                holder = holders.get(row.same_as)
                suspect = holder is None or not holder.holds_instances
            else:
                suspect = row.holds_instances and _digest(row) in self._held
            if suspect:
                self._suspects.add(row.content_hash)
            elif row.holds_instances:
                self._held.add(_digest(row))

    def merge(self) -> int:
        """Leave each such content with one holder; return how many others became duplicates."""
        hashes = sorted(self._suspects)
        chunks = [hashes[start : start + _CHUNK] for start in range(0, len(hashes), _CHUNK)]
        merge = partial(merge_holders, self._store, *self._place)
        return sum(patiently(partial(merge, chunk)) for chunk in chunks)


class Contents:
    """Gives every content of a run one holder; every method may be called from any thread."""

    def __init__(
        self, store: InstanceStore, gallery: str, version: str, *, bulk_import: str = ""
    ) -> None:
        """Nothing is read from the store before the first image with pixels.

        Args:
            store: where.
            gallery: name.
            version: name.
            bulk_import: storage for `InstanceStore.import_images`; without it images are upserted.
        """
        self._store = store
        self._put = (
            partial(store.import_images, storage=bulk_import)
            if bulk_import
            else store.upsert_images
        )
        self._place = gallery, version
        self._lock = threading.Lock()
        # all below are guarded by `_lock`
        self._seen: SeenHashes | None = None
        self._ask_always = False
        self._in_flight: dict[ContentKey, str] = {}
        self._leaving: set[str] = set()
        self._joined: set[str] = set()
        self._heirs: dict[_Holding, str] = {}
        self._refused: dict[str, ImageRecord] = {}

    def claim(self, batch: Sequence[Loaded]) -> list[Loaded]:
        """Return the batch with every duplicate marked as one, and without its pixels.

        Batches have to come in the order in which they will be written.
        """
        with self._lock:
            stored = self._stored(each.content_hash for each in batch if each.pixels is not None)
            return [self._claimed(each, stored) for each in batch]

    def write(
        self, images: Sequence[IndexedImage], known: Sequence[ImageRecord | None]
    ) -> list[ImageRecord]:
        """Write a batch that has passed `claim`, waiting for a store that cannot be reached.

        Args:
            images: the batch.
            known: ledger row of an earlier run for each image, None where it is new.

        Returns:
            The ledger rows as they are now. A duplicate of a photo that the model refused has
            failed for the same reason.
        """
        leaving = {
            before.image_id: before.content_hash
            for image, before in zip(images, known, strict=True)
            if before is not None and _loses_content(before, image.record.content_hash)
        }
        shared = self._shared(leaving, images)
        records: list[ImageRecord] = []
        part: list[tuple[IndexedImage, ImageRecord | None]] = []
        for image, before in zip(images, known, strict=True):
            key = image.record.image_id
            if key in shared:  # what comes before it in the batch may be what takes over
                records += self._write_part(part)
                part = []
                self._hand_over(key, leaving[key])
            part.append((image, before))
        return records + self._write_part(part)

    def _shared(
        self, leaving: Mapping[str, str], images: Iterable[IndexedImage]
    ) -> Collection[str]:
        """Images that give up a content which another image has too, or is about to have."""
        if not leaving:
            return ()
        stored = patiently(partial(self._store.find_content, *self._place, set(leaving.values())))
        coming = {image.record.content_hash for image in images}
        return {
            key
            for key, content_hash in leaving.items()
            if content_hash in coming
            or any(row.image_id != key for row in stored.get(content_hash, ()))
        }

    def _hand_over(self, image_id: str, content_hash: str) -> None:
        heirs = patiently(partial(hand_over, self._store, *self._place, [image_id]))
        if image_id in heirs:
            with self._lock:
                self._heirs[content_hash, image_id] = heirs[image_id]

    def _write_part(
        self, part: Sequence[tuple[IndexedImage, ImageRecord | None]]
    ) -> list[ImageRecord]:
        with self._lock:
            settled = [(self._settled(image), before) for image, before in part]
        fresh = [image for image, before in settled if image.record != before]
        if fresh:
            patiently(partial(self._put, *self._place, fresh))
        with self._lock:
            for image, _ in settled:
                self._written(image.record)
        return [image.record for image, _ in settled]

    def _written(self, record: ImageRecord) -> None:
        self._leaving.discard(record.image_id)
        if self._in_flight.get(content_key(record)) == record.image_id:
            del self._in_flight[content_key(record)]

    def _claimed(self, loaded: Loaded, stored: dict[ContentKey, list[ImageRecord]]) -> Loaded:
        known = loaded.task.known
        if loaded.stays_as_known:
            return loaded
        if known is not None and _loses_content(known, loaded.content_hash):
            self._leaving.add(known.image_id)
        if loaded.pixels is None:
            return loaded
        key = content_key(loaded.record)
        holder = self._in_flight.get(key) or self._holder(stored.get(key, ()))
        if holder in (None, loaded.task.image_id):
            self._in_flight[key] = loaded.task.image_id
            self._seen_hashes().add(loaded.content_hash)
            return loaded
        self._joined.add(holder)
        return replace(loaded, pixels=None, same_as=holder)

    def _holder(self, rows: Collection[ImageRecord]) -> str | None:
        """Id of the image among these that holds the content, if the content will not be lost.

        An image whose content is about to change counts if it has a duplicate that can take over.
        """
        staying = {row.image_id for row in rows} - self._leaving
        for row in sorted(rows, key=lambda row: row.image_id in self._leaving):
            if row.holds_instances and (staying or row.image_id in self._joined):
                return row.image_id
        return None

    def _stored(self, hashes: Iterable[str]) -> dict[ContentKey, list[ImageRecord]]:
        """Ledger rows of these contents, if there are any; asks the store only where needed."""
        wanted = {each for each in hashes if self._may_be_stored(each)}
        return by_content(self._store.find_content(*self._place, wanted)) if wanted else {}

    def _may_be_stored(self, content_hash: str) -> bool:
        return content_hash in self._seen_hashes() or self._ask_always

    def _seen_hashes(self) -> SeenHashes:
        if self._seen is None:
            seen = SeenHashes()
            gallery, version = self._place
            sizes = {each.name: each.num_images for each in self._store.versions(gallery)}
            self._ask_always = sizes[version] > ASK_ALWAYS_ABOVE
            if not self._ask_always:
                for record in self._store.iter_images(gallery, version, status="indexed"):
                    seen.add(record.content_hash)
            self._seen = seen
        return self._seen

    def _settled(self, image: IndexedImage) -> IndexedImage:
        """The image as it must be written now, since its holder may have changed after `claim`."""
        record = image.record
        while heir := self._heirs.get((record.content_hash, record.same_as)):
            record = replace(record, same_as=heir)
        cause = self._refused.get(record.same_as)
        if cause is not None:
            record = replace(
                record, status="failed", same_as="", reason=cause.reason, detail=cause.detail
            )
            return IndexedImage(record, None)
        if (
            record.status == "failed"
            and self._in_flight.get(content_key(record)) == record.image_id
        ):
            self._refused[record.image_id] = record
        return IndexedImage(record, image.instances)


def _digest(record: ImageRecord) -> str:
    """Return the SHA-256 of content hash and attributes, in hex."""
    return hashlib.sha256("".join(content_key(record)).encode()).hexdigest()


def _loses_content(known: ImageRecord, content_hash: str) -> bool:
    """Whether the content of an image that is indexed in the ledger is about to change."""
    return known.status == "indexed" and known.content_hash != content_hash

"""Tracks which contents a version holds or is about to hold, so that each is encoded only once.

Images are processed in the order of the listing. The first image with a content is encoded and
holds the instances. Later ones, in this run or any other, become duplicates of it. Photos with the
same content but different attributes are no duplicates, because a filter must find each by its own
attributes. This module uses the store through its contract only.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from reir.records import ImageRecord, IndexedImage
from reir.store.contract import InstanceStore
from reir.store.duplicates import ContentKey, by_content, content_key, hand_over, merge_holders
from reir.store.validation import require_server
from reir_ingestion.loading import LoadedImage
from reir_ingestion.retries import call_with_retries

QUERY_ALWAYS_ABOVE = 2_000_000
"""Number of ledger rows above which one query per batch is faster than reading all rows first."""

_CHUNK = 512
"""Number of contents in one look-up."""

_OldHolder = tuple[str, str]
"""Content hash, and id of the image that held the content before."""


class BloomFilter:
    """A Bloom filter of content hashes: a hash is certainly new, or may have been added before.

    The filter takes 16 MiB. With 10 million hashes in it, it answers "may have been added" for 4 in
    1,000 new ones. Parts of the SHA-256 serve as the hash functions of the filter, because its bits
    are as good as random.
    """

    _BITS = 27
    _WORDS = 4

    def __init__(self) -> None:
        """Start empty."""
        self._bits = bytearray(1 << (self._BITS - 3))

    def add(self, content_hash: str) -> None:
        """Add a SHA-256 in hex."""
        for bit in self._bit_positions(content_hash):
            self._bits[bit >> 3] |= 1 << (bit & 7)

    def __contains__(self, content_hash: str) -> bool:
        """Whether a SHA-256 may have been added."""
        return all(
            self._bits[bit >> 3] >> (bit & 7) & 1 for bit in self._bit_positions(content_hash)
        )

    def _bit_positions(self, content_hash: str) -> list[int]:
        mask = (1 << self._BITS) - 1
        return [int(content_hash[8 * i : 8 * i + 8], 16) & mask for i in range(self._WORDS)]


@dataclass(frozen=True)
class ImageUpdate:
    """An image to write to the store, and its ledger row of an earlier run, if it has one."""

    image: IndexedImage
    previous: ImageRecord | None

    @property
    def loses_content(self) -> bool:
        """Whether the image was indexed with another content, which it no longer has."""
        return self.previous is not None and _loses_content(
            self.previous, self.image.record.content_hash
        )


class DuplicateMerger:
    """Finds and merges contents that two concurrent runs have both stored.

    Args:
        store: the store.
        gallery: name of the gallery.
        version: name of the version.
    """

    def __init__(self, store: InstanceStore, gallery: str, version: str) -> None:
        self._store = store
        self._version_key = gallery, version
        self._held = BloomFilter()
        self._suspects: set[str] = set()

    def add(self, rows: Sequence[ImageRecord]) -> None:
        """Check ledger rows; every row of the version has to be added once."""
        named = {row.same_as for row in rows if row.same_as}
        holders = self._store.get_images(*self._version_key, list(named)) if named else {}
        for row in rows:
            if row.same_as:
                # The other run may have deleted the holder, or made it a duplicate itself.
                holder = holders.get(row.same_as)
                suspect = holder is None or not holder.holds_instances
            else:
                # A second holder, or a false positive of the filter, which `merge_holders` leaves
                # as it is.
                suspect = row.holds_instances and _digest(row) in self._held
            if suspect:
                self._suspects.add(row.content_hash)
            elif row.holds_instances:
                self._held.add(_digest(row))

    def merge(self) -> int:
        """Leave one holder of each such content; return how many others became duplicates."""
        hashes = sorted(self._suspects)
        chunks = [hashes[start : start + _CHUNK] for start in range(0, len(hashes), _CHUNK)]
        merge = partial(merge_holders, self._store, *self._version_key)
        return sum(call_with_retries(partial(merge, chunk)) for chunk in chunks)


class ContentIndex:
    """Gives every content one holder. Every method may be called from any thread."""

    def __init__(
        self, store: InstanceStore, gallery: str, version: str, *, bulk_import: str = ""
    ) -> None:
        """Create an index; the store is read only once a new photo needs the stored contents.

        Args:
            store: the store.
            gallery: name of the gallery.
            version: name of the version.
            bulk_import: storage for `ServerStore.import_images`; if empty, images are upserted.
        """
        self._store = store
        self._put = (
            partial(require_server(store).import_images, storage=bulk_import)
            if bulk_import
            else store.upsert_images
        )
        self._version_key = gallery, version
        self._lock = threading.Lock()
        # The lock guards everything below.
        self._stored_hashes: BloomFilter | None = None
        self._query_always = False
        # content -> the image of this run that will hold it, until it is written
        self._in_flight: dict[ContentKey, str] = {}
        # images whose new content is not written yet
        self._losing_content: set[str] = set()
        # images of which this run has found duplicates
        self._referenced: set[str] = set()
        self._new_holders: dict[_OldHolder, str] = {}
        self._failed_holders: dict[str, ImageRecord] = {}

    def mark_duplicates(self, batch: Sequence[LoadedImage]) -> list[LoadedImage]:
        """Return the batch, with every duplicate marked and without its pixels.

        Batches must come in the order in which they will be written.
        """
        # The lock is held during the query: a holder that is written meanwhile would neither be in
        # the answer nor in flight.
        with self._lock:
            stored = self._find_stored(
                each.content_hash for each in batch if each.pixels is not None
            )
            return [self._mark_duplicate(each, stored) for each in batch]

    def write(self, updates: Sequence[ImageUpdate]) -> list[ImageRecord]:
        """Write a batch that `mark_duplicates` returned, with retries if the store is unavailable.

        Returns:
            The ledger rows as they are now. A duplicate of a photo that the model refused has
            failed for the same reason.
        """
        shared = self._shared_contents(updates)
        records: list[ImageRecord] = []
        part: list[ImageUpdate] = []
        for update in updates:
            key = update.image.record.image_id
            if key in shared:
                # Another photo must take over the instances before this one overwrites them, and
                # that photo may be earlier in this batch: so write the batch up to here first.
                records += self._write_part(part)
                part = []
                self._hand_over(key, shared[key])
            part.append(update)
        return records + self._write_part(part)

    def _shared_contents(self, updates: Sequence[ImageUpdate]) -> dict[str, str]:
        """Return image id -> old content, for images whose old content another image has too."""
        losing = {
            update.previous.image_id: update.previous.content_hash
            for update in updates
            if update.previous is not None and update.loses_content
        }
        if not losing:
            return {}
        stored = call_with_retries(
            partial(self._store.find_content, *self._version_key, set(losing.values()))
        )
        # An image of this batch that gets one of these contents is not in the store yet.
        in_batch = {update.image.record.content_hash for update in updates}
        return {
            key: content_hash
            for key, content_hash in losing.items()
            if content_hash in in_batch
            or any(row.image_id != key for row in stored.get(content_hash, ()))
        }

    def _hand_over(self, image_id: str, content_hash: str) -> None:
        new_holders = call_with_retries(
            partial(hand_over, self._store, *self._version_key, [image_id])
        )
        # Duplicates that are still to be written name the old holder; see `_with_current_holder`.
        if image_id in new_holders:
            with self._lock:
                self._new_holders[content_hash, image_id] = new_holders[image_id]

    def _write_part(self, part: Sequence[ImageUpdate]) -> list[ImageRecord]:
        # The lock is not held while the store writes, so that other batches can be written too.
        with self._lock:
            images = [self._with_current_holder(update.image) for update in part]
        # An image that failed again for the same reason has the row that it had before.
        changed = [
            image
            for image, update in zip(images, part, strict=True)
            if image.record != update.previous
        ]
        if changed:
            call_with_retries(partial(self._put, *self._version_key, changed))
        with self._lock:
            for image in images:
                self._note_written(image.record)
        return [image.record for image in images]

    def _note_written(self, record: ImageRecord) -> None:
        self._losing_content.discard(record.image_id)
        if self._in_flight.get(content_key(record)) == record.image_id:
            del self._in_flight[content_key(record)]

    def _mark_duplicate(
        self, loaded: LoadedImage, stored: dict[ContentKey, list[ImageRecord]]
    ) -> LoadedImage:
        previous = loaded.pending.previous
        if loaded.keeps_earlier_instances:
            return loaded
        if previous is not None and _loses_content(previous, loaded.content_hash):
            self._losing_content.add(previous.image_id)
        if loaded.pixels is None:
            return loaded
        key = content_key(loaded.record)
        holder = self._in_flight.get(key) or self._find_holder(stored.get(key, ()))
        # If the ledger names this very image, as with --retry-failed or new attributes, it keeps
        # its content and is encoded again.
        if holder in (None, loaded.pending.image_id):
            self._in_flight[key] = loaded.pending.image_id
            self._known_hashes().add(loaded.content_hash)
            return loaded
        self._referenced.add(holder)
        return replace(loaded, pixels=None, same_as=holder)

    def _find_holder(self, rows: Collection[ImageRecord]) -> str | None:
        """Return the id of the image that holds this content, unless the content will be lost.

        A holder whose own content is about to change still counts if it has a duplicate that can
        take over.
        """
        staying = {row.image_id for row in rows} - self._losing_content
        # Prefer a holder that keeps its content.
        for row in sorted(rows, key=lambda row: row.image_id in self._losing_content):
            if row.holds_instances and (staying or row.image_id in self._referenced):
                return row.image_id
        return None

    def _find_stored(self, hashes: Iterable[str]) -> dict[ContentKey, list[ImageRecord]]:
        """Return the ledger rows with these contents; queries the store only where needed."""
        maybe_stored = {each for each in hashes if self._may_be_stored(each)}
        if not maybe_stored:
            return {}
        return by_content(self._store.find_content(*self._version_key, maybe_stored))

    def _may_be_stored(self, content_hash: str) -> bool:
        return content_hash in self._known_hashes() or self._query_always

    def _known_hashes(self) -> BloomFilter:
        """Return the filter of stored contents, which is filled from the ledger at first use."""
        if self._stored_hashes is None:
            hashes = BloomFilter()
            gallery, version = self._version_key
            sizes = {each.name: each.num_images for each in self._store.versions(gallery)}
            self._query_always = sizes[version] > QUERY_ALWAYS_ABOVE
            if not self._query_always:
                for record in self._store.iter_images(gallery, version, status="indexed"):
                    hashes.add(record.content_hash)
            self._stored_hashes = hashes
        return self._stored_hashes

    def _with_current_holder(self, image: IndexedImage) -> IndexedImage:
        """Return the image as it must be written now.

        Between `mark_duplicates` and `write`, the holder may have handed over its instances, or
        the model may have refused it.
        """
        record = image.record
        # A loop, because the new holder may have handed its instances over, too.
        while holder := self._new_holders.get((record.content_hash, record.same_as)):
            record = replace(record, same_as=holder)
        failure = self._failed_holders.get(record.same_as)
        if failure is not None:
            record = replace(
                record, status="failed", same_as="", reason=failure.reason, detail=failure.detail
            )
            return IndexedImage(record, None)
        if (
            record.status == "failed"
            and self._in_flight.get(content_key(record)) == record.image_id
        ):
            # Later duplicates of this photo have no pixels any more, so they have to fail as well.
            self._failed_holders[record.image_id] = record
        return IndexedImage(record, image.instances)


def _digest(record: ImageRecord) -> str:
    """Return the SHA-256 of content hash and attributes, in hex."""
    return hashlib.sha256("".join(content_key(record)).encode()).hexdigest()


def _loses_content(previous: ImageRecord, content_hash: str) -> bool:
    """Return whether an image that is indexed in the ledger is about to get another content."""
    return previous.status == "indexed" and previous.content_hash != content_hash

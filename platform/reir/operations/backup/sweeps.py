"""`BackupJob`: brings the files of a backup in line with a version that others may be writing.

A sweep lists the ledger, and reads the photos that are new, changed or gone since the sweep before.
At the end, a duplicate is read again, together with its holder, if the backup has another holder of
its content by now.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice

from reir.errors import StoreError
from reir.operations.backup.pairs import Pair, PairWriter
from reir.operations.backup.readers import read_photos
from reir.records import ImageRecord, IndexedImage
from reir.store.contract import InstanceStore
from reir.store.duplicates import ContentKey, content_key

MAX_SWEEPS = 6
"""A gallery that is being written always has something new. Each photo is consistent in itself
after the first sweep, so the others only make the backup more recent."""

MAX_ROUNDS = 40
"""How often photos are read again that are written all the time, before the backup fails."""

_LOST_AFTER = 3
"""Number of rounds after which a duplicate counts as one that has no holder in the store either."""

_BATCH_PHOTOS = 512
_BATCH_INSTANCES = 2048
"""Limits of a batch. An embedded store keeps writers waiting for some 0.2 s while it reads one."""

_BATCH_UNKNOWN = 64
"""Photos in a batch if their numbers of instances are not known."""


class BackupJob:
    """Reads a version into the files of a backup.

    Attributes:
        read_again: photos that were new, changed or gone after the first sweep.
        incomplete: ledger rows of photos of which the store has lost instances, by image id.
        orphans: ids of duplicates whose instances no photo of the store holds.
    """

    def __init__(
        self,
        store: InstanceStore,
        gallery: str,
        version: str,
        writer: PairWriter,
        on_read: Callable[[int], None],
    ) -> None:
        """Read a version, write with `writer`, and report how many photos were read so far."""
        self._store, self._gallery, self._version = store, gallery, version
        self._writer, self._on_read = writer, on_read
        self._num_read = 0
        self._listed: dict[str, ImageRecord] = {}
        self.read_again = 0
        self.incomplete: dict[str, ImageRecord] = {}
        self.orphans: set[str] = set()

    def run(self) -> None:
        """Read everything.

        Raises:
            GalleryNotFound: the version is gone.
            StoreError: photos are written too often to be read.
            DataError: a file cannot be written.
        """
        self._sweep()
        for _ in range(MAX_SWEEPS - 1):
            changed = self._sweep()
            self.read_again += changed
            if not changed:
                break
        self._unite_duplicates()

    def _sweep(self) -> int:
        """Bring the backup up to date with the ledger; return how many photos differed."""
        changed = 0

        def outdated() -> Iterator[ImageRecord]:
            nonlocal changed
            listed = self._store.iter_images(self._gallery, self._version)
            for record, saved in _joined(listed, self._writer.rows_by_id()):
                if saved is not None:
                    if self._is_saved(record, saved[0]):
                        continue
                    saved[1].dropped.add(saved[0].image_id)
                changed += 1
                if record is not None:
                    self._listed[record.image_id] = record
                    yield record

        self._read(_batches(outdated()))
        self._listed.clear()
        return changed

    def _is_saved(self, record: ImageRecord | None, saved: ImageRecord) -> bool:
        """Whether the backup has a photo as its ledger row describes it now."""
        # The backup counts the instances that were found, so the row of an incomplete photo never
        # equals the saved one. Its ledger row is remembered for this comparison.
        if record is not None and record in (saved, self.incomplete.get(record.image_id)):
            return True
        self.incomplete.pop(saved.image_id, None)
        return False

    def _read(self, batches: Iterable[list[str]]) -> None:
        """Read photos until each was read as it was at one moment."""
        for _ in range(MAX_ROUNDS):
            unsettled: list[str] = []
            for reading in read_photos(self._store, self._gallery, self._version, batches):
                self._writer.add(reading.images)
                self._find_incomplete(reading.images)
                unsettled += reading.unsettled
                self._num_read += len(reading.images)
                self._on_read(self._num_read)
            if not unsettled:
                return
            # These ids may be smaller than the last ones, and the ids of a run must ascend.
            self._writer.start_run()
            batches = _chunks(iter(sorted(unsettled)), _BATCH_UNKNOWN)
        raise _too_busy_error(self._gallery, unsettled[0])

    def _find_incomplete(self, images: Iterable[IndexedImage]) -> None:
        """Note the photos that have fewer instances than their ledger row says."""
        for image in images:
            found, listed = image.record, self._listed.pop(image.record.image_id, None)
            if listed is None or found.num_instances >= listed.num_instances:
                continue
            # Without this note, the next sweep would read it again, with the same result.
            if replace(listed, num_instances=found.num_instances) == found:
                self.incomplete[listed.image_id] = listed

    def _unite_duplicates(self) -> None:
        """Read duplicates again that do not match their holder in the backup.

        One of them may have been read before the instances were handed over from one photo to
        another, and the other afterwards.
        """
        attempts: Counter[tuple[str, str]] = Counter()
        for _ in range(MAX_ROUNDS):
            apart, pairs = self._apart()
            # With the holder: a duplicate that names another one by now has as many rounds again.
            attempts.update(apart.items())
            lost = {each for each in apart if attempts[each, apart[each]] >= _LOST_AFTER}
            again = {key: holder for key, holder in apart.items() if key not in lost}
            if not again:
                self.orphans = lost
                return
            # The ids of this run need no order: only a sweep relies on it, and none follows.
            self._writer.start_run()
            self._read(_dropped_batches(again, pairs))
        raise _too_busy_error(self._gallery, min(again))

    def _apart(self) -> tuple[dict[str, str], dict[str, Pair]]:
        """Find the duplicates that do not match their holder in the backup.

        Returns:
            Id of the duplicate -> id of the holder that it names; and the files of all duplicates
            and all holders, by image id.
        """
        duplicates: dict[str, tuple[str, ContentKey]] = {}
        pairs: dict[str, Pair] = {}
        for record, pair in self._writer.rows():
            if record.same_as:
                duplicates[record.image_id] = record.same_as, content_key(record)
                pairs[record.image_id] = pair
        if not duplicates:
            return {}, {}
        # The rows are read twice, so that the contents of only these holders are in memory.
        named = {holder for holder, _ in duplicates.values()}
        contents: dict[str, ContentKey] = {}
        for record, pair in self._writer.rows():
            if record.image_id in named:
                pairs[record.image_id] = pair
                if record.holds_instances:
                    contents[record.image_id] = content_key(record)
        return {
            key: holder
            for key, (holder, content) in duplicates.items()
            if contents.get(holder) != content
        }, pairs


def _dropped_batches(again: Mapping[str, str], pairs: Mapping[str, Pair]) -> Iterator[list[str]]:
    """Yield batches of duplicates with the holders that they name, which leave their files."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for key, holder in again.items():
        groups[holder].append(key)
    done: set[str] = set()
    for holders in _chunks(iter(groups), _BATCH_UNKNOWN):
        # Together, so that an embedded store returns them as they were at the same moment.
        group = {each for holder in holders for each in (holder, *groups[holder])} - done
        done |= group
        for each in group & pairs.keys():
            pairs[each].dropped.add(each)
        yield sorted(group)


def _joined(
    listed: Iterator[ImageRecord], saved: Iterator[tuple[ImageRecord, Pair]]
) -> Iterator[tuple[ImageRecord | None, tuple[ImageRecord, Pair] | None]]:
    """Join two streams by image id, by which both are ordered."""
    left, right = next(listed, None), next(saved, None)
    while left is not None or right is not None:
        if right is None or (left is not None and left.image_id < right[0].image_id):
            yield left, None
            left = next(listed, None)
        elif left is None or right[0].image_id < left.image_id:
            yield None, right
            right = next(saved, None)
        else:
            yield left, right
            left, right = next(listed, None), next(saved, None)


def _batches(records: Iterator[ImageRecord]) -> Iterator[list[str]]:
    """Yield ids in batches with a limited number of photos and instances."""
    batch: list[str] = []
    num_instances = 0
    for record in records:
        batch.append(record.image_id)
        num_instances += record.num_instances
        if num_instances >= _BATCH_INSTANCES or len(batch) >= _BATCH_PHOTOS:
            yield batch
            batch, num_instances = [], 0
    if batch:
        yield batch


def _chunks(ids: Iterator[str], size: int) -> Iterator[list[str]]:
    while chunk := list(islice(ids, size)):
        yield chunk


def _too_busy_error(gallery: str, image_id: str) -> StoreError:
    return StoreError(
        f"gallery '{gallery}' cannot be backed up now: photos such as {image_id} were written "
        f"again while each of {MAX_ROUNDS} attempts to read them was made; run the command again "
        f"when fewer processes write them"
    )

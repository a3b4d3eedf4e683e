"""Photos of identical content in one version: which of them holds the instances.

The first photo with a given content is its holder: it has the instances. Each later one has a
ledger row that names the holder (`ImageRecord.same_as`), and no instances of its own. Before a
holder is removed, or its content changes, one of its duplicates takes over: one batch writes the
instances and the image vector under the id of the duplicate, and removes them from the holder. No
model has to run. Two concurrent runs may both store the same content; `merge_holders` leaves it
with one holder.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from reir.records import ImageRecord, IndexedImage
from reir.store.contract import InstanceStore

ContentKey = tuple[str, str]
"""Content hash, and attributes as JSON; photos that agree in both are duplicates."""


def content_key(record: ImageRecord) -> ContentKey:
    """Return the key that an image shares with its duplicates."""
    # Attributes belong to it because instances store them: photos that differ in them cannot share
    # instances. Sorted, since the order of a user's columns means nothing.
    return record.content_hash, json.dumps(dict(record.attributes), sort_keys=True)


def by_content(found: Mapping[str, Iterable[ImageRecord]]) -> dict[ContentKey, list[ImageRecord]]:
    """Group the rows of `InstanceStore.find_content` by content and attributes."""
    groups: defaultdict[ContentKey, list[ImageRecord]] = defaultdict(list)
    for rows in found.values():
        for row in rows:
            groups[content_key(row)].append(row)
    return dict(groups)


def merge_holders(store: InstanceStore, gallery: str, version: str, hashes: Collection[str]) -> int:
    """Leave each of these contents with one holder: the first one, in the order of the URIs.

    All other images of the same content and attributes become duplicates of it. This repeats until
    nothing is left to change, since another run may be merging at the same time.

    Args:
        store: the store.
        gallery: name of the gallery.
        version: name of the version.
        hashes: content hashes. A content is left as it is if it has no holder, or one that all
            duplicates name.

    Returns:
        Number of holders that became duplicates.
    """
    merged: set[str] = set()
    while True:
        groups = by_content(store.find_content(gallery, version, hashes))
        wrong = [each for rows in groups.values() for each in _wrong_rows(rows)]
        if not wrong:
            return len(merged)
        merged.update(row.image_id for row, _ in wrong if row.holds_instances)
        changed = (replace(row, same_as=holder, num_instances=0) for row, holder in wrong)
        store.upsert_images(gallery, version, [IndexedImage(each, None) for each in changed])


def remove_images(
    store: InstanceStore, gallery: str, version: str, image_ids: Sequence[str]
) -> int:
    """Delete images, after duplicates have taken over; return how many ledger rows were deleted."""
    hand_over(store, gallery, version, image_ids)
    return store.delete_images(gallery, version, image_ids)


def remove_shared_image(store: InstanceStore, gallery: str, version: str, image_id: str) -> int:
    """Like `remove_images`, for an image of which somebody may be adding a duplicate meanwhile.

    Such a duplicate names the holder that it has found. If that one is deleted right afterwards,
    the duplicate gets its instances here, or names the earlier duplicate that has taken over.
    """
    whole = store.get_indexed(gallery, version, [image_id]).get(image_id)
    removed = remove_images(store, gallery, version, [image_id])
    if whole is not None and whole.record.holds_instances:
        content = {whole.record.content_hash}
        found = by_content(store.find_content(gallery, version, content))
        rows = found.get(content_key(whole.record), [])
        if left := _staying(rows, image_id, ()):
            if not any(row.holds_instances for row in rows):
                store.upsert_images(gallery, version, list(_taken_over(whole, left)))
            merge_holders(store, gallery, version, content)
    return removed


def hand_over(
    store: InstanceStore, gallery: str, version: str, leaving: Collection[str]
) -> dict[str, str]:
    """Hand the instances of each of these images to the first of its duplicates that stays.

    The former holder becomes a duplicate. In an embedded store, a search sees the instances under
    one of the two ids; on a server, it may see them under both during the write. If a call is
    interrupted, the next call completes it.

    Args:
        store: the store.
        gallery: name of the gallery.
        version: name of the version.
        leaving: ids of images that will be removed or changed; unknown ones, and those without a
            duplicate, are left as they are.

    Returns:
        Image id -> id of its new holder, for the images that have a duplicate.
    """
    known = store.get_images(gallery, version, list(leaving))
    holders = {key: row for key, row in known.items() if row.holds_instances and row.content_hash}
    found = store.find_content(gallery, version, {row.content_hash for row in holders.values()})
    heirs = {
        key: staying
        for key, row in holders.items()
        if (staying := _staying(found.get(row.content_hash, ()), key, leaving))
    }
    # All in one batch, which the store writes before it deletes anything: a killed process leaves
    # the instances under the old id, the new one, or both.
    batch = [
        image
        for key, whole in store.get_indexed(gallery, version, list(heirs)).items()
        for image in _handed_over(whole, heirs[key])
    ]
    if batch:
        store.upsert_images(gallery, version, batch)
    # An interrupted call may have made some of these images duplicates already.
    done_before = {key: row.same_as for key, row in known.items() if row.same_as}
    return done_before | {key: staying[0].image_id for key, staying in heirs.items()}


def _wrong_rows(rows: Sequence[ImageRecord]) -> Iterator[tuple[ImageRecord, str]]:
    """Yield the rows of one content that do not name its first holder, with that holder's id."""
    holders = [row for row in rows if row.holds_instances]
    if not holders:
        return
    # By URI, so that concurrent runs choose the same holder, and do not undo each other's work.
    first = min(holders, key=lambda row: row.uri).image_id
    for row in rows:
        if row.image_id != first and row.same_as != first:
            yield row, first


def _staying(
    rows: Collection[ImageRecord], holder: str, leaving: Collection[str]
) -> list[ImageRecord]:
    """The duplicates of a holder that are not leaving, ordered by URI."""
    found = [row for row in rows if row.same_as == holder and row.image_id not in leaving]
    return sorted(found, key=lambda row: row.uri)


def _handed_over(holder: IndexedImage, heirs: Sequence[ImageRecord]) -> Iterator[IndexedImage]:
    """The images of a group after the first heir has taken over from the holder."""
    yield from _taken_over(holder, heirs)
    former = replace(holder.record, same_as=heirs[0].image_id, num_instances=0)
    yield IndexedImage(former, None)


def _taken_over(holder: IndexedImage, heirs: Sequence[ImageRecord]) -> Iterator[IndexedImage]:
    """The heirs of a holder: the first one has the instances, and the others name it."""
    first, *others = heirs
    number = holder.record.num_instances
    yield IndexedImage(replace(first, same_as="", num_instances=number), holder.instances)
    for row in others:
        yield IndexedImage(replace(row, same_as=first.image_id), None)

"""Photos of identical content in one version: which of them holds the instances.

The first photo with a given content holds its instances. Each later one has a ledger row that names
the holder (`ImageRecord.same_as`) and no instances of its own. Before a holder is removed, or its
content changes, one of its duplicates takes over: instances and image vector are written under its
id in the same batch that takes them from the holder, without running a model. Two concurrent runs
may both store the same content; merging leaves it with one photo. Works with any store.
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
    """Delete images, after their duplicates have taken over; returns how many ledger rows went."""
    hand_over(store, gallery, version, image_ids)
    return store.delete_images(gallery, version, image_ids)


def hand_over(
    store: InstanceStore, gallery: str, version: str, leaving: Collection[str]
) -> dict[str, str]:
    """Give what each of these images holds to the first of its duplicates that stays.

    What was the holder is a duplicate itself afterwards. A search sees the instances under the one
    name or under the other (embedded; on a server under both for the moment of the write). Cut
    short, it is done again by the next call.

    Args:
        store: where.
        gallery: name.
        version: name.
        leaving: image ids; those without a duplicate, or unknown, are left as they are.

    Returns:
        Image id -> id of the image that holds its content now, of those that have a duplicate.
    """
    known = store.get_images(gallery, version, list(leaving))
    holders = {key: row for key, row in known.items() if row.holds_instances and row.content_hash}
    found = store.find_content(gallery, version, {row.content_hash for row in holders.values()})
    heirs = {
        key: staying
        for key, row in holders.items()
        if (staying := _staying(found.get(row.content_hash, ()), key, leaving))
    }
    batch = [
        image
        for key, whole in store.get_indexed(gallery, version, list(heirs)).items()
        for image in _handed_over(whole, heirs[key])
    ]
    if batch:
        store.upsert_images(gallery, version, batch)
    done_before = {key: row.same_as for key, row in known.items() if row.same_as}
    return done_before | {key: staying[0].image_id for key, staying in heirs.items()}


def _wrong_rows(rows: Sequence[ImageRecord]) -> Iterator[tuple[ImageRecord, str]]:
    """Yield the rows of one content that do not name its first holder, with that holder's id."""
    holders = [row for row in rows if row.holds_instances]
    if not holders:
        return
    first = min(holders, key=lambda row: row.uri).image_id
    for row in rows:
        if row.image_id != first and row.same_as != first:
            yield row, first


def _staying(
    rows: Collection[ImageRecord], holder: str, leaving: Collection[str]
) -> list[ImageRecord]:
    """The duplicates of a holder that do not leave with it, by name of the file."""
    found = [row for row in rows if row.same_as == holder and row.image_id not in leaving]
    return sorted(found, key=lambda row: row.uri)


def _handed_over(holder: IndexedImage, heirs: Sequence[ImageRecord]) -> Iterator[IndexedImage]:
    """The rows of a group after its first heir has taken over."""
    first, *others = heirs
    number = holder.record.num_instances
    yield IndexedImage(replace(first, same_as="", num_instances=number), holder.instances)
    for row in (holder.record, *others):
        yield IndexedImage(replace(row, same_as=first.image_id, num_instances=0), None)

"""Erases photos from all versions of a gallery, and everything that was kept about them.

An erasure that is interrupted is finished by the next one of the same gallery: what it is about is
kept in the store until all places are clean.

1. The photos become tombstones, and are noted in documents of the kind "erasing".
2. They are counted, and deleted from all versions, and from uploads, logs, canaries and reports.
3. Notes with the unsigned receipt, which names none of them, replace these documents.
4. The files of the store are rewritten without what was deleted.
5. The receipt joins the chain, and is handed to the caller. Then its notes are deleted.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

from reir.errors import DataError
from reir.operations.erase import receipts
from reir.operations.erase.places import (
    ErasedNames,
    ErasePlaces,
    erase_documents,
    erase_log_lines,
    erase_report_files,
    erase_searches,
    erase_uploads,
    known_expressions,
)
from reir.operations.erase.receipts import Receipt
from reir.operations.erase.selection import EraseScope, photos_with, select_photos
from reir.operations.erase.tombstones import FRESH_S, tombstones_of
from reir.operations.lease import hold_lease
from reir.records import ImageRecord
from reir.store.contract import InstanceStore
from reir.store.duplicates import remove_images

KIND = "erasing"
"""Kind of the documents of an erasure that has not ended."""

SETTLE_S = FRESH_S + 1.0
"""After so many seconds, runs of `reir index` that are going on have noticed new tombstones."""

# Documents may have 60,000 bytes; the rest is for the scope and the counts.
_PART_BYTES = 50_000
_CHUNK = 512
_NOTE, _HASHES = "receipt", "hashes"
"""Names of the note with the receipt, and of the notes with those of its hashes for which that one
has no room."""

Item = TypeVar("Item")
OnStep = Callable[[str], None]
OnReceipt = Callable[[Receipt], None]


def erase(  # noqa: PLR0913 - the options are keyword-only
    store: InstanceStore,
    gallery: str,
    scope: EraseScope,
    places: ErasePlaces,
    *,
    settle_s: float = SETTLE_S,
    on_step: OnStep = lambda _: None,
    on_receipt: OnReceipt = lambda _: None,
) -> Receipt:
    """Erase photos, and return the receipt.

    Args:
        store: the store.
        gallery: name of the gallery.
        scope: which photos.
        places: where else to look for traces.
        settle_s: how long to wait until indexing runs have noticed the tombstones.
        on_step: called with a sentence at the start of every step.
        on_receipt: called with the receipt, and before with that of an interrupted erasure; to
            write it to a file. If it fails, the erasure counts as interrupted, and the next one
            calls it again.

    Raises:
        DataError: no photo fits the scope, and no erasure was interrupted.
        JobRunning: another erasure of this gallery is going on.
        GalleryNotFound: there is no such gallery.
    """
    # Two erasures of a gallery would number their notes alike, and delete each other's notes.
    with hold_lease(store, f"erase/{gallery}"):
        finished = _finish_interrupted(store, gallery, on_receipt)
        found = select_photos(store, gallery, scope)
        if any(found.values()):
            on_step("noting what is erased")
            _note_photos(store, gallery, scope.kind, found)
        elif not store.find_documents(KIND, f"{gallery}/"):
            if finished is not None:
                return finished
            raise DataError(
                f"no photo of gallery '{gallery}' fits --{scope.kind} {scope.text!r}; `reir "
                f"search` and `reir failures` show photos with their URIs"
            )
        receipt = _erase_noted(store, gallery, places, settle_s, on_step)
        return _finish(store, gallery, receipt, on_receipt)


def is_interrupted(store: InstanceStore, gallery: str) -> bool:
    """Whether an erasure of a gallery was interrupted, so that it has to be finished."""
    return bool(store.find_documents(KIND, f"{gallery}/"))


def _note_photos(
    store: InstanceStore,
    gallery: str,
    scope: str,
    found: Mapping[str, Mapping[str, ImageRecord]],
) -> None:
    """Make photos tombstones, and note them in documents."""
    # Every content that a photo had in some version.
    rows = [row for of_version in found.values() for row in of_version.values()]
    # Before the notes, from which an interrupted erasure is finished: the photos must stay out,
    # too.
    tombstones_of(store, gallery).add(rows)
    texts: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for row in rows:
        texts[row.image_id, row.uri].update(receipts.texts_of(row))
    photos = [[*key, sorted(of_photo)] for key, of_photo in sorted(texts.items())]
    # Earlier notes, of an interrupted erasure or of this one, are kept.
    start = len(store.find_documents(KIND, f"{gallery}/"))
    for number, part in enumerate(_parts_of_bytes(photos), start):
        values = {"scope": scope, "photos": part}
        store.put_document(KIND, f"{gallery}/{number}", values)


def _erase_noted(
    store: InstanceStore, gallery: str, places: ErasePlaces, settle_s: float, on_step: OnStep
) -> Receipt:
    """Erase everything that is noted; return the receipt, which is not in the chain yet."""
    on_step("waiting until indexing runs have noticed")
    time.sleep(settle_s)
    # Only now: indexing runs that have noticed the tombstones write no further copies.
    _note_late_copies(store, gallery)
    notes = store.find_documents(KIND, f"{gallery}/")
    photos = [photo for note in notes.values() for photo in note["photos"]]
    names = _names_of(store, gallery, places, notes)
    on_step("deleting from all versions")
    photos_of, instances_of = _count_photos(store, gallery, notes)
    _delete_photos(store, gallery, sorted(names.image_ids))
    on_step("deleting uploads, searches, canaries, reports and log lines")
    canaries, sources, documents = erase_documents(store, gallery, names)
    key = receipts.new_key()
    texts = {text for _, _, of_photo in photos for text in of_photo}
    hashes = tuple(sorted(receipts.keyed_hash(key, text) for text in texts))
    receipt = Receipt(
        number=0,
        gallery=gallery,
        scope=next(iter(notes.values()))["scope"],
        erased_s=time.time(),
        photos=photos_of,
        instances=instances_of,
        uploads=erase_uploads(places, gallery, names),
        search_events=erase_searches(places, gallery, names),
        canaries=canaries,
        reports=documents + erase_report_files(places, names),
        log_lines=sum(erase_log_lines(path, names) for path in places.logs if path.exists()),
        sources=sources,
        is_gone_from_disk=False,
        key=key,
        hashes=hashes,
        hashes_digest=receipts.digest_of(hashes),
        previous="",
    )
    # Before the other notes are deleted: there is no moment at which nothing tells of the erasure.
    others = [*store.find_documents(KIND, f"{gallery}/")]
    _note_receipt(store, receipt)
    store.delete_documents(KIND, others)
    on_step("rewriting the files of the store")
    return receipt


def _note_late_copies(store: InstanceStore, gallery: str) -> None:
    """Note copies that indexing runs have written before they noticed what is erased."""
    notes = store.find_documents(KIND, f"{gallery}/").values()
    photos = [photo for note in notes for photo in note["photos"]]
    noted = {image_id for image_id, _, _ in photos}
    # As `receipts.texts_of` writes them: TENANT/CONTENT.
    pairs = (text.rpartition("/") for _, _, texts in photos for text in texts if "/" in text)
    found = photos_with(store, gallery, {(content, tenant) for tenant, _, content in pairs})
    late = {
        version: {key: row for key, row in rows.items() if key not in noted}
        for version, rows in found.items()
    }
    if any(late.values()):
        _note_photos(store, gallery, next(iter(notes))["scope"], late)


def _names_of(
    store: InstanceStore,
    gallery: str,
    places: ErasePlaces,
    notes: Mapping[str, Mapping[str, Any]],
) -> ErasedNames:
    """Return what the photos may be called, and note the expressions that describe them.

    Afterwards, these would be known no more if the erasure were interrupted.
    """
    photos = [photo for note in notes.values() for photo in note["photos"]]
    names = ErasedNames(
        image_ids=frozenset(each[0] for each in photos), uris=frozenset(each[1] for each in photos)
    )
    noted = {text for note in notes.values() for text in note.get("expressions", ())}
    found = sorted(known_expressions(store, places, gallery, names) - noted)
    scope = next(iter(notes.values()))["scope"]
    for number, part in enumerate(_parts_of_bytes(found), len(notes)):
        values = {"scope": scope, "photos": [], "expressions": part}
        store.put_document(KIND, f"{gallery}/{number}", values)
    return replace(names, expressions=frozenset({*noted, *found}))


def _count_photos(
    store: InstanceStore, gallery: str, notes: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, int], dict[str, int]]:
    """Return how many photos, and how many of their instances, are deleted from each version.

    They are counted before any is deleted, and the notes keep the counts: if the erasure is
    interrupted, the run that finishes it finds only what is left.
    """
    counted = {each[0] for note in notes.values() if "counts" in note for each in note["photos"]}
    photos: Counter[str] = Counter()
    instances: Counter[str] = Counter()
    for name, note in notes.items():
        counts = note.get("counts")
        if counts is None:
            image_ids = sorted({each[0] for each in note["photos"]} - counted)
            counted.update(image_ids)
            counts = _counts_of(store, gallery, image_ids)
            store.put_document(KIND, name, {**note, "counts": counts})
        photos.update({version: count[0] for version, count in counts.items()})
        instances.update({version: count[1] for version, count in counts.items()})
    return dict(photos), dict(instances)


def _counts_of(
    store: InstanceStore, gallery: str, image_ids: Sequence[str]
) -> dict[str, tuple[int, int]]:
    """Return how many of these photos, and of their instances, each version has."""
    counts = {}
    for version in (each.name for each in store.versions(gallery)):
        rows = store.get_images(gallery, version, image_ids).values()
        counts[version] = len(rows), sum(row.num_instances for row in rows)
    return counts


def _delete_photos(store: InstanceStore, gallery: str, image_ids: Sequence[str]) -> None:
    for version in (each.name for each in store.versions(gallery)):
        for chunk in _parts(image_ids, _CHUNK):
            remove_images(store, gallery, version, chunk)


def _note_receipt(store: InstanceStore, receipt: Receipt) -> None:
    """Note a receipt that is not in the chain yet."""
    kept = receipt.hashes[: receipts.MAX_KEPT_HASHES]
    others = receipt.hashes[receipts.MAX_KEPT_HASHES :]
    # First, since with the note of the receipt, the erasure counts as one that deleted everything.
    for number, part in enumerate(_parts(others, receipts.MAX_KEPT_HASHES)):
        store.put_document(KIND, f"{receipt.gallery}/{_HASHES}/{number}", {"hashes": part})
    note = {**asdict(receipt), "hashes": kept}
    store.put_document(KIND, f"{receipt.gallery}/{_NOTE}", note)


def _finish_interrupted(
    store: InstanceStore, gallery: str, on_receipt: OnReceipt
) -> Receipt | None:
    """Finish an erasure that had deleted everything, and return its receipt."""
    notes = store.find_documents(KIND, f"{gallery}/")
    note = notes.pop(f"{gallery}/{_NOTE}", None)
    parts = [name for name in notes if name.startswith(f"{gallery}/{_HASHES}/")]
    if note is None:
        # Their receipt was not noted yet, and will get another key; or it is in the chain.
        store.delete_documents(KIND, parts)
        return None
    hashes = sorted([*note["hashes"], *(each for name in parts for each in notes[name]["hashes"])])
    store.delete_documents(KIND, notes.keys() - set(parts))
    receipt = receipts.receipt_from({**note, "hashes": hashes})
    return _finish(store, gallery, receipt, on_receipt)


def _finish(store: InstanceStore, gallery: str, receipt: Receipt, on_receipt: OnReceipt) -> Receipt:
    """Rewrite the store's files, add the receipt to the chain, and hand it over."""
    versions = [each.name for each in store.versions(gallery)]
    # A list and not a generator, since `all` would stop at the first version that is not gone.
    is_gone = all([store.compact(gallery, version) for version in versions])
    # All erasures of a store share a chain, so they must not add to it at the same time.
    with hold_lease(store, "receipts"):
        known = receipts.chain(store)
        receipt = replace(
            receipt,
            number=len(known),
            previous=known[-1].hash if known else "",
            is_gone_from_disk=is_gone,
        )
        receipt = replace(receipt, hash=receipt.computed_hash)
        receipts.save_receipt(store, receipt)
    on_receipt(receipt)
    # Last: if this is interrupted, the next run adds a second receipt, but none is ever missing.
    parts = store.find_documents(KIND, f"{gallery}/{_HASHES}/")
    store.delete_documents(KIND, [f"{gallery}/{_NOTE}", *parts])
    return receipt


def _parts_of_bytes(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Yield parts of the items, each of which fits into a note."""
    part: list[Item] = []
    size = 0
    for item in items:
        length = len(json.dumps(item)) + len(", ")
        if part and size + length > _PART_BYTES:
            yield part
            part, size = [], 0
        part.append(item)
        size += length
    if part:
        yield part


def _parts(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]

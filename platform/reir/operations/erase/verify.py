"""Checks a receipt: that it is one of the chain, and that nothing of what was erased is left."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reir.errors import DataError
from reir.images.decode import canonical_uri, image_id
from reir.operations.canary import canaries_of
from reir.operations.erase import receipts
from reir.operations.erase.places import REINDEX_REPORT, ErasePlaces
from reir.operations.erase.receipts import Receipt
from reir.operations.feedback import read_feedback
from reir.operations.search_log import read_events
from reir.store.contract import InstanceStore

_CHUNK = 512


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes:
        what: a sentence about it.
        advice: what to do.
    """

    what: str
    advice: str


def verify_receipt(
    store: InstanceStore, receipt: Receipt, places: ErasePlaces
) -> Iterator[Finding]:
    """Yield everything that is wrong with a receipt, or left of what it says was erased."""
    yield from _check_chain(store, receipt)
    advice = f"erase it again: `reir erase {receipt.gallery} --photo IMAGE_ID`"
    # The gallery may have been deleted since. What follows this block is not part of the store.
    if receipt.gallery in store.galleries():
        for version in (each.name for each in store.versions(receipt.gallery)):
            for row in store.iter_images(receipt.gallery, version):
                if any(map(receipt.covers, receipts.texts_of(row))):
                    what = f"version {version} has photo {row.image_id} ({row.uri})"
                    yield Finding(what, advice)
            for key, uri in store.unfinished_images(receipt.gallery, version):
                if receipt.covers(key):
                    yield Finding(f"version {version} has a part of photo {key} ({uri})", advice)
        yield from _check_canaries(store, receipt)
        yield from _check_reports(store, receipt)
    yield from _check_report_files(receipt, places)
    yield from _check_uploads(receipt, places)
    yield from _check_searches(receipt, places)


def _check_chain(store: InstanceStore, receipt: Receipt) -> Iterator[Finding]:
    restore = "restore the receipt, or the store, from a backup"
    if receipt.hash != receipt.computed_hash:
        yield Finding("the receipt was changed: it does not have its own hash", restore)
    if receipts.digest_of(receipt.hashes) != receipt.hashes_digest:
        yield Finding("the receipt was changed: its list of hashes is not complete", restore)
    known = receipts.chain(store)
    if receipt.hash not in {each.hash for each in known}:
        yield Finding("the store does not know the receipt", "name the store with --store")
    previous = ""
    for number, each in enumerate(known):
        if each.number != number or each.previous != previous or each.hash != each.computed_hash:
            # Only the first break: a missing receipt shifts the positions of all that follow.
            yield Finding(f"the chain of receipts is broken at number {number}", restore)
            return
        previous = each.hash


def _check_canaries(store: InstanceStore, receipt: Receipt) -> Iterator[Finding]:
    for canary in canaries_of(store, receipt.gallery):
        if canary.uri and receipt.covers(image_id(canary.uri)):
            advice = f"reir canary rm {receipt.gallery} --expression {canary.expression!r}"
            yield Finding(f"the canary {canary.expression!r} names the photo", advice)


def _check_reports(store: InstanceStore, receipt: Receipt) -> Iterator[Finding]:
    for name, report in store.find_documents(REINDEX_REPORT, f"{receipt.gallery}/").items():
        if _names_photo(report, receipt):
            what = f"the report of version {name.partition('/')[2]} names a photo"
            yield Finding(what, "erase it again, or delete the report")


def _check_report_files(receipt: Receipt, places: ErasePlaces) -> Iterator[Finding]:
    for path in sorted(places.reports.glob("*/report.json")):
        if _names_photo(_read(path), receipt):
            yield Finding(f"{path} names a photo", "erase it again, or delete the report")


def _read(path: Path) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not a report of `reir reindex`: {error}") from error
    return report


def _names_photo(report: Mapping[str, Any], receipt: Receipt) -> bool:
    changes = [*report.get("lost", ()), *report.get("won", ())]
    uris = {change[key] for key in ("uri", "wrong_uri") for change in changes}
    return any(uri and receipt.covers(image_id(uri)) for uri in uris)


def _check_uploads(receipt: Receipt, places: ErasePlaces) -> Iterator[Finding]:
    folder = places.uploads / receipt.gallery
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.is_file() and receipt.covers(image_id(canonical_uri(path))):
            yield Finding(f"the upload {path} is one of the photos", "delete this file")


def _check_searches(receipt: Receipt, places: ErasePlaces) -> Iterator[Finding]:
    if not places.search_log.exists():
        return
    for event in read_events(places.search_log, receipt.gallery):
        hits = event.get("hits", ())
        if any(receipt.covers(each.get("image_id", "")) for each in hits):
            yield Finding(
                f"the search log in {places.search_log} names a photo ({event['time']})",
                "erase it again",
            )
    for said in read_feedback(places.search_log, receipt.gallery):
        if receipt.covers(said.image_id):
            yield Finding(
                f"feedback in {places.search_log} names a photo ({said.time.isoformat()})",
                "erase it again",
            )

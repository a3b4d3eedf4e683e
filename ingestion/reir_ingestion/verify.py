"""`reir index --verify`: does the gallery say what the source holds, and the store what both say?

Reads and compares; opens no image and needs no model. It changes nothing but the copy of the
instances that an embedded store keeps for its searches, which is written anew if it differs.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Literal, get_args

from rich.table import Table

from reir.records import ImageRecord
from reir.store.contract import InstanceStore
from reir_ingestion.loading import Task, is_settled
from reir_ingestion.sources import Source

CHUNK = 512
"""Images that one look-up takes."""

MAX_EXAMPLES = 5

Difference = Literal["new", "changed", "gone", "unfinished", "damaged", "orphans"]
DIFFERENCES: tuple[Difference, ...] = get_args(Difference)
MEANING: Mapping[Difference, str] = {
    "new": "in the source, not in the gallery",
    "changed": "the file has another size or time than when it was indexed",
    "gone": "in the gallery, their file is gone from the source",
    "unfinished": "a run was cut short while it wrote them",
    "damaged": "the store has not all the instances that the ledger tells of",
    "orphans": "instances that no image of the ledger accounts for",
}


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What was compared and what differs.

    Attributes:
        gallery, version: what was compared.
        listed: images in the source.
        num_images: ledger rows.
        num_instances: instances that the ledger and the store agree on.
        failed: images that cannot be indexed and are known as such; no difference.
        unlisted: folders of the source that could not be listed; no difference, but what
            lies in them was not compared.
        differences: kind -> how many images, or instances for orphans.
        examples: kind -> a few URIs.
        mended: images that searches saw otherwise than they are stored, until just now; no
            difference.
    """

    gallery: str
    version: str
    listed: int
    num_images: int
    num_instances: int
    failed: int
    unlisted: int
    differences: Mapping[Difference, int]
    examples: Mapping[Difference, Sequence[str]]
    mended: int = 0

    @property
    def is_sound(self) -> bool:
        """Whether source, ledger and store agree."""
        return not any(self.differences.values())

    def mends(self, source: str, where: str = "") -> Iterator[str]:
        """Yield what to type to mend the differences.

        Args:
            source: as the user wrote it.
            where: options that name the store.
        """
        command = f"reir index {shlex.quote(source)} --gallery {self.gallery}{where}"
        found = self.differences
        if found["damaged"]:
            yield f"{command} --repair"
        elif found["new"] or found["changed"] or found["unfinished"]:
            yield command
        if found["gone"]:
            yield f"{command} --prune"
        if found["orphans"] and not (found["damaged"] or found["unfinished"]):
            yield f"reir rm {self.gallery}{where} && {command}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self) | {"is_sound": self.is_sound}

    def table(self) -> Table:
        """Return the comparison for a terminal."""
        table = Table(title=f"gallery {self.gallery}, version {self.version}", show_header=False)
        table.add_column(style="bold")
        table.add_column(justify="right")
        table.add_column(style="dim")
        table.add_row("in the source", f"{self.listed:,}", "images")
        table.add_row("in the ledger", f"{self.num_images:,}", f"images, {self.failed:,} failed")
        table.add_row("in the store", f"{self.num_instances:,}", "instances, as the ledger says")
        if self.unlisted:
            table.add_row("not listed", f"{self.unlisted:,}", "not compared")
        if self.mended:
            remark = "images that differed in the copy that searches read"
            table.add_row("repaired", f"{self.mended:,}", remark)
        for kind in DIFFERENCES:
            count = self.differences[kind]
            style = "red" if count else None
            table.add_row(kind, f"{count:,}", MEANING[kind] if count else "", style=style)
        return table


@dataclass
class _Findings:
    """Differences found so far."""

    counts: Counter[Difference] = field(default_factory=Counter)
    examples: dict[Difference, list[str]] = field(default_factory=dict)

    def add(self, kind: Difference, uri: str) -> None:
        """Count one, and keep it if it is among the first."""
        self.counts[kind] += 1
        kept = self.examples.setdefault(kind, [])
        if len(kept) < MAX_EXAMPLES:
            kept.append(uri)


def verify(source: Source, gallery: str, store: InstanceStore, version: str) -> VerifyReport:
    """Compare a source, the ledger of a version and its instances.

    Raises:
        GalleryNotFound: there is no such gallery or version.
        StoreUnavailable: the store cannot be reached.
    """
    place = gallery, version
    found = _Findings()
    unlisted: list[str] = []
    listed = _compare_source(source, store, place, found, unlisted)
    rows = store.iter_images(*place)
    num_images = failed = present = 0
    while chunk := list(islice(rows, CHUNK)):
        num_images += len(chunk)
        failed += sum(row.status == "failed" for row in chunk)
        for row in chunk:
            if source.has_lost(row.uri):
                found.add("gone", row.uri)
        for each in _stored(store, place, chunk):
            present += each.num_instances
            if not each.is_sound:
                found.add("damaged", each.record.uri)
    for _, uri in store.unfinished_images(*place):
        found.add("unfinished", uri)
    found.counts["orphans"] = store.num_stored(*place) - present
    return VerifyReport(
        gallery=gallery,
        version=version,
        listed=listed,
        num_images=num_images,
        num_instances=present,
        failed=failed,
        unlisted=len(unlisted),
        differences={kind: found.counts[kind] for kind in DIFFERENCES},
        examples=found.examples,
        mended=store.compare_reader(*place),
    )


def damaged_images(store: InstanceStore, gallery: str, version: str) -> list[str]:
    """Ids of the images whose instances are not all there; deleted, they are indexed anew."""
    rows = store.iter_images(gallery, version)
    damaged: list[str] = []
    while chunk := list(islice(rows, CHUNK)):
        stored = _stored(store, (gallery, version), chunk)
        damaged += [each.record.image_id for each in stored if not each.is_sound]
    return damaged


@dataclass(frozen=True)
class _Stored:
    """A ledger row, how many of its instances are stored, and whether that is as it should be."""

    record: ImageRecord
    num_instances: int
    is_sound: bool


def _stored(
    store: InstanceStore, place: tuple[str, str], chunk: Sequence[ImageRecord]
) -> Iterator[_Stored]:
    """Look up what is stored of these images; a duplicate is as sound as its holder is there."""
    instances = store.get_instances(*place, [row.image_id for row in chunk])
    holders = store.get_images(*place, [row.same_as for row in chunk if row.same_as])
    for row in chunk:
        number = len(instances.get(row.image_id, ()))
        holder = holders.get(row.same_as)
        held = holder is not None and holder.holds_instances
        same = holder is not None and holder.content_hash == row.content_hash
        is_sound = number == row.num_instances and (not row.same_as or (held and same))
        yield _Stored(row, number, is_sound)


def _compare_source(
    source: Source,
    store: InstanceStore,
    place: tuple[str, str],
    found: _Findings,
    unlisted: list[str],
) -> int:
    """Find the files that the ledger does not know as they are; returns how many were listed."""
    listed = 0
    files = source.files(lambda folder, _: unlisted.append(folder))
    while chunk := list(islice(files, CHUNK)):
        listed += len(chunk)
        tasks = [Task(file, file.uri, None) for file in chunk]
        ledger = store.get_images(*place, [task.image_id for task in tasks])
        for task in tasks:
            known = ledger.get(task.image_id)
            if known is None:
                found.add("new", task.uri)
            elif known.status == "indexed" and not is_settled(known, task.file, retry_failed=False):
                found.add("changed", task.uri)
    return listed

"""`reir index --verify`: compare the source, the ledger and the stored instances.

The comparison opens no image and needs no model. It may change only one thing: if the copy of the
instances that an embedded store keeps for searches differs from the store, the copy is rebuilt.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Literal, get_args

from rich.table import Table

from reir.operations.erase.tombstones import tombstones_of
from reir.records import ImageRecord
from reir.store.contract import InstanceStore
from reir_ingestion.loading import PendingImage, is_up_to_date
from reir_ingestion.sources import Source

CHUNK = 512
"""Number of images in one look-up."""

MAX_EXAMPLES = 5

Difference = Literal["new", "changed", "gone", "unfinished", "damaged", "orphans"]
DIFFERENCES: tuple[Difference, ...] = get_args(Difference)
MEANING: Mapping[Difference, str] = {
    "new": "in the source, but not in the gallery",
    "changed": "the size or time of the file is not that of the last run",
    "gone": "in the gallery, but the file is gone from the source",
    "unfinished": "a run was interrupted while it wrote them",
    "damaged": "the store lacks some of the instances that the ledger counts",
    "orphans": "instances without an image in the ledger",
}


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Result of a comparison.

    Attributes:
        gallery, version: the version that was compared.
        listed: number of images in the source.
        num_images: number of ledger rows.
        num_instances: number of stored instances of the images in the ledger.
        failed: number of images that the ledger lists as failed; these are not differences.
        unlisted: number of folders of the source that could not be listed, so that the files in
            them were not compared; these are not differences.
        differences: kind of difference -> number of images, or of instances for orphans.
        examples: kind of difference -> a few URIs.
        repaired: number of images that differed in the copy that searches read, which was rebuilt;
            these are not differences.
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
    repaired: int = 0

    @property
    def is_consistent(self) -> bool:
        """Whether source, ledger and store agree."""
        return not any(self.differences.values())

    def repair_commands(self, source: str, where: str = "") -> Iterator[str]:
        """Yield the commands that repair the differences.

        Args:
            source: the source as the user wrote it.
            where: options that name the store.
        """
        command = f"reir index {shlex.quote(source)} --gallery {self.gallery}{where}"
        found = self.differences
        # A run with --repair also indexes what is new, changed or unfinished.
        if found["damaged"]:
            yield f"{command} --repair"
        elif found["new"] or found["changed"] or found["unfinished"]:
            yield command
        if found["gone"]:
            yield f"{command} --prune"
        # The instances of unfinished images count as orphans until the run above completes these
        # images. Only if nothing else is wrong does the gallery have to be built again.
        if found["orphans"] and not (found["damaged"] or found["unfinished"]):
            yield f"reir rm {self.gallery}{where} && {command}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self) | {"is_consistent": self.is_consistent}

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
        if self.repaired:
            remark = "images that differed in the copy for searches"
            table.add_row("repaired", f"{self.repaired:,}", remark)
        for kind in DIFFERENCES:
            count = self.differences[kind]
            style = "red" if count else None
            table.add_row(kind, f"{count:,}", MEANING[kind] if count else "", style=style)
        return table


@dataclass
class _DifferenceLog:
    """The differences that have been found so far."""

    counts: Counter[Difference] = field(default_factory=Counter)
    examples: dict[Difference, list[str]] = field(default_factory=dict)

    def add(self, kind: Difference, uri: str) -> None:
        """Count a difference, and keep the URI of the first few as examples."""
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
    found = _DifferenceLog()
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
        for each in _look_up_stored(store, place, chunk):
            present += each.num_instances
            if not each.is_consistent:
                found.add("damaged", each.record.uri)
    for _, uri in store.unfinished_images(*place):
        found.add("unfinished", uri)
    # The store can count instances without an image, but not list them.
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
        repaired=store.repair_search_copy(*place),
    )


def damaged_images(store: InstanceStore, gallery: str, version: str) -> list[str]:
    """Return the ids of images whose instances are not all in the store.

    If these images are deleted from the gallery, the next run indexes them again.
    """
    rows = store.iter_images(gallery, version)
    damaged: list[str] = []
    while chunk := list(islice(rows, CHUNK)):
        stored = _look_up_stored(store, (gallery, version), chunk)
        damaged += [each.record.image_id for each in stored if not each.is_consistent]
    return damaged


@dataclass(frozen=True)
class _StoredImage:
    """A ledger row, the number of its stored instances, and whether the two agree."""

    record: ImageRecord
    num_instances: int
    is_consistent: bool


def _look_up_stored(
    store: InstanceStore, place: tuple[str, str], chunk: Sequence[ImageRecord]
) -> Iterator[_StoredImage]:
    """Look up the stored instances of images; a duplicate needs a holder with the same content."""
    instances = store.get_instances(*place, [row.image_id for row in chunk])
    holders = store.get_images(*place, [row.same_as for row in chunk if row.same_as])
    for row in chunk:
        number = len(instances.get(row.image_id, ()))
        holder = holders.get(row.same_as)
        held = holder is not None and holder.holds_instances
        same = holder is not None and holder.content_hash == row.content_hash
        is_consistent = number == row.num_instances and (not row.same_as or (held and same))
        yield _StoredImage(row, number, is_consistent)


def _compare_source(
    source: Source,
    store: InstanceStore,
    place: tuple[str, str],
    found: _DifferenceLog,
    unlisted: list[str],
) -> int:
    """Find files that are new or changed; return how many files were listed.

    A file that `reir erase` has deleted from the gallery, by its name, is left out by every run, so
    it is not new.
    """
    erased = tombstones_of(store, place[0])
    listed = 0
    files = source.files(lambda folder, _: unlisted.append(folder))
    while chunk := list(islice(files, CHUNK)):
        listed += len(chunk)
        images = [PendingImage(file) for file in chunk]
        ledger = store.get_images(*place, [image.image_id for image in images])
        for image in images:
            previous = ledger.get(image.image_id)
            if previous is None:
                if not erased.covers_uri(image.file.uri):
                    found.add("new", image.file.uri)
            # A failed image is not a difference, even if the next run would try it again.
            elif previous.status == "indexed" and not is_up_to_date(
                previous, image.file, retry_failed=False
            ):
                found.add("changed", image.file.uri)
    return listed

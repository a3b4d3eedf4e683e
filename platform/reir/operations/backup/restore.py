"""`restore_backup`: writes a backup into a store as a new version, and verifies it.

An interrupted restore leaves a document with the checksum of its backup. The next restore of the
same backup finds the version by it, and writes only the photos that are missing.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reir.errors import ConfigError, GalleryNotFound, StoreDamaged
from reir.images.decode import canonical_uri
from reir.operations.backup.reports import Progress, RestoreReport
from reir.operations.backup.saved import SavedBackup, open_backup
from reir.operations.backup.verify import Sample, Verdict, difference_of, same_image, verify
from reir.operations.erase import tombstones
from reir.operations.lease import hold_lease
from reir.operations.live_history import make_live
from reir.records import IndexedImage
from reir.store.contract import InstanceStore, ServerStore, VersionInfo
from reir.store.names import check_name

KIND = "restore"
"""Kind of the documents; there is one for each version whose restore has not ended."""

INDEX_TIMEOUT_S = 3600.0
"""How long to wait until a server has built the index of the new version."""

_BATCH_PHOTOS = 512
_BATCH_INSTANCES = 4096


@dataclass(frozen=True, kw_only=True)
class RestoreRequest:
    """What to restore.

    Attributes:
        source: folder of the backup, as `open_folder` takes it.
        gallery: gallery to restore into; empty for the one that was backed up.
        version: name of the new version; empty for the one that was backed up, with a number if
            that name is taken.
        promote: whether to make the version live; None if the gallery has no live version.
    """

    source: str
    gallery: str = ""
    version: str = ""
    promote: bool | None = None


def restore_backup(
    store: InstanceStore, request: RestoreRequest, progress: Progress
) -> RestoreReport:
    """Check a backup, write it into a store, and compare the two.

    If they differ, the report says how, and the version is not made live.

    Args:
        store: the store.
        request: what to restore.
        progress: called with bytes that were checked, and then with photos that were written.

    Raises:
        ConfigError: a name is not allowed, or the version exists with another content.
        DataError: there is no finished backup, or it is damaged; nothing has been written.
        JobRunning: another process restores a backup into this gallery.
        StoreDamaged: the gallery exists and is damaged.
    """
    began_s = time.monotonic()
    backup = open_backup(request.source)
    gallery = check_name("gallery", request.gallery or backup.manifest.gallery)
    if request.version:
        check_name("version", request.version)
    backup.check(progress)
    # No photo may be erased between the check whether it was and its write.
    with hold_lease(store, f"{KIND}/{gallery}"), hold_lease(store, f"erase/{gallery}"):
        erased = tombstones.tombstones_of(store, gallery)
        # Before anything else: the backup may contain a photo that was erased while it was written.
        num_merged = erased.merge(backup.manifest.documents.get(tombstones.KIND, {}).values())
        rows = itertools.chain.from_iterable(backup.record_parts())
        backup = backup.without(filter(erased.covers, rows))
        job = _RestoreJob(store, gallery, backup, erased, progress)
        version = job.begin(request.version)
        existed = version not in job.begun()
        written, verdict = job.write_and_verify(version)
        documents = 0
        if not verdict.problems:
            documents = num_merged + job.restore_documents(version)
            job.promote(version, request.promote)
            store.delete_documents(KIND, [f"{gallery}/{version}"])
        is_live = job.live_version() == version
    return RestoreReport(
        gallery=gallery,
        version=version,
        source=backup.folder.place,
        existed=existed,
        counts=backup.manifest.counts,
        written=written,
        erased=len(backup.left_out),
        problems=verdict.problems,
        queries=verdict.queries,
        recall=verdict.recall,
        live=is_live,
        documents=documents,
        seconds=time.monotonic() - began_s,
    )


@dataclass(frozen=True)
class _RestoreJob:
    """Writes one backup into one gallery; the caller holds the lease."""

    store: InstanceStore
    gallery: str
    backup: SavedBackup
    erased: tombstones.Tombstones
    progress: Progress

    def begin(self, wanted: str) -> str:
        """Choose the version and create it, unless it exists; return its name."""
        version, exists = self._choose_version(wanted)
        if not exists:
            # The document first: without it, the version would look like somebody else's.
            document = {
                "checksum": self.backup.manifest.checksum,
                "begun_s": time.time(),
                "new_gallery": self.gallery not in self.store.galleries(),
            }
            self.store.put_document(KIND, self._name(version), document)
        # Also if it exists: its creation may have been interrupted.
        self.store.create_version(self.gallery, version, self.backup.manifest.spec)
        return version

    def write_and_verify(self, version: str) -> tuple[int, Verdict]:
        """Write the photos that are missing; return their number, and how the version compares."""
        sample = Sample(self.backup)
        total = self.backup.num_photos
        num_photos = num_instances = done = 0
        for images in self.backup.parts():
            sample.add(images)
            ids = [each.record.image_id for each in images]
            stored = self.store.get_images(self.gallery, version, ids)
            missing = [each for each in images if stored.get(each.record.image_id) != each.record]
            done += len(images) - len(missing)
            for batch in _batches(missing):
                self.store.upsert_images(self.gallery, version, batch)
                num_photos += len(batch)
                num_instances += sum(each.record.num_instances for each in batch)
                done += len(batch)
                self.progress("photos", done, total)
            self.progress("photos", done, total)
        if isinstance(self.store, ServerStore):
            self.progress("indexes", 0, 1)
            self.store.wait_until_indexed(
                self.gallery, version, num_upserted=num_instances, timeout_s=INDEX_TIMEOUT_S
            )
            self.progress("indexes", 1, 1)
        info = self._versions()[version]
        return num_photos, verify(self.store, self.gallery, info, self.backup, sample)

    def restore_documents(self, version: str) -> int:
        """Write canaries and sources, unless the gallery existed before; return their number."""
        found = self.store.find_documents(KIND, self._name(version)).get(self._name(version), {})
        documents = self.backup.manifest.documents if found.get("new_gallery") else {}
        wanted = {
            (kind, name): value
            for kind in documents.keys() - {tombstones.KIND}
            for name, value in documents[kind].items()
            if not _names_photo(value, self.erased)
        }
        for (kind, name), value in wanted.items():
            self.store.put_document(kind, self._name(name), value)
        return len(wanted)

    def promote(self, version: str, wanted: bool | None) -> None:
        """Make the version live if that is wanted, or if none is live and nothing else is said."""
        if wanted or (wanted is None and not self.live_version()):
            make_live(self.store, self.gallery, version, by="reir restore")

    def live_version(self) -> str:
        """Return the live version; empty if there is none."""
        try:
            return self.store.live_version(self.gallery)
        except GalleryNotFound:
            return ""

    def begun(self) -> list[str]:
        """Return the versions into which a restore of this backup was begun and has not ended."""
        found = self.store.find_documents(KIND, f"{self.gallery}/")
        return [
            name.removeprefix(f"{self.gallery}/")
            for name, value in found.items()
            if value["checksum"] == self.backup.manifest.checksum
        ]

    def _choose_version(self, wanted: str) -> tuple[str, bool]:
        """Return the name of the version, and whether it exists."""
        versions = self._versions()
        for name in self.begun():
            # A restore ends when its version becomes live, so a live one is somebody else's.
            if name in versions and not versions[name].live and wanted in ("", name):
                return name, True
        first = wanted or self.backup.manifest.version
        for number in itertools.count(1):
            name = first if number == 1 else f"{first}-{number}"
            if name not in versions:
                return name, False
            if self._has_content(versions[name]):
                return name, True
            if wanted:
                raise ConfigError(
                    f"version '{wanted}' of gallery '{self.gallery}' exists with another content; "
                    f"choose another name with --version, or leave it out to get a free one"
                )
        raise AssertionError("unreachable: some number is free")

    def _has_content(self, info: VersionInfo) -> bool:
        """Whether a version has the content of the backup, bit by bit."""
        # The ledger first: it usually differs, and the vectors of a large gallery take long.
        if difference_of(self.store, self.gallery, info, self.backup):
            return False
        for batch in itertools.chain.from_iterable(map(_batches, self.backup.parts())):
            ids = [each.record.image_id for each in batch]
            stored = self.store.get_indexed(self.gallery, info.name, ids)
            if not all(same_image(stored.get(each.record.image_id), each) for each in batch):
                return False
        return True

    def _versions(self) -> dict[str, VersionInfo]:
        if self.gallery not in self.store.galleries():
            return {}
        try:
            return {each.name: each for each in self.store.versions(self.gallery)}
        except StoreDamaged as error:
            raise StoreDamaged(
                f"{error}; to restore the backup, delete the gallery first, or choose another name "
                f"with --gallery"
            ) from error

    def _name(self, name: str) -> str:
        """Return the name of a document of the gallery."""
        return f"{self.gallery}/{name}"


def _names_photo(document: Mapping[str, Any], erased: tombstones.Tombstones) -> bool:
    """Whether a canary or a source is a photo that was erased since."""
    if uri := document.get("uri"):
        return erased.covers_uri(uri)
    text = document.get("text", "")
    return bool(text) and erased.covers_uri(text if "://" in text else canonical_uri(text))


def _batches(images: Sequence[IndexedImage]) -> Iterator[list[IndexedImage]]:
    """Yield batches with a limited number of photos and instances."""
    batch: list[IndexedImage] = []
    num_instances = 0
    for image in images:
        batch.append(image)
        num_instances += image.record.num_instances
        if num_instances >= _BATCH_INSTANCES or len(batch) >= _BATCH_PHOTOS:
            yield batch
            batch, num_instances = [], 0
    if batch:
        yield batch

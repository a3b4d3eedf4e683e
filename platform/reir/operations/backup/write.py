"""`write_backup`: writes a backup of a version that others may be writing at the same time."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from reir.errors import ConfigError, DataError, GalleryNotFound, StoreError
from reir.operations.backup.folder import CLAIM, BackupFolder, open_folder
from reir.operations.backup.manifest import FORMAT, MANIFEST, Manifest, write_manifest
from reir.operations.backup.pairs import PairWriter
from reir.operations.backup.reports import BackupReport, Progress
from reir.operations.backup.sweeps import BackupJob
from reir.operations.documents import OF_BACKUP
from reir.store.contract import InstanceStore, VersionInfo

KIND = "backup"
"""Kind of the documents; there is one for each version that was backed up."""


def write_backup(
    store: InstanceStore, gallery: str, version: str, dest: str, progress: Progress
) -> BackupReport:
    """Write a backup of a version into a new folder, and record it in the store.

    Args:
        store: the store.
        gallery: name of the gallery.
        version: name of the version.
        dest: the folder, as `open_folder` takes it, which must be empty or not exist. "{date}" and
            "{time}" in it stand for the current date and time (UTC).
        progress: called with the number of photos that were read.

    Raises:
        ConfigError: the folder is not empty, cannot be used, or another backup is written into it.
        DataError: a file cannot be written. After this and all other errors, the files that were
            written are deleted.
        GalleryNotFound: there is no such gallery or version.
        StoreError: the version was deleted meanwhile, or photos are written too often to be read.
    """
    begun_s = time.time()
    folder = open_folder(_with_time(dest, begun_s))
    _check_empty(folder)
    info = _info(store, gallery, version)
    # After all checks, so that a wrong name of a gallery does not leave an empty folder behind.
    folder = folder.claimed()
    writer = PairWriter(folder, info.spec.dim)

    def show(num_read: int) -> None:
        # More photos may be read than there were at first: new ones, and some of them again.
        progress("photos", min(num_read, info.num_images), info.num_images)

    job = BackupJob(store, gallery, version, writer, show)
    try:
        # Again, because another backup may have been written and released before the claim.
        _check_empty(folder)
        job.run()
        manifest = _finish(store, gallery, info, writer, begun_s)
        _check_sizes(folder, manifest)
        write_manifest(folder, manifest)
    except BaseException as error:  # also after Ctrl-C: without a manifest, the files are useless
        writer.delete()
        folder.release()
        if isinstance(error, GalleryNotFound):
            raise StoreError(
                f"version '{version}' of gallery '{gallery}' was deleted while it was backed up, "
                f"so there is no backup in {folder.place}"
            ) from error
        raise
    folder.release()
    report = BackupReport(
        gallery=gallery,
        version=version,
        dest=folder.place,
        begun_s=begun_s,
        ended_s=manifest.ended_s,
        counts=manifest.counts,
        num_bytes=manifest.num_bytes,
        read_again=job.read_again,
        incomplete=len(job.incomplete),
        orphans=len(job.orphans),
    )
    with suppress(StoreError):  # a store in a read-only folder can be backed up, too
        _record(store, report)
        report = replace(report, recorded=True)
    return report


def recorded_backups(store: InstanceStore, gallery: str) -> list[dict[str, Any]]:
    """Return the last backup of each version of a gallery, the most recent one last."""
    found = store.find_documents(KIND, f"{gallery}/")
    backups = [
        {"version": name.removeprefix(f"{gallery}/"), **values} for name, values in found.items()
    ]
    return sorted(backups, key=lambda each: float(each["ended_s"]))


def _info(store: InstanceStore, gallery: str, version: str) -> VersionInfo:
    for info in store.versions(gallery):
        if info.name == version:
            return info
    raise GalleryNotFound(
        f"gallery '{gallery}' has no version '{version}'; `reir versions {gallery}` lists them"
    )


def _check_empty(folder: BackupFolder) -> None:
    """Raise `ConfigError` if the folder has more than the claim of this backup."""
    names = [name for name in folder.sizes() if not (folder.claim and name == CLAIM)]
    if MANIFEST in names:
        raise ConfigError(f"{folder.place} already contains a backup; name another folder")
    if CLAIM in names:
        raise folder.taken_error()
    if names:
        raise ConfigError(
            f"the folder {folder.place} must be empty or not exist, but it contains {names[0]}; "
            f"name another folder, or delete this one if a backup into it was interrupted"
        )


def _finish(
    store: InstanceStore, gallery: str, info: VersionInfo, writer: PairWriter, begun_s: float
) -> Manifest:
    """Complete the files, and return the manifest of the backup."""
    files, counts = writer.finish()
    documents = {
        kind: {
            name.removeprefix(f"{gallery}/"): value
            for name, value in store.find_documents(kind, f"{gallery}/").items()
        }
        for kind in OF_BACKUP
    }
    ended_s = time.time()
    return Manifest(
        format=FORMAT,
        gallery=gallery,
        version=info.name,
        spec=info.spec,
        begun_s=begun_s,
        ended_s=ended_s,
        begun=_iso(begun_s),
        ended=_iso(ended_s),
        counts=counts,
        files=tuple(files),
        documents=documents,
    )


def _check_sizes(folder: BackupFolder, manifest: Manifest) -> None:
    """Check that the folder has the files of the backup, and no others.

    Raises:
        DataError: it differs, which happens if two backups are written into one folder.
    """
    wanted = {file.name: file.bytes for file in manifest.files}
    found = folder.sizes()
    found.pop(CLAIM, None)
    if found != wanted:
        differing = sorted({name for name, _ in found.items() ^ wanted.items()})
        raise DataError(
            f"{folder.place}/{differing[0]} is not the file that was written; another process "
            f"seems to use the folder: name another one"
        )


def _record(store: InstanceStore, report: BackupReport) -> None:
    document = {
        "dest": report.dest,
        "begun_s": report.begun_s,
        "ended_s": report.ended_s,
        "photos": report.counts.photos,
        "instances": report.counts.instances,
        "bytes": report.num_bytes,
        "seconds": round(report.seconds, 3),
    }
    store.put_document(KIND, f"{report.gallery}/{report.version}", document)


def _with_time(dest: str, now_s: float) -> str:
    """Return a folder name with the time in the place of "{date}" and "{time}"."""
    now = datetime.fromtimestamp(now_s, UTC)
    return dest.replace("{date}", f"{now:%Y-%m-%d}").replace("{time}", f"{now:%Y%m%dT%H%M%SZ}")


def _iso(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="seconds")

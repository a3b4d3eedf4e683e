"""Backups while another process writes: every photo is as it was at one moment."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from reir.operations.backup import sweeps
from reir.operations.backup.saved import open_backup
from reir.operations.backup.write import write_backup
from reir.records import ImageRecord, IndexedImage
from reir.store import InstanceStore, open_store
from reir_testing.rewriting import is_mixed

V = "v1"
NUM_PHOTOS = 60


@contextmanager
def writer(location: str, gallery: str) -> Iterator[None]:
    """Run a process that changes photos, a few at a time and without a pause."""
    command = [sys.executable, "-m", "reir_testing.rewriting"]
    with subprocess.Popen(
        [*command, location, gallery, V, str(NUM_PHOTOS)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "filled\n"
        try:
            yield
            assert process.poll() is None, "the writer has failed"
        finally:
            process.kill()


def check(
    images: dict[str, IndexedImage],
    before: dict[str, ImageRecord],
    after: dict[str, ImageRecord],
) -> None:
    """Check a backup, given the ledger before and after it."""
    mixed = [image.record for image in images.values() if is_mixed(image)]
    assert mixed == []
    for key, image in images.items():
        record = image.record
        if record.same_as:
            holder = images[record.same_as].record
            assert holder.holds_instances
            assert holder.content_hash == record.content_hash
        # The modification time is the number of the write, which only grows.
        assert key not in before or before[key].mtime_ns <= record.mtime_ns
        assert key not in after or record.mtime_ns <= after[key].mtime_ns
    unchanged = {key for key, record in before.items() if after.get(key) == record}
    assert unchanged <= images.keys()


def check_backups(store: InstanceStore, gallery: str, folder: Path, seconds: float) -> int:
    """Write backups for some time and check each; return how many photos were read again."""

    def ledger() -> dict[str, ImageRecord]:
        return {record.image_id: record for record in store.iter_images(gallery, V)}

    ends_s, read_again, number = time.monotonic() + seconds, 0, 0
    while time.monotonic() < ends_s or number < 2:
        before, place = ledger(), folder / str(number)
        report = write_backup(store, gallery, V, str(place), lambda *_: None)
        images = {
            image.record.image_id: image
            for part in open_backup(str(place)).parts()
            for image in part
        }
        check(images, before, ledger())
        assert len(images) == report.counts.photos
        read_again += report.read_again
        number += 1
    return read_again


def test_in_an_embedded_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Small batches, between which the writer gets its turn.
    monkeypatch.setattr(sweeps, "_BATCH_PHOTOS", 8)
    place = str(tmp_path / "store")
    with writer(place, "busy"), closing(open_store(place)) as store:
        assert check_backups(store, "busy", tmp_path, 15) > 0


@pytest.mark.milvus
def test_on_a_server(tmp_path: Path, milvus_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "_BATCH_PHOTOS", 8)
    gallery = f"busy{os.getpid()}"
    with closing(open_store(milvus_uri)) as store:
        try:
            with writer(milvus_uri, gallery):
                assert check_backups(store, gallery, tmp_path, 60) > 0
        finally:
            store.drop_gallery(gallery)

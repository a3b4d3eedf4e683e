"""The whole pipeline with a memory store and the fake encoder."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reir.errors import (
    ConfigError,
    GalleryNotFound,
    SourceError,
)
from reir.images.decode import canonical_uri, image_id
from reir.index_report import IndexProgress, IndexReport
from reir.records import ImageRecord, IndexedImage, Instances, RgbImage
from reir.store.memory import MemoryStore
from reir_ingestion import stages
from reir_ingestion.pipeline import IndexOptions, index, version_name
from reir_testing import FakeEncoder
from reir_testing.ingestion import random_scene, stored_rows, write_scenes


class CountingEncoder(FakeEncoder):
    """Notes how many photos each call had."""

    def __init__(self, num_candidates: int = 30) -> None:
        super().__init__(num_candidates)
        self.batches: list[int] = []

    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        self.batches.append(len(images))
        return super().encode_images(images)

    @property
    def count(self) -> int:
        return sum(self.batches)


def ledger_row(store: MemoryStore, path: Path, gallery: str = "g") -> ImageRecord:
    key = image_id(canonical_uri(path))
    return store.get_images(gallery, store.live_version(gallery), [key])[key]


def summary(report: IndexReport) -> tuple[int, int, int, int]:
    return report.new, report.changed, report.unchanged, report.num_failed


def age(path: Path) -> None:
    """Give a file another time than it had."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - 10**9))


def test_every_photo_is_searchable_and_in_the_ledger(store: MemoryStore, photos: Path) -> None:
    encoder = FakeEncoder()
    report = index(photos, "g", store, encoder, options=IndexOptions(batch_size=8))
    assert summary(report) == (20, 0, 0, 0)
    version = store.live_version("g")
    assert report.version == version
    for path in sorted(photos.iterdir()):
        image = np.array(Image.open(path).convert("RGB"))
        (expected,) = encoder.encode_images([image])
        row = ledger_row(store, path)
        assert (row.width_px, row.height_px, row.num_instances) == (160, 120, len(expected))
        assert row.size_bytes == path.stat().st_size
        found = store.get_instances("g", version, [row.image_id], with_vectors=True)[row.image_id]
        np.testing.assert_allclose([each.box for each in found], expected.boxes, atol=1e-6)
        assert all(each.uri == canonical_uri(path) for each in found)
    (info,) = store.versions("g")
    assert report.instances == info.num_instances
    assert report.num_images == info.num_images == 20
    assert set(report.stage_seconds) == {"list", "read", "decode", "encode", "store"}
    assert all(seconds > 0 for seconds in report.stage_seconds.values())


def test_a_second_run_reads_and_encodes_nothing(
    store: MemoryStore, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(photos, "g", store, FakeEncoder())
    before = stored_rows(store, "g")
    encoder = CountingEncoder()

    def refuse(*_: object) -> None:
        raise AssertionError("nothing is to be read or written")

    monkeypatch.setattr(store, "upsert_images", refuse)
    monkeypatch.setattr("reir_ingestion.sources.local.read_bytes", refuse)
    report = index(photos, "g", store, encoder)
    assert summary(report) == (0, 0, 20, 0)
    assert (encoder.count, report.read, report.instances) == (0, 0, 0)
    assert stored_rows(store, "g") == before


def test_only_what_changed_is_encoded(store: MemoryStore, photos: Path) -> None:
    index(photos, "g", store, FakeEncoder())
    changed, renamed, gone, touched = sorted(photos.iterdir())[:4]
    changed.write_bytes(write_scenes(photos.parent / "others", 1, seed=9)[0].read_bytes())
    renamed.rename(photos / "renamed.png")
    gone.unlink()
    age(touched)
    write_scenes(photos / "more", 3, seed=7)
    encoder = CountingEncoder()
    report = index(photos, "g", store, encoder)
    assert summary(report) == (4, 1, 17, 0)
    assert (report.missing, report.removed, report.num_images, report.duplicates) == (2, 0, 24, 1)
    assert encoder.count == 4  # the renamed one is known by its content
    pruned = index(photos, "g", store, encoder, options=IndexOptions(prune=True))
    assert (pruned.removed, pruned.num_images, encoder.count) == (2, 22, 4)
    fresh = MemoryStore()
    index(photos, "g", fresh, FakeEncoder())
    assert stored_rows(store, "g") == stored_rows(fresh, "g")


def test_a_touched_photo_is_read_once_and_not_encoded(store: MemoryStore, photos: Path) -> None:
    (photos / "bad.jpg").write_bytes(b"x")
    index(photos, "g", store, FakeEncoder())
    for path in photos.iterdir():
        age(path)
    encoder = CountingEncoder()
    report = index(photos, "g", store, encoder)
    assert (report.unchanged, report.failed_before, report.read, encoder.count) == (20, 1, 21, 0)
    report = index(photos, "g", store, encoder)
    assert (report.unchanged, report.failed_before, report.read) == (20, 1, 0)
    fresh = MemoryStore()
    index(photos, "g", fresh, FakeEncoder())
    assert stored_rows(store, "g") == stored_rows(fresh, "g")


def test_a_changed_content_is_noticed_by_its_time(store: MemoryStore, photos: Path) -> None:
    index(photos, "g", store, FakeEncoder())
    path = sorted(photos.iterdir())[0]
    before = ledger_row(store, path)
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.mtime_ns, before.mtime_ns))
    assert index(photos, "g", store, FakeEncoder()).unchanged == 20
    age(path)
    index(photos, "g", store, FakeEncoder())
    assert ledger_row(store, path).content_hash != before.content_hash


def test_prune_removes_only_deleted_photos_of_this_source(
    store: MemoryStore, photos: Path, tmp_path: Path
) -> None:
    others = write_scenes(tmp_path / "others", 3, seed=5)
    index(photos, "g", store, FakeEncoder())
    index(tmp_path / "others", "g", store, FakeEncoder())
    lost = sorted(photos.iterdir())[:2]
    for path in (*lost, others[0]):
        path.unlink()
    report = index(photos, "g", store, FakeEncoder(), options=IndexOptions(prune=True))
    assert (report.missing, report.removed, report.num_images) == (0, 2, 21)
    ids = [image_id(canonical_uri(path)) for path in lost]
    version = store.live_version("g")
    assert store.get_images("g", version, ids) == {}
    assert store.get_instances("g", version, ids) == {}
    assert ledger_row(store, others[0]).status == "indexed"


def test_prune_in_several_deletions(
    store: MemoryStore, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "LEDGER_CHUNK", 3)
    index(photos, "g", store, FakeEncoder())
    for path in sorted(photos.iterdir())[:8]:
        path.unlink()
    report = index(photos, "g", store, FakeEncoder(), options=IndexOptions(prune=True))
    assert (report.removed, report.num_images, report.unchanged) == (8, 12, 12)


def test_failed_photos_are_not_retried_until_they_change(store: MemoryStore, photos: Path) -> None:
    bad = photos / "bad.jpg"
    bad.write_bytes(b"no image at all")
    (photos / "empty.png").write_bytes(b"")
    report = index(photos, "g", store, FakeEncoder())
    assert summary(report) == (20, 0, 0, 2)
    assert report.failed == {"empty": 1, "not_an_image": 1}
    row = ledger_row(store, bad)
    assert (row.status, row.reason, row.num_instances) == ("failed", "not_an_image", 0)
    assert row.detail == "15 bytes that do not begin like any known image format"
    report = index(photos, "g", store, FakeEncoder())
    assert (report.num_failed, report.failed_before, report.read) == (2, 2, 0)
    age(bad)
    report = index(photos, "g", store, FakeEncoder())
    assert (report.num_failed, report.failed_before, report.read) == (2, 2, 1)
    assert ledger_row(store, bad).mtime_ns == bad.stat().st_mtime_ns
    report = index(photos, "g", store, FakeEncoder(), options=IndexOptions(retry_failed=True))
    assert (report.num_failed, report.failed_before, report.read) == (2, 0, 2)
    write_scenes(photos, 1)[0].rename(bad)
    report = index(photos, "g", store, FakeEncoder())
    assert report.changed == 1
    assert report.failed == {"empty": 1}
    assert ledger_row(store, bad).status == "indexed"


def test_a_photo_that_becomes_unreadable_loses_its_instances(
    store: MemoryStore, photos: Path
) -> None:
    index(photos, "g", store, FakeEncoder())
    path = sorted(photos.iterdir())[0]
    path.write_bytes(path.read_bytes()[:60])
    assert index(photos, "g", store, FakeEncoder()).failed == {"truncated": 1}
    key = image_id(canonical_uri(path))
    assert store.get_instances("g", store.live_version("g"), [key])[key] == []


def test_files_that_could_not_be_read_are_retried_in_every_run(
    store: MemoryStore, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = photos / "link.jpg"
    link.symlink_to(photos / "gone")
    assert index(photos, "g", store, FakeEncoder()).failed == {"missing": 1}
    written: list[int] = []
    upsert = store.upsert_images

    def note(gallery: str, version: str, images: Sequence[IndexedImage]) -> None:
        written.append(len(images))
        upsert(gallery, version, images)

    monkeypatch.setattr(store, "upsert_images", note)
    report = index(photos, "g", store, FakeEncoder())
    assert (report.read, report.failed, report.failed_before) == (1, {"missing": 1}, 0)
    assert written == []  # the row says so already
    (photos / "gone").write_bytes(sorted(photos.iterdir())[0].read_bytes())
    assert index(photos, "g", store, FakeEncoder()).changed == 1
    assert written == [1]


def test_the_rows_do_not_depend_on_batches_threads_or_memory(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "bad.jpg").write_bytes(b"x")
    reference = MemoryStore()
    index(photos, "g", reference, FakeEncoder())
    expected = stored_rows(reference, "g")
    for batch_size, threads, max_bytes in product((1, 7, 64), (1, 8), (0, 150_000)):
        store, encoder = MemoryStore(), CountingEncoder()
        monkeypatch.setattr(stages, "MAX_QUEUED_BYTES", max_bytes)
        monkeypatch.setattr(stages, "MAX_BATCH_BYTES", max_bytes)
        options = IndexOptions(batch_size=batch_size, num_readers=threads, num_encoders=threads)
        index(photos, "g", store, encoder, options=options)
        assert stored_rows(store, "g") == expected
        photo_bytes = 160 * 120 * 3
        assert max(encoder.batches) <= max(1, min(batch_size, max_bytes // photo_bytes))


def test_an_interrupted_run_keeps_whole_batches_and_the_next_continues(
    store: MemoryStore, photos: Path
) -> None:
    class InterruptedEncoder(CountingEncoder):
        def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
            if self.count >= 12:
                raise KeyboardInterrupt
            return super().encode_images(images)

    options, threads = IndexOptions(batch_size=4, num_encoders=1), threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        index(photos, "g", store, InterruptedEncoder(), options=options)
    done = len(list(store.iter_images("g", store.live_version("g"))))
    assert done in (0, 4, 8, 12)  # what waits when the run is cut short is made again
    assert threading.active_count() == threads
    encoder = CountingEncoder()
    report = index(photos, "g", store, encoder, options=options)
    assert (report.new, report.unchanged, encoder.count) == (20 - done, done, 20 - done)
    fresh = MemoryStore()
    index(photos, "g", fresh, FakeEncoder())
    assert stored_rows(store, "g") == stored_rows(fresh, "g")


def test_the_first_version_is_live_from_the_start(store: MemoryStore, photos: Path) -> None:
    class RecordingEncoder(FakeEncoder):
        def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
            assert store.live_version("g")
            return super().encode_images(images)

    index(photos, "g", store, RecordingEncoder())


def test_another_model_goes_live_only_when_its_run_is_complete(
    store: MemoryStore, photos: Path
) -> None:
    first = index(photos, "g", store, FakeEncoder(30))

    class RecordingEncoder(CountingEncoder):
        fail = True

        def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
            assert store.live_version("g") == first.version
            if self.fail and self.count >= 8:
                raise KeyboardInterrupt
            return super().encode_images(images)

    encoder = RecordingEncoder(1)
    options = IndexOptions(batch_size=4, num_encoders=1)
    with pytest.raises(KeyboardInterrupt):
        index(photos, "g", store, encoder, options=options)
    assert store.live_version("g") == first.version
    encoder.fail = False
    second = index(photos, "g", store, encoder, options=options)
    assert second.version != first.version
    assert store.live_version("g") == second.version
    assert second.kept_versions == {first.version: 20}
    live = next(each for each in store.versions("g") if each.live)
    assert second.num_instances == live.num_instances > 0
    assert second.num_images == 20
    again = index(photos, "g", store, FakeEncoder(30))
    assert (again.version, again.unchanged) == (first.version, 20)
    assert store.live_version("g") == first.version


def test_version_names_follow_weights_and_settings() -> None:
    names = {
        version_name(digest, settings)
        for digest in ("a", "b")
        for settings in ({}, {"num_candidates": 30}, {"num_candidates": 31})
    }
    assert len(names) == 6
    assert all(len(name) == 12 and int(name, 16) >= 0 for name in names)
    assert version_name("a", {"x": 1, "y": 2}) == version_name("a", {"y": 2, "x": 1})


def test_reduced_decoding_makes_another_version_with_the_original_sizes(
    store: MemoryStore, tmp_path: Path
) -> None:
    image = Image.fromarray(random_scene(random.Random(1))).resize((1600, 1200))
    image.save(tmp_path / "large.jpg")
    sizes: list[tuple[int, ...]] = []

    class RecordingEncoder(FakeEncoder):
        def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
            sizes.extend(image.shape for image in images)
            return super().encode_images(images)

    full = index(tmp_path, "g", store, RecordingEncoder())
    small = index(tmp_path, "g", store, RecordingEncoder(), options=IndexOptions(at_least_px=400))
    assert sizes == [(1200, 1600, 3), (300, 400, 3)]
    assert full.version != small.version
    assert ledger_row(store, tmp_path / "large.jpg").width_px == 1600


def test_batches_are_encoded_side_by_side_and_share_the_cores(
    store: MemoryStore, photos: Path
) -> None:
    together = threading.Barrier(2, timeout=20)
    shares: list[int] = []

    class BarrierEncoder(FakeEncoder):
        def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
            together.wait()
            shares.append(torch.get_num_threads())
            return super().encode_images(images)

    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        options = IndexOptions(batch_size=5, num_encoders=2)
        index(photos, "g", store, BarrierEncoder(), options=options)
        assert shares == [2, 2, 2, 2]
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_progress_ends_with_everything_done(store: MemoryStore, photos: Path) -> None:
    (photos / "bad.jpg").write_bytes(b"x")
    seen: list[IndexProgress] = []
    index(photos, "g", store, FakeEncoder(), progress=seen.append)
    assert [each.done for each in seen] == sorted(each.done for each in seen)
    assert (seen[-1].done, seen[-1].failed) == (21, 1)
    assert {each.total for each in seen} <= {None, 21}


def test_wrong_arguments_leave_no_gallery_behind(store: MemoryStore, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        index(tmp_path / "none", "g", store, FakeEncoder())
    with pytest.raises(ConfigError, match="batch_size must be 1 or more, got 0"):
        IndexOptions(batch_size=0)
    with pytest.raises(GalleryNotFound):
        store.live_version("g")
    write_scenes(tmp_path, 1)
    with pytest.raises(ConfigError, match="gallery name 'a b'"):
        index(tmp_path, "a b", store, FakeEncoder())

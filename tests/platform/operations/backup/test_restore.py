"""Restoring: names of versions, promotion, verification, and continuing after an interruption."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reir.errors import ConfigError, JobRunning, StoreDamaged, StoreUnavailable
from reir.operations.backup import restore as restoring
from reir.operations.backup import verify as verifying
from reir.operations.backup.reports import BackupReport, RestoreReport
from reir.operations.lease import hold_lease
from reir.operations.live_history import live_history
from reir.records import FloatArray, IndexedImage
from reir.store import InstanceRow, VersionInfo, VersionSpec
from reir.store.memory import MemoryStore
from reir_testing.rewriting import SPEC, content_of, image_of

G, V = "photos", "v1"

BackUp = Callable[..., BackupReport]
Restore = Callable[..., RestoreReport]
ContentOf = Callable[..., object]


@pytest.fixture
def saved(full_store: MemoryStore, tmp_path: Path, back_up: BackUp) -> Path:
    """A backup of `full_store`."""
    back_up(full_store, tmp_path / "saved")
    return tmp_path / "saved"


def test_a_store_that_still_has_the_version_is_left_as_it_is(
    saved: Path, full_store: MemoryStore, restore: Restore, content: ContentOf
) -> None:
    before = content(full_store)
    report = restore(full_store, saved)
    assert (report.version, report.written, report.problems, report.live) == (V, 0, (), True)
    assert report.existed
    assert content(full_store) == before
    assert full_store.find_documents("restore") == {}


def test_a_changed_version_keeps_its_name(
    saved: Path, full_store: MemoryStore, restore: Restore, content: ContentOf
) -> None:
    wanted = content(full_store)
    full_store.upsert_images(G, V, [image_of(7, content_of(7, 9))])
    changed = content(full_store)
    report = restore(full_store, saved)
    assert (report.version, report.written, report.live) == ("v1-2", 42, False)
    assert not report.existed
    assert restore(full_store, saved).version == "v1-2", "it has this content already"
    full_store.delete_images(G, "v1-2", ["bad"])
    assert restore(full_store, saved).version == "v1-3"
    assert content(full_store) == changed
    assert content(full_store, version="v1-3") == wanted
    assert full_store.live_version(G) == V


def test_a_live_version_with_other_vectors_keeps_its_name(
    saved: Path, full_store: MemoryStore, restore: Restore, content: ContentOf
) -> None:
    wanted = content(full_store)
    ids = [record.image_id for record in full_store.iter_images(G, V)]
    images = full_store.get_indexed(G, V, ids).values()
    full_store.upsert_images(G, V, [_rounded(image) for image in images])
    changed = content(full_store)
    assert changed != wanted
    with pytest.raises(ConfigError, match="version 'v1' of gallery 'photos' exists with another"):
        restore(full_store, saved, version=V)
    report = restore(full_store, saved)
    assert (report.version, report.problems, report.live) == ("v1-2", (), False)
    assert content(full_store, version="v1-2") == wanted
    assert content(full_store) == changed


def test_a_version_with_another_spec_keeps_its_name(saved: Path, restore: Restore) -> None:
    store = MemoryStore()
    store.create_version(G, V, VersionSpec(dim=3, digest="other"))
    assert restore(store, saved).version == "v1-2"


def test_a_named_version_must_be_free(
    saved: Path, full_store: MemoryStore, restore: Restore
) -> None:
    assert restore(full_store, saved, version=V).written == 0
    full_store.delete_images(G, V, ["bad"])
    with pytest.raises(ConfigError, match="version 'v1' of gallery 'photos' exists with another"):
        restore(full_store, saved, version=V)
    assert restore(full_store, saved, version="mine").version == "mine"
    for name in ({"version": "a b"}, {"gallery": "../x"}):
        with pytest.raises(ConfigError, match="is not allowed"):
            restore(full_store, saved, **name)


@pytest.mark.parametrize(
    ("promote", "has_live", "live"),
    [
        (None, False, True),
        (None, True, False),
        (True, True, True),
        (True, False, True),
        (False, False, False),
    ],
)
def test_promotion(
    saved: Path, restore: Restore, promote: bool | None, has_live: bool, live: bool
) -> None:
    store = MemoryStore()
    store.create_version(G, "before", VersionSpec(dim=3, digest="other"))
    if has_live:
        store.promote(G, "before")
    report = restore(store, saved, promote=promote)
    assert report.live == live
    assert (V in [entry.version for entry in live_history(store, G)]) == live
    if live:
        assert live_history(store, G)[-1].by == "reir restore"


class FailingStore(MemoryStore):
    """A store that becomes unreachable after some batches."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.batches = batches

    def upsert_images(self, gallery: str, version: str, images: Sequence[IndexedImage]) -> None:
        if not self.batches:
            raise StoreUnavailable("http://host", "gone")
        self.batches -= 1
        super().upsert_images(gallery, version, images)


@pytest.mark.parametrize("done", [0, 1, 3])
def test_an_interrupted_restore_continues(
    saved: Path,
    full_store: MemoryStore,
    restore: Restore,
    content: ContentOf,
    monkeypatch: pytest.MonkeyPatch,
    done: int,
) -> None:
    monkeypatch.setattr(restoring, "_BATCH_PHOTOS", 10)
    full_store.put_document("source", f"{G}/1", {})
    store = FailingStore(done)
    with pytest.raises(StoreUnavailable):
        restore(store, saved, version="")
    assert store.live_version is not None
    assert [info.live for info in store.versions(G)] == [False]
    store.batches = 99
    report = restore(store, saved)
    assert (report.version, report.written) == (V, 42 - 10 * done)
    assert not report.existed, "the interrupted restore has created it"
    assert (report.problems, report.live) == ((), True)
    assert content(store) == content(full_store)
    assert store.find_documents("restore") == {}


def test_an_interrupted_restore_is_not_continued_with_another_backup(
    saved: Path, full_store: MemoryStore, tmp_path: Path, back_up: BackUp, restore: Restore
) -> None:
    store = FailingStore(0)
    with pytest.raises(StoreUnavailable):
        restore(store, saved)
    store.batches = 99
    full_store.delete_images(G, V, ["bad"])
    back_up(full_store, tmp_path / "later")
    assert restore(store, tmp_path / "later").version == "v1-2"
    assert restore(store, saved).version == V
    assert store.live_version(G) == "v1-2"


def test_a_live_version_is_never_continued(saved: Path, restore: Restore) -> None:
    store = FailingStore(0)
    with pytest.raises(StoreUnavailable):
        restore(store, saved)
    store.promote(G, V)
    store.batches = 99
    assert restore(store, saved).version == "v1-2"


class WrongStore(MemoryStore):
    """A store that does not keep or find what it was given.

    Attributes:
        fault: what is wrong with it.
    """

    fault = ""

    def versions(self, gallery: str) -> list[VersionInfo]:
        lost = self.fault == "count"
        return [
            replace(info, num_instances=info.num_instances - lost)
            for info in super().versions(gallery)
        ]

    def upsert_images(self, gallery: str, version: str, images: Sequence[IndexedImage]) -> None:
        if self.fault == "row":
            images = [_touched(images[0]), *images[1:]]
        if self.fault == "vector":
            images = [_rounded(image) for image in images]
        super().upsert_images(gallery, version, images)

    def search(
        self,
        gallery: str,
        version: str,
        vectors: FloatArray,
        limit: int,
        *,
        where: str | None = None,
    ) -> list[list[InstanceRow]]:
        found = super().search(gallery, version, vectors, limit, where=where)
        if self.fault == "hit":
            return [found[0][1:], *found[1:]]
        if self.fault == "score":
            return [[hit._replace(score=hit.score + 0.001) for hit in hits] for hits in found]
        return found


def _touched(image: IndexedImage) -> IndexedImage:
    return replace(image, record=replace(image.record, mtime_ns=99))


def _rounded(image: IndexedImage) -> IndexedImage:
    if image.instances is None:
        return image
    vectors = image.instances.vectors.astype(np.float16).astype(np.float32)
    return replace(image, instances=replace(image.instances, vectors=vectors))


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("count", "photos with"),
        ("row", "has other ledger rows than the backup"),
        ("vector", "have other instances than in the backup"),
        ("hit", "searches returned 99.8% of the nearest instances"),
        ("score", "searches returned 0.0% of the nearest instances"),
    ],
)
def test_a_version_that_differs_from_the_backup_is_not_made_live(
    saved: Path, restore: Restore, fault: str, problem: str
) -> None:
    store = WrongStore()
    store.fault = fault
    report = restore(store, saved)
    assert problem in report.problems[0]
    assert not report.live
    assert [info.live for info in store.versions(G)] == [False]
    store.fault = ""
    again = restore(store, saved)
    if fault == "vector":  # what is wrong is stored, and its ledger rows are right
        assert again.problems
    else:
        assert (again.version, again.problems, again.live) == (V, (), True)


def hit(key: str, score: float) -> InstanceRow:
    return InstanceRow(key, key, "u", (0, 0, 1, 1), 1.0, 1.0, {}, score)


@pytest.mark.parametrize(
    ("hits", "recall"),
    [
        ([("a", 0.9), ("b", 0.8), ("c", 0.7)], 1.0),
        ([("a", 0.900005), ("b", 0.8), ("d", 0.7)], 1.0),  # equal to the last one
        ([("a", 0.9), ("c", 0.7), ("d", 0.7)], 2 / 3),  # a better one is missing
        ([("a", 0.9), ("b", 0.8), ("x", 0.7)], 1.0),  # may be as good, but is not known
        ([("a", 0.9), ("b", 0.8), ("e", 0.7)], 2 / 3),  # has another score
        ([("a", 0.9), ("b", 0.81), ("c", 0.7)], 2 / 3),
        ([("a", 0.9), ("a", 0.9), ("a", 0.9)], 1 / 3),
        ([], 0.0),
    ],
)
def test_recall_accepts_either_of_two_equal_scores(
    monkeypatch: pytest.MonkeyPatch, hits: list[tuple[str, float]], recall: float
) -> None:
    monkeypatch.setattr(verifying, "NUM_HITS", 3)
    best = [(0.9, "a"), (0.8, "b"), (0.7, "c"), (0.7, "d"), (0.2, "e")]
    found = verifying._recall([hit(*each) for each in hits], best)
    assert found == pytest.approx(recall)


def test_only_one_process_restores_into_a_gallery(saved: Path, restore: Restore) -> None:
    store = MemoryStore()
    for job in (f"restore/{G}", f"erase/{G}"):
        with hold_lease(store, job), pytest.raises(JobRunning):
            restore(store, saved)
    assert restore(store, saved, gallery="other").gallery == "other"


def test_a_damaged_gallery(saved: Path, full_store: MemoryStore, restore: Restore) -> None:
    class Damaged(MemoryStore):
        def versions(self, gallery: str) -> list[VersionInfo]:
            if gallery == G:
                raise StoreDamaged("file x is damaged")
            return super().versions(gallery)

    store = Damaged()
    store.create_version(G, V, SPEC)
    with pytest.raises(StoreDamaged, match="x is damaged; to restore the backup, delete the gall"):
        restore(store, saved)
    assert restore(store, saved, gallery="other").problems == ()

"""Writing: refused folders, failures, and photos that change while they are read.

The changes come at chosen moments here; `test_while_writing.py` has real writers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reir.errors import ConfigError, DataError, GalleryNotFound, StoreError
from reir.operations.backup import readers, sweeps
from reir.operations.backup.folder import CLAIM, open_folder
from reir.operations.backup.reports import BackupReport, RestoreReport
from reir.operations.backup.write import recorded_backups
from reir.records import ImageRecord, IndexedImage
from reir.store import VersionInfo, open_store
from reir.store.duplicates import hand_over, remove_images
from reir.store.memory import MemoryStore
from reir_testing.rewriting import SPEC, content_of, image_of, is_mixed, photo_id

G, V = "photos", "v1"

BackUp = Callable[..., BackupReport]
Restore = Callable[..., RestoreReport]
ContentOf = Callable[..., dict[str, tuple[ImageRecord, bytes]]]
Change = Callable[[MemoryStore], object]


class ChangingStore(MemoryStore):
    """A memory store that is changed by others whenever a batch was read.

    Attributes:
        changes: made one after another, each after one call of `get_indexed`.
    """

    def __init__(self, images: Sequence[IndexedImage]) -> None:
        super().__init__()
        self.changes: Iterator[Change] = iter(())
        self.create_version(G, V, SPEC)
        self.upsert_images(G, V, images)
        self.is_changing = False

    def iter_images(
        self, gallery: str, version: str, *, status: str | None = None
    ) -> Iterator[ImageRecord]:
        # At once: the dictionaries of a memory store must not change while they are listed.
        return iter(list(super().iter_images(gallery, version, status=status)))

    def get_indexed(
        self, gallery: str, version: str, image_ids: Sequence[str]
    ) -> dict[str, IndexedImage]:
        found = super().get_indexed(gallery, version, image_ids)
        if not self.is_changing:  # a change reads, too
            self.is_changing = True
            next(self.changes, lambda _: None)(self)
            self.is_changing = False
        return found


class ChangingServerStore(ChangingStore):
    """The same, with the methods by which a server is recognized."""

    def import_images(self, *_: Any) -> None:
        raise NotImplementedError

    def wait_until_indexed(self, *_: Any) -> bool:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "_BATCH_PHOTOS", 3)
    monkeypatch.setattr(readers, "INTERVAL_S", 0.01)


@pytest.fixture(params=[ChangingStore, ChangingServerStore], ids=["lock", "server"])
def store(request: pytest.FixtureRequest) -> ChangingStore:
    images = [image_of(number, content_of(number, 1), write=1) for number in range(12)]
    found: ChangingStore = request.param(images)
    return found


def rewrite(*numbers: int, revision: int = 2) -> Change:
    images = [image_of(n, content_of(n, revision), write=revision) for n in numbers]
    return lambda store: store.upsert_images(G, V, images)


def duplicate(number: int, holder: int, revision: int = 1) -> Change:
    content = content_of(holder, revision)
    copy = image_of(number, content, write=2, same_as=photo_id(holder))
    return lambda store: store.upsert_images(G, V, [copy])


def erase(*numbers: int) -> Change:
    return lambda store: remove_images(store, G, V, [photo_id(number) for number in numbers])


def restored(folder: Path, restore: Restore, content: ContentOf) -> dict[str, Any]:
    memory = MemoryStore()
    assert restore(memory, folder).problems == ()
    found = content(memory)
    ids = list(found)
    assert not [key for key, image in memory.get_indexed(G, V, ids).items() if is_mixed(image)]
    for record, _ in found.values():
        if record.same_as:
            holder = found[record.same_as][0]
            assert (holder.content_hash, holder.same_as) == (record.content_hash, "")
    return found


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param([rewrite(*range(12))], id="all"),
        pytest.param([rewrite(0), rewrite(1), rewrite(0, revision=3)], id="one-by-one"),
        pytest.param([erase(*range(6))], id="deleted"),
        pytest.param([erase(*range(12))], id="all-deleted"),
        pytest.param([rewrite(20, 21), erase(3, 20)], id="new"),
        pytest.param([duplicate(20, 5), duplicate(21, 5), erase(5)], id="handed-over"),
        pytest.param([erase(1), rewrite(1)], id="deleted-and-new"),
    ],
)
def test_the_backup_catches_up_with_changes(
    store: ChangingStore,
    tmp_path: Path,
    back_up: BackUp,
    restore: Restore,
    content: ContentOf,
    changes: list[Change],
) -> None:
    store.changes = iter(changes)
    report = back_up(store, tmp_path / "b")
    assert restored(tmp_path / "b", restore, content) == content(store)
    assert report.counts.photos == len(content(store))


def test_a_gallery_that_never_rests(
    store: ChangingStore, tmp_path: Path, back_up: BackUp, restore: Restore, content: ContentOf
) -> None:
    revisions = iter(range(2, 10_000))
    store.changes = iter(lambda: rewrite(0, 5, revision=next(revisions)), None)
    before = set(content(store))
    if isinstance(store, ChangingServerStore):
        # A server returns both photos differently whenever they are read.
        with pytest.raises(StoreError, match="were written again while each of 40 attempts"):
            back_up(store, tmp_path / "b")
        assert list((tmp_path / "b").iterdir()) == []
        return
    report = back_up(store, tmp_path / "b")
    assert report.read_again == 2 * (sweeps.MAX_SWEEPS - 1)
    assert set(restored(tmp_path / "b", restore, content)) == before


def test_duplicates_whose_holder_changes_all_the_time(
    store: ChangingStore, tmp_path: Path, back_up: BackUp, restore: Restore, content: ContentOf
) -> None:
    for number in (20, 21, 22):
        duplicate(number, 5)(store)
    group = [photo_id(number) for number in (5, 20, 21, 22)]

    def pass_on(store: MemoryStore) -> None:
        """Hand the instances over from the photo that holds them, which becomes a duplicate."""
        rows = store.get_images(G, V, group)
        hand_over(store, G, V, [key for key, row in rows.items() if row.holds_instances])

    store.changes = iter([pass_on if n % 3 == 0 else lambda _: None for n in range(70)])
    back_up(store, tmp_path / "b")
    assert set(group) < set(restored(tmp_path / "b", restore, content))


def test_a_duplicate_that_has_no_holder_in_the_store_either(
    tmp_path: Path, back_up: BackUp, restore: Restore, content: ContentOf
) -> None:
    store = MemoryStore()
    store.create_version(G, V, SPEC)
    store.upsert_images(G, V, [image_of(1, content_of(5, 1), same_as="gone")])
    assert back_up(store, tmp_path / "b").orphans == 1
    memory = MemoryStore()
    restore(memory, tmp_path / "b")
    assert content(memory) == content(store)


class LosingStore(MemoryStore):
    """A store that has lost an instance of one photo."""

    def get_indexed(
        self, gallery: str, version: str, image_ids: Sequence[str]
    ) -> dict[str, IndexedImage]:
        found = super().get_indexed(gallery, version, image_ids)
        for key, image in found.items():
            if key == photo_id(7) and (whole := image.instances) is not None:
                record = replace(image.record, num_instances=len(whole) - 1)
                assert whole.masks is not None
                rest = replace(
                    whole,
                    boxes=whole.boxes[1:],
                    objectness=whole.objectness[1:],
                    vectors=whole.vectors[1:],
                    masks=whole.masks[1:],
                )
                found[key] = IndexedImage(record, rest)
        return found


def test_lost_instances_are_reported_and_read_only_twice(
    tmp_path: Path, back_up: BackUp, restore: Restore
) -> None:
    store = LosingStore()
    store.create_version(G, V, SPEC)
    images = [image_of(number, content_of(number, 1)) for number in range(9)]
    store.upsert_images(G, V, images)
    assert images[7].record.num_instances > 1
    report = back_up(store, tmp_path / "b")
    assert (report.incomplete, report.read_again) == (1, 0)
    assert report.counts.instances == sum(each.record.num_instances for each in images) - 1
    assert restore(MemoryStore(), tmp_path / "b").problems == ()


def test_a_version_that_is_deleted_meanwhile(
    store: ChangingStore, tmp_path: Path, back_up: BackUp
) -> None:
    store.changes = iter([lambda _: None, lambda changing: changing.drop_gallery(G)])
    with pytest.raises(StoreError, match="was deleted while it was backed up") as error:
        back_up(store, tmp_path / "b")
    assert str(tmp_path / "b") in str(error.value)
    assert list((tmp_path / "b").iterdir()) == []
    assert store.find_documents("backup") == {}


def test_folders_that_are_refused(full_store: MemoryStore, tmp_path: Path, back_up: BackUp) -> None:
    back_up(full_store, tmp_path / "b")
    with pytest.raises(ConfigError, match="already contains a backup"):
        back_up(full_store, tmp_path / "b")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").touch()
    with pytest.raises(
        ConfigError, match=r"must be empty or not exist, but it contains notes\.txt"
    ):
        back_up(full_store, tmp_path / "used")
    with pytest.raises(ConfigError, match="is a file"):
        back_up(full_store, tmp_path / "used" / "notes.txt")
    with pytest.raises(DataError, match="cannot be created"):
        back_up(full_store, tmp_path / "used" / "notes.txt" / "b")
    (tmp_path / "empty").mkdir()
    back_up(full_store, tmp_path / "empty")


def test_an_unknown_version(full_store: MemoryStore, tmp_path: Path, back_up: BackUp) -> None:
    with pytest.raises(GalleryNotFound, match="has no version 'v9'"):
        back_up(full_store, tmp_path / "b", version="v9")
    assert not (tmp_path / "b").exists()


def test_a_full_disk(
    full_store: MemoryStore, tmp_path: Path, back_up: BackUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match=r"photos-00000\.parquet cannot be written: .*free up"):
        back_up(full_store, tmp_path / "b")
    assert list((tmp_path / "b").iterdir()) == []


def test_two_backups_into_one_folder(
    full_store: MemoryStore, tmp_path: Path, back_up: BackUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    def also_used(*_: object) -> None:
        (tmp_path / "b" / "photos-00000.parquet").write_bytes(b"of the other process")

    monkeypatch.setattr("reir.operations.backup.pairs.PairWriter.finish", _finish_and(also_used))
    with pytest.raises(DataError, match="another process seems to use the folder"):
        back_up(full_store, tmp_path / "b")
    assert not (tmp_path / "b" / "manifest.json").exists()


class SlowStore(MemoryStore):
    """A store that another backup is made from while it is read.

    Attributes:
        meanwhile: called at each read.
    """

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        super().__init__()
        self.create_version(G, V, SPEC)
        self.upsert_images(G, V, [image_of(1, content_of(1, 1))])
        self.meanwhile = meanwhile

    def iter_images(
        self, gallery: str, version: str, *, status: str | None = None
    ) -> Iterator[ImageRecord]:
        self.meanwhile()
        return super().iter_images(gallery, version, status=status)


def test_a_folder_belongs_to_the_backup_that_began_first(
    full_store: MemoryStore, tmp_path: Path, back_up: BackUp, restore: Restore
) -> None:
    refused: list[str] = []

    def back_up_too() -> None:
        with pytest.raises(ConfigError) as error:
            back_up(full_store, tmp_path / "b")
        refused.append(str(error.value))

    back_up(SlowStore(back_up_too), tmp_path / "b")
    assert f"a backup into {tmp_path / 'b'} is running, or was interrupted" in refused[0]
    assert "name another folder, or delete this one if none is running" in refused[0]
    report = restore(MemoryStore(), tmp_path / "b")
    assert (report.counts.photos, report.problems) == (1, ())
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "instances-00000.parquet",
        "manifest.json",
        "photos-00000.parquet",
    ]


def test_two_backups_that_find_an_empty_folder_at_the_same_moment(
    full_store: MemoryStore, tmp_path: Path, back_up: BackUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reir.operations.backup.write._check_empty", lambda _: None)

    def back_up_too() -> None:
        with pytest.raises(ConfigError, match="is running, or was interrupted"):
            back_up(full_store, tmp_path / "b")

    assert back_up(SlowStore(back_up_too), tmp_path / "b").counts.photos == 1


@pytest.fixture(params=["folder", "bucket"])
def name(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Name of an empty folder, on disk and in a bucket."""
    if request.param == "bucket":
        source: str = request.getfixturevalue("bucket").source(tmp_path.name)
        return source
    return str(tmp_path / "b")


def test_a_folder_that_another_backup_fills_before_the_claim_is_refused(
    full_store: MemoryStore, back_up: BackUp, restore: Restore, name: str
) -> None:
    """The other one begins and ends after the folder was found to be empty."""

    class LateStore(MemoryStore):
        def versions(self, gallery: str) -> list[VersionInfo]:
            back_up(full_store, name)
            return super().versions(gallery)

    late = LateStore()
    late.create_version(G, V, SPEC)
    with pytest.raises(ConfigError, match="already contains a backup; name another folder"):
        back_up(late, name)
    assert CLAIM not in open_folder(name).sizes()
    report = restore(MemoryStore(), name)
    assert (report.counts.photos, report.problems) == (42, ())


def test_a_backup_deletes_nothing_in_the_folder_of_another(
    full_store: MemoryStore, back_up: BackUp, restore: Restore, name: str
) -> None:
    """Its folder was deleted while it was written, and another backup has it now."""
    folder = open_folder(name)
    slow = SlowStore(lambda: None)

    def take_over() -> None:
        slow.meanwhile = lambda: None
        folder.delete(folder.sizes())
        back_up(full_store, name)

    slow.meanwhile = take_over
    with pytest.raises(DataError, match="another process seems to use the folder"):
        back_up(slow, name)
    assert restore(MemoryStore(), name).counts.photos == 42


def _finish_and(then: Callable[[], None]) -> Callable[..., Any]:
    from reir.operations.backup.pairs import PairWriter

    finish = PairWriter.finish

    def finish_and_then(writer: PairWriter) -> Any:
        found = finish(writer)
        then()
        return found

    return finish_and_then


def test_the_last_backup_of_each_version_is_recorded(
    full_store: MemoryStore, tmp_path: Path, back_up: BackUp
) -> None:
    full_store.create_version(G, "v2", SPEC)
    for name, version in (("a", V), ("b", "v2"), ("c", V)):
        report = back_up(full_store, tmp_path / name, version=version)
    found = recorded_backups(full_store, G)
    assert [(each["version"], each["dest"]) for each in found] == [
        ("v2", str(tmp_path / "b")),
        (V, str(tmp_path / "c")),
    ]
    assert found[1] == {
        "version": V,
        "dest": report.dest,
        "begun_s": report.begun_s,
        "ended_s": report.ended_s,
        "photos": 42,
        "instances": report.counts.instances,
        "bytes": report.num_bytes,
        "seconds": pytest.approx(report.seconds, abs=0.001),
    }


def test_a_store_in_a_read_only_folder(
    every_kind: list[IndexedImage],
    tmp_path: Path,
    back_up: BackUp,
    restore: Restore,
    content: ContentOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = tmp_path / "store"
    with closing(open_store(str(place))) as store:
        store.create_version(G, V, SPEC)
        store.upsert_images(G, V, every_kind)
        store.promote(G, V)
        wanted = content(store)
    # Permissions do not stop the superuser, as whom tests may run.
    monkeypatch.setattr("reir.store.embedded.read_only.why_read_only", lambda _: "Read-only")
    with closing(open_store(str(place))) as store:
        assert not back_up(store, tmp_path / "b").recorded
    memory = MemoryStore()
    restore(memory, tmp_path / "b")
    assert content(memory) == wanted

"""Photos are added and deleted during searches, on Milvus Lite and over real connections."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from reir.attributes import TENANT
from reir.client.http_client import Client
from reir.images.photo_files import delete_upload
from reir.records import ImageRecord
from reir.store import InstanceStore, open_store
from reir.store.memory import MemoryStore
from reir_serving.backend import photos as photos_module
from reir_serving.backend.models import LoadedModel, ModelCache
from reir_serving.backend.photos import MAX_NAME_BYTES, EncodedPhoto, Photos, encode_photo
from reir_serving.backend.service import Service
from reir_serving.backend.workers import SearchWorkers
from reir_serving.config import ServeConfig
from reir_testing import FakeEncoder
from reir_testing.serving import SCENES, draw_photo, index_photos

ROUNDS = 4
VISIBLE_WITHIN_S = 1.0


@pytest.fixture
def lite(tmp_path: Path) -> Iterator[InstanceStore]:
    store = open_store(str(tmp_path / "store"))
    index_photos(store, "g", [draw_photo(tmp_path / "photos", scene) for scene in SCENES])
    yield store
    store.close()


def service_of(store: InstanceStore, uploads: Path) -> Service:
    config = ServeConfig(store="memory:", galleries=("g",))
    workers = SearchWorkers(store, ModelCache(lambda _: LoadedModel(FakeEncoder())), config.limits)
    return Service(config, store, workers, uploads)


class SearchingThread(threading.Thread):
    """Searches without a pause, and counts the instances of new photos in each answer."""

    def __init__(self, address: str, known: set[str]) -> None:
        super().__init__(daemon=True)
        self.address, self.known = address, known
        self.seen: list[tuple[float, int]] = []
        self.stop = threading.Event()
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            with Client(self.address) as client:
                while not self.stop.is_set():
                    started_s = time.monotonic()
                    hits = client.search("the magenta box", "g", k=50, per_image=50).hits
                    self.seen.append((started_s, sum(h.image_id not in self.known for h in hits)))
        except Exception as error:  # noqa: BLE001, the test reports it
            self.error = error


def test_searches_find_all_instances_of_a_photo_or_none(
    lite: InstanceStore, serve: Any, tmp_path: Path, three_boxes: bytes
) -> None:
    address = serve(service_of(lite, tmp_path / "uploads"))
    with Client(address) as client:
        known = {hit.image_id for hit in client.search("box", "g", k=50, per_image=50).hits}
        searching = SearchingThread(address, known)
        searching.start()
        for _ in range(ROUNDS):
            added = client.add_image(three_boxes, "g")
            added_s = time.monotonic()
            found = client.search("the magenta box", "g", k=50, per_image=50).hits
            assert sum(hit.image_id == added.image_id for hit in found) == 3
            assert time.monotonic() - added_s < VISIBLE_WITHIN_S
            assert client.delete_image(added.image_id, "g")
            deleted_s = time.monotonic()
            found = client.search("the magenta box", "g", k=50, per_image=50).hits
            assert not any(hit.image_id == added.image_id for hit in found)
            assert time.monotonic() - deleted_s < VISIBLE_WITHIN_S
        searching.stop.set()
        searching.join(10)
    assert searching.error is None
    counts = {count for _, count in searching.seen}
    assert counts <= {0, 3}
    assert len(searching.seen) > ROUNDS


@pytest.fixture
def photos(tmp_path: Path) -> Photos:
    store = MemoryStore()
    index_photos(store, "g", [draw_photo(tmp_path / "photos", "green")])
    return Photos(store, tmp_path / "uploads", 10**7)


def encode(photos: Photos, data: bytes) -> EncodedPhoto:
    (version,) = photos.store.versions("g")
    return encode_photo(FakeEncoder(), version.spec, data, 10**7)


def test_a_duplicate_photo_gets_only_a_ledger_row(photos: Photos, pair: bytes) -> None:
    encoded = encode(photos, pair)
    first = photos.add(("g", "v1"), encoded, pair, "a.png", {"x": 1})
    again = photos.add(("g", "v1"), encoded, pair, "a.png", {"x": 1})
    assert again == first
    assert first.num_instances == 2
    other = photos.add(("g", "v1"), encoded, pair, "b.png", {"x": 1})
    assert (other.same_as, other.num_instances) == (first.image_id, 0)
    shown = photos.get("g", "v1", other.image_id)
    assert shown is not None
    assert len(shown.instances) == 2
    changed = photos.add(("g", "v1"), encoded, pair, "a.png", {"x": 2})
    assert (changed.image_id, changed.num_instances) == (first.image_id, 2)
    heir = photos.store.get_images("g", "v1", [other.image_id])[other.image_id]
    assert (heir.same_as, heir.num_instances) == ("", 2)


@pytest.mark.parametrize("others", [0, 1])
def test_an_upload_while_an_equal_photo_is_deleted_can_be_found(
    photos: Photos, pair: bytes, monkeypatch: pytest.MonkeyPatch, others: int
) -> None:
    """The holder is deleted just before the row that names it is written."""
    place, encoded = ("g", "v1"), encode(photos, pair)
    holder = photos.add(place, encoded, pair, "a.png", {})
    for number in range(others):
        photos.add(place, encoded, pair, f"other {number}.png", {})
    write = photos.store.upsert_images

    def delete_then_write(*arguments: Any) -> None:
        monkeypatch.setattr(photos.store, "upsert_images", write)
        assert photos.delete(*place, holder.image_id)
        write(*arguments)

    monkeypatch.setattr(photos.store, "upsert_images", delete_then_write)
    added = photos.add(place, encoded, pair, "b.png", {})
    shown = photos.get(*place, added.image_id)
    assert shown is not None
    assert shown.record == added
    assert len(shown.instances) == 2
    assert bool(added.same_as) == bool(others)


@pytest.mark.parametrize("others", [1, 2])
def test_uploads_right_before_an_equal_photo_is_deleted_can_be_found(
    photos: Photos, pair: bytes, monkeypatch: pytest.MonkeyPatch, others: int
) -> None:
    """They are complete after the deletion has looked for duplicates, and before it deletes."""
    place, encoded = ("g", "v1"), encode(photos, pair)
    holder = photos.add(place, encoded, pair, "a.png", {})
    delete = photos.store.delete_images
    added: list[ImageRecord] = []

    def add_then_delete(*arguments: Any) -> int:
        added.extend(
            photos.add(place, encoded, pair, f"other {number}.png", {}) for number in range(others)
        )
        return delete(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(photos.store, "delete_images", add_then_delete)
        assert photos.delete(*place, holder.image_id)
    assert [each.same_as for each in added] == [holder.image_id] * others
    shown = [photos.get(*place, each.image_id) for each in added]
    assert [each and len(each.instances) for each in shown] == [2] * others
    assert photos.get(*place, holder.image_id) is None


def test_an_upload_while_an_equal_photo_is_handed_over_adds_no_second_holder(
    photos: Photos, pair: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is complete after the duplicates are read, and before the first of them takes over."""
    place, encoded = ("g", "v1"), encode(photos, pair)
    holder, heir = (photos.add(place, encoded, pair, name, {}) for name in ("a.png", "b.png"))
    write = photos.store.upsert_images
    added: list[ImageRecord] = []

    def add_then_write(*arguments: Any) -> None:
        monkeypatch.setattr(photos.store, "upsert_images", write)
        added.append(photos.add(place, encoded, pair, "c.png", {}))
        write(*arguments)

    monkeypatch.setattr(photos.store, "upsert_images", add_then_write)
    assert photos.delete(*place, holder.image_id)
    assert [each.same_as for each in added] == [holder.image_id]
    (rows,) = photos.store.find_content(*place, {holder.content_hash}).values()
    assert {row.image_id: (row.same_as, row.num_instances) for row in rows} == {
        heir.image_id: ("", 2),
        added[0].image_id: (heir.image_id, 0),
    }


def test_a_photo_is_deleted_from_all_versions(photos: Photos, pair: bytes) -> None:
    encoded = encode(photos, pair)
    photos.store.create_version("g", "v0", photos.store.versions("g")[0].spec)
    places = [("g", "v0"), ("g", "v1")]
    added = {photos.add(place, encoded, pair, "a.png", {}).image_id for place in places}
    (image_id,) = added
    assert photos.delete("g", "v1", image_id)
    assert not photos.delete("g", "v1", image_id)
    for gallery, version in places:
        assert photos.store.get_images(gallery, version, [image_id]) == {}


def test_a_tenant_does_not_replace_the_photo_of_another_tenant(photos: Photos, pair: bytes) -> None:
    encoded = encode(photos, pair)
    one = photos.add(("g", "v1"), encoded, pair, "a.png", {TENANT: "one"})
    two = photos.add(("g", "v1"), encoded, pair, "a.png", {TENANT: "two"})
    assert one.image_id != two.image_id
    assert two.same_as == ""
    assert photos.delete("g", "v1", one.image_id)
    assert photos.read("g", "v1", one.image_id) is None
    assert photos.read("g", "v1", two.image_id) == pair


def test_deleting_an_upload_removes_its_empty_folders(
    photos: Photos, pair: bytes, green_box: bytes
) -> None:
    first, second = (
        photos.add(("g", "v1"), encode(photos, data), data, "a.png", {})
        for data in (pair, green_box)
    )
    assert len(list(photos.uploads.glob("*/*"))) == 2
    photos.delete("g", "v1", first.image_id)
    assert [path.name for path in photos.uploads.rglob("*.png")] == ["a.png"]
    assert len(list(photos.uploads.glob("*/*"))) == 1
    photos.delete("g", "v1", second.image_id)
    assert list(photos.uploads.iterdir()) == []
    again = photos.add(("g", "v1"), encode(photos, pair), pair, "a.png", {})
    assert photos.read("g", "v1", again.image_id) == pair


def test_photos_can_be_added_to_and_deleted_from_one_folder_concurrently(
    photos: Photos, pair: bytes
) -> None:
    encoded, errors = encode(photos, pair), list[Exception]()

    def write_and_delete() -> None:
        try:
            for _ in range(50):
                path = photos._upload_path("g", pair, "a.png", {})
                photos_module._write_atomically(path, pair)
                delete_upload(path)
        except Exception as error:  # noqa: BLE001, the test reports it
            errors.append(error)

    threads = [threading.Thread(target=write_and_delete) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert photos.add(("g", "v1"), encoded, pair, "a.png", {}).status == "indexed"


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("\u65e5\u672c.png", "\u65e5\u672c.png"),
        (".\u65e5.png", "\u65e5.png"),
        ("100%.png", "100%.png"),
        *((50 * "\u65e5" + n * "x", (120 - n) // 9 * "\u65e5" + n * "x") for n in range(9)),
    ],
)
def test_an_uploaded_file_name_keeps_whole_characters(photos: Photos, name: str, kept: str) -> None:
    path = photos._upload_path("g", b"", name, {})
    assert unquote(path.name, errors="strict") == kept
    assert len(path.name) <= MAX_NAME_BYTES


@pytest.mark.parametrize(
    "name", ["../../x.png", "/etc/passwd", "", ".hidden", "a\0b", "\u202e.png"]
)
def test_an_uploaded_file_name_cannot_leave_the_folder(
    photos: Photos, pair: bytes, name: str
) -> None:
    added = photos.add(("g", "v1"), encode(photos, pair), pair, name, {TENANT: "../../.."})
    (kept,) = [path for path in photos.uploads.rglob("*") if path.is_file()]
    assert kept.read_bytes() == pair
    assert photos.read("g", "v1", added.image_id) == pair
    assert photos.delete("g", "v1", added.image_id)
    assert not kept.exists()

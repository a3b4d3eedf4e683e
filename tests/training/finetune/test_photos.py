"""Finding the photos of a gallery by the names in a list, and gathering their files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reir.errors import DataError, UnknownPhoto
from reir.images.decode import canonical_uri, image_id
from reir.records import ImageRecord, IndexedImage, Instances
from reir.store import InstanceStore, VersionSpec
from reir.store.memory import MemoryStore
from reir_training.finetune.photos import GalleryPhotos, gather_photos

GALLERY, VERSION, DIM = "mine", "v1", 4
NOTHING = Instances(
    np.zeros((0, 4), np.float32),
    np.zeros(0, np.float32),
    np.zeros((0, DIM), np.float32),
    np.zeros(DIM, np.float32),
)


def stored(uri: str, **changes: object) -> IndexedImage:
    record = ImageRecord(
        **{  # type: ignore[arg-type]
            "image_id": image_id(uri),
            "uri": uri,
            "status": "indexed",
            "width_px": 40,
            "height_px": 30,
            **changes,
        }
    )
    return IndexedImage(record, NOTHING if record.holds_instances else None)


@pytest.fixture
def store() -> InstanceStore:
    store = MemoryStore()
    store.create_version(GALLERY, VERSION, VersionSpec(dim=DIM, digest="d"))
    one = "file:///photos/2024/a%20b.jpg"
    images = [
        stored(one),
        stored("file:///photos/2025/a%20b.jpg"),
        stored("file:///photos/2025/c.jpg"),
        stored("s3://bucket/deep/d.jpg"),
        stored("file:///photos/copy/e.jpg", same_as=image_id(one)),
        stored("file:///photos/f.jpg", status="failed", reason="truncated", detail="no end"),
    ]
    store.upsert_images(GALLERY, VERSION, images)
    store.promote(GALLERY, VERSION)
    return store


@pytest.mark.parametrize(
    ("name", "uri"),
    [
        ("c.jpg", "file:///photos/2025/c.jpg"),
        ("2025/c.jpg", "file:///photos/2025/c.jpg"),
        ("./2025/c.jpg", "file:///photos/2025/c.jpg"),
        ("/photos/2024/a b.jpg", "file:///photos/2024/a%20b.jpg"),
        ("file:///photos/2024/a%20b.jpg", "file:///photos/2024/a%20b.jpg"),
        ("2024/a b.jpg", "file:///photos/2024/a%20b.jpg"),
        ("s3://bucket/deep/d.jpg", "s3://bucket/deep/d.jpg"),
        ("d.jpg", "s3://bucket/deep/d.jpg"),
        ("e.jpg", "file:///photos/2024/a%20b.jpg"),  # the photo with the same content
    ],
)
def test_photos_are_found_by_name_path_and_uri(store: InstanceStore, name: str, uri: str) -> None:
    photos = GalleryPhotos(store, GALLERY, VERSION, [name])
    found = photos.of(name)
    assert found.image_id == found.file_name == image_id(uri)
    assert (found.width_px, found.height_px) == (40, 30)
    assert photos.uris == {image_id(uri): uri}


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("x.jpg", UnknownPhoto, r"'x.jpg' is not in gallery 'mine'; index it first"),
        ("2023/c.jpg", UnknownPhoto, "is not in gallery"),
        ("b.jpg", UnknownPhoto, "is not in gallery"),  # the end of a name is no name
        ("s3://other/deep/d.jpg", UnknownPhoto, "is not in gallery"),
        ("f.jpg", UnknownPhoto, r"could not be indexed \(truncated: no end\)"),
        ("a b.jpg", DataError, r"may be 2 photos .*2024/a%20b.jpg and file:///photos/2025/a%20b"),
        ("", DataError, "the photo is blank"),
    ],
)
def test_other_names_are_refused(
    store: InstanceStore, name: str, kind: type[Exception], message: str
) -> None:
    photos = GalleryPhotos(store, GALLERY, VERSION, [name])
    with pytest.raises(kind, match=message) as refused:
        photos.of(name)
    assert type(refused.value) is kind
    assert photos.uris == {}


def test_a_path_is_relative_to_the_current_folder_first(
    store: InstanceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = canonical_uri(tmp_path / "c.jpg")
    store.upsert_images(GALLERY, VERSION, [stored(here)])
    monkeypatch.chdir(tmp_path)
    photos = GalleryPhotos(store, GALLERY, VERSION, ["c.jpg", "2025/c.jpg"])
    assert photos.of("c.jpg").image_id == image_id(here)
    assert photos.of("2025/c.jpg").image_id == image_id("file:///photos/2025/c.jpg")


def test_files_are_gathered_under_their_ids(tmp_path: Path, s3_options: str) -> None:
    from reir.object_storage import open_filesystem

    (tmp_path / "a b.jpg").write_bytes(b"one")
    local, remote = canonical_uri(tmp_path / "a b.jpg"), f"s3://runs-of-reir/c.jpg{s3_options}"
    filesystem, path = open_filesystem(remote)
    with filesystem.open_output_stream(path) as file:
        file.write(b"two")
    folder = tmp_path / "photos"
    for _ in range(2):  # the second time, there is nothing to do
        gather_photos(folder, {"1": local, "2": remote})
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == {"1": b"one", "2": b"two"}
    assert (folder / "1").is_symlink()
    (tmp_path / "a b.jpg").rename(tmp_path / "moved.jpg")
    with pytest.raises(DataError, match=r"1 of 2 photos cannot be read, such as file://.*a%20b"):
        gather_photos(folder, {"1": local, "2": remote})
    gather_photos(folder, {"1": canonical_uri(tmp_path / "moved.jpg")})
    assert (folder / "1").read_bytes() == b"one"

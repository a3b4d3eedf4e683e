"""Photos with equal content are encoded once, however their files change."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reir.cli import main
from reir.images.decode import canonical_uri, content_hash, image_id, read_image
from reir.records import ImageRecord, IndexedImage, Instances, RgbImage
from reir.store import InstanceStore, VersionSpec, open_store
from reir.store.duplicates import merge_holders
from reir.store.memory import MemoryStore
from reir_ingestion.content_index import BloomFilter, ContentIndex
from reir_ingestion.loading import LoadedImage, PendingImage
from reir_ingestion.pipeline import IndexOptions, index
from reir_ingestion.sources import SourceFile, open_source
from reir_ingestion.verify import verify
from reir_testing import FakeEncoder
from reir_testing.ingestion import stored_rows, write_scenes

PRUNE = IndexOptions(batch_size=3, prune=True)


class CountingEncoder(FakeEncoder):
    """Counts photos."""

    count = 0

    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        self.count += len(images)
        return super().encode_images(images)


def key_of(path: Path) -> str:
    return image_id(canonical_uri(path))


def rows(store: InstanceStore) -> dict[str, ImageRecord]:
    return {row.image_id: row for row in store.iter_images("g", store.live_version("g"))}


def holders(store: InstanceStore, *paths: Path) -> list[str]:
    """For each photo the name of the file that holds its instances."""
    found = rows(store)
    names = {key: Path(row.uri).name for key, row in found.items()}
    return [names[found[key_of(path)].same_as or key_of(path)] for path in paths]


def fresh_rows(folder: Path) -> dict[str, object]:
    store = MemoryStore()
    index(folder, "g", store, FakeEncoder())
    return stored_rows(store, "g")


def test_a_changed_a_deleted_a_renamed_and_a_duplicated_photo_on_the_second_run(
    any_store: InstanceStore, tmp_path: Path
) -> None:
    store, folder = any_store, tmp_path / "photos"
    changed, deleted, renamed, copied, *_ = write_scenes(folder, 12)
    index(folder, "g", store, FakeEncoder(), options=PRUNE)
    changed.write_bytes(write_scenes(tmp_path / "other", 1, seed=9)[0].read_bytes())
    deleted.unlink()
    moved, copy = folder / "zz-moved.png", folder / "zz-copy.jpg"
    old_key, instances = key_of(renamed), instance_rows(store, renamed)
    renamed.rename(moved)
    copy.write_bytes(copied.read_bytes())

    encoder = CountingEncoder()
    report = index(folder, "g", store, encoder, options=PRUNE)
    assert (report.new, report.changed, report.unchanged, report.removed) == (2, 1, 9, 2)
    assert (report.duplicates, report.num_images) == (2, 12)
    assert encoder.count == 1
    assert stored_rows(store, "g") == fresh_rows(folder)
    assert holders(store, moved, copy, copied) == [moved.name, copied.name, copied.name]
    assert old_key not in rows(store)
    assert instance_rows(store, moved) == instances
    (info,) = store.versions("g")
    assert (
        store.num_stored("g", info.name)
        == info.num_instances
        == sum(row.num_instances for row in rows(store).values())
    )


def instance_rows(store: InstanceStore, path: Path) -> list[tuple[object, ...]]:
    key, version = key_of(path), store.live_version("g")
    found = store.get_instances("g", version, [key], with_vectors=True)[key]
    return [
        (each.box, each.objectness, each.vector is not None and each.vector.tobytes())
        for each in found
    ]


def test_a_content_stays_as_long_as_one_of_its_files(store: MemoryStore, tmp_path: Path) -> None:
    first, *_ = write_scenes(tmp_path / "photos", 3)
    copies = [tmp_path / "photos" / f"copy-{number}.png" for number in range(3)]
    for copy in copies:
        copy.write_bytes(first.read_bytes())
    encoder = CountingEncoder()
    report = index(tmp_path / "photos", "g", store, encoder, options=PRUNE)
    assert (report.new, report.duplicates, encoder.count) == (6, 3, 3)
    assert holders(store, *copies) == [first.name] * 3
    instances = instance_rows(store, first)
    for gone, heir in zip((first, *copies), copies, strict=False):
        gone.unlink()
        report = index(tmp_path / "photos", "g", store, encoder, options=PRUNE)
        assert (report.removed, encoder.count) == (1, 3)
        assert instance_rows(store, heir) == instances
        assert holders(store, heir) == [heir.name]
    copies[-1].unlink()
    report = index(tmp_path / "photos", "g", store, encoder, options=PRUNE)
    assert (report.removed, report.num_images, report.duplicates) == (1, 2, 0)
    assert stored_rows(store, "g") == fresh_rows(tmp_path / "photos")


def test_a_known_duplicate_is_not_read_again(store: MemoryStore, tmp_path: Path) -> None:
    first, *_ = write_scenes(tmp_path / "photos", 3)
    (tmp_path / "photos" / "copy.png").write_bytes(first.read_bytes())
    index(tmp_path / "photos", "g", store, FakeEncoder())
    report = index(tmp_path / "photos", "g", store, FakeEncoder())
    assert (report.unchanged, report.duplicates, report.read) == (4, 1, 0)


@pytest.mark.parametrize(("batch_size", "threads"), list(product((1, 3, 64), (1, 4))))
def test_each_content_has_one_holder_for_any_batch_size(
    tmp_path: Path, batch_size: int, threads: int
) -> None:
    paths = write_scenes(tmp_path / "photos", 4)
    for number in range(30):
        copy = tmp_path / "photos" / f"{100 + number}.png"
        copy.write_bytes(paths[number % 4].read_bytes())
    store, encoder = MemoryStore(), CountingEncoder()
    options = IndexOptions(batch_size=batch_size, num_readers=threads, num_encoders=threads)
    report = index(tmp_path / "photos", "g", store, encoder, options=options)
    assert (report.new, report.duplicates, encoder.count) == (34, 30, 4)
    assert {row.same_as for row in rows(store).values()} == {"", *map(key_of, paths)}
    assert stored_rows(store, "g") == fresh_rows(tmp_path / "photos")


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_photos_that_swap_their_names(store: MemoryStore, tmp_path: Path, batch_size: int) -> None:
    options = IndexOptions(batch_size=batch_size)
    one, two, three, _ = write_scenes(tmp_path / "photos", 4)
    index(tmp_path / "photos", "g", store, FakeEncoder(), options=options)
    contents = [path.read_bytes() for path in (one, two, three)]
    for path, content in zip(
        (one, two, three), (contents[1], contents[2], contents[0]), strict=True
    ):
        path.write_bytes(content)
    report = index(tmp_path / "photos", "g", store, FakeEncoder(), options=options)
    assert (report.changed, report.num_failed) == (3, 0)
    assert stored_rows(store, "g") == fresh_rows(tmp_path / "photos")


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_the_holder_changes_while_a_duplicate_is_added(
    store: MemoryStore, tmp_path: Path, batch_size: int
) -> None:
    holder, *_ = write_scenes(tmp_path / "photos", 4)
    early, old, late = (tmp_path / "photos" / name for name in ("$.png", "1.png", "z.png"))
    old.write_bytes(holder.read_bytes())
    options = IndexOptions(batch_size=batch_size)
    index(tmp_path / "photos", "g", store, FakeEncoder(), options=options)
    for path in (early, late):
        path.write_bytes(holder.read_bytes())
    holder.write_bytes(write_scenes(tmp_path / "other", 1, seed=9)[0].read_bytes())
    encoder = CountingEncoder()
    report = index(tmp_path / "photos", "g", store, encoder, options=options)
    assert (report.new, report.changed, encoder.count) == (2, 1, 1)
    assert len(set(holders(store, early, old, late))) == 1
    (info,) = store.versions("g")
    assert (
        store.num_stored("g", info.name)
        == info.num_instances
        == sum(row.num_instances for row in rows(store).values())
    )
    assert len(instance_rows(store, holder)) == rows(store)[key_of(holder)].num_instances


@pytest.mark.parametrize("seed", range(12))
def test_random_changes_end_with_one_holder_of_each_content(
    store: MemoryStore, tmp_path: Path, seed: int
) -> None:
    """Files come, go and get the content of others, at random: nothing is lost, nothing twice."""
    rng = random.Random(seed)
    contents = [path.read_bytes() for path in write_scenes(tmp_path / "contents", 6)]
    folder = tmp_path / "photos"
    folder.mkdir()
    for _ in range(6):
        for number in range(12):
            path = folder / f"{number:02}.png"
            match rng.randrange(4):
                case 0:
                    path.write_bytes(rng.choice(contents))
                case 1:
                    path.unlink(missing_ok=True)
        (folder / "always.png").write_bytes(contents[0])
        options = IndexOptions(batch_size=rng.choice((1, 2, 5, 64)), prune=rng.random() < 0.8)
        index(folder, "g", store, FakeEncoder(), options=options)
        report = verify(open_source(folder), "g", store, store.live_version("g"))
        gone = 0 if options.prune else report.differences["gone"]
        assert {kind: n for kind, n in report.differences.items() if n} == (
            {"gone": gone} if gone else {}
        )
        found = rows(store).values()
        hashes = [row.content_hash for row in found if row.holds_instances]
        assert sorted(hashes) == sorted({row.content_hash for row in found})


@pytest.mark.parametrize("batch_size", [1, 64])
def test_duplicates_of_a_refused_photo_fail_for_the_same_reason(
    store: MemoryStore, tmp_path: Path, batch_size: int
) -> None:
    class RefusingEncoder(FakeEncoder):
        def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
            if any(np.array_equal(image, refused) for image in images):
                raise ValueError("not this one")
            return super().encode_images(images)

    first, *_ = write_scenes(tmp_path / "photos", 3)
    refused = read_image(first)
    for name in ("001 copy.png", "copy.png"):
        (tmp_path / "photos" / name).write_bytes(first.read_bytes())
    options = IndexOptions(batch_size=batch_size, num_encoders=2)
    report = index(tmp_path / "photos", "g", store, RefusingEncoder(), options=options)
    assert (report.new, report.failed, report.duplicates) == (2, {"not_encoded": 3}, 0)
    again = IndexOptions(retry_failed=True)
    report = index(tmp_path / "photos", "g", store, FakeEncoder(), options=again)
    assert (report.changed, report.num_failed, report.duplicates) == (3, 0, 2)


def test_equal_photos_with_different_attributes_are_not_duplicates(store: MemoryStore) -> None:
    store.create_version("g", "v", VersionSpec(dim=16, digest="ab" * 32))
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)

    def loaded(name: str) -> LoadedImage:
        file = SourceFile(f"file:///{name}.jpg", 1, 1)
        return LoadedImage(PendingImage(file), content_hash(b"x"), pixels, 4, 4)

    (instances,) = FakeEncoder().encode_images([pixels])
    holder = loaded("a").to_indexed(instances)
    tagged = replace(holder.record, attributes={"album": "b"})
    store.upsert_images("g", "v", [IndexedImage(tagged, instances)])
    content_index = ContentIndex(store, "g", "v")
    one, other = content_index.mark_duplicates([loaded("b"), loaded("c")])
    assert (one.same_as, other.same_as) == ("", image_id("file:///b.jpg"))


def test_the_bloom_filter_has_no_false_negatives_and_few_false_positives() -> None:
    hashes = [
        hashlib.sha256(bytes([number % 256, number // 256])).hexdigest() for number in range(40_000)
    ]
    seen = BloomFilter()
    for each in hashes[:20_000]:
        seen.add(each)
    assert all(each in seen for each in hashes[:20_000])
    assert sum(each in seen for each in hashes[20_000:]) < 20


def test_the_command_lists_duplicates_and_near_duplicates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REIR_STORE", str(tmp_path / "store"))
    folder = tmp_path / "photos"
    first, second, *_ = write_scenes(folder, 6)
    (folder / "copy.png").write_bytes(first.read_bytes())
    smaller = Image.open(second).convert("RGB").resize((120, 90))
    smaller.save(folder / "smaller.jpg", quality=70)
    with closing(open_store()) as store:
        report = index(folder, "g", store, FakeEncoder())
    assert (report.duplicates, report.near_duplicates) == (1, 2)

    def listed(*options: str) -> list[list[str]]:
        assert main.run(["duplicates", "g", "--json", *options]) == 0
        return list(json.loads(capsys.readouterr().out)["groups"])

    assert listed() == [[canonical_uri(first), canonical_uri(folder / "copy.png")]]
    assert listed("--near") == [[canonical_uri(second), canonical_uri(folder / "smaller.jpg")]]
    assert main.run(["duplicates", "g"]) == 0
    shown = capsys.readouterr().out
    assert "copy.png" in shown
    assert "1 group of photos that are identical: 1 could be removed" in shown
    assert main.run(["duplicates", "none"]) == 1
    assert "no gallery 'none'" in capsys.readouterr().err


class CallbackEncoder(FakeEncoder):
    """An encoder that calls `meanwhile` before its first photo."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        super().__init__()
        self._meanwhile = [meanwhile]

    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        while self._meanwhile:
            self._meanwhile.pop()()
        return super().encode_images(images)


def overlapping(folder: Path) -> tuple[Path, Path]:
    """Two folders of eight photos each, which have five photos in common."""
    ours, theirs = folder / "ours", folder / "theirs"
    paths = write_scenes(ours, 11)
    theirs.mkdir()
    for path in paths[3:]:
        shutil.copy(path, theirs / f"copy-{path.name}")
    for path in paths[8:]:
        path.unlink()
    return ours, theirs


def assert_held_once(store: InstanceStore, folder: Path) -> None:
    found = list(rows(store).values())
    held = Counter(row.content_hash for row in found if row.holds_instances)
    assert (len(found), len(held), set(held.values())) == (16, 11, {1})
    (info,) = store.versions("g")
    assert info.num_instances == sum(row.num_instances for row in found)
    assert info.num_instances == store.num_stored("g", info.name)
    assert verify(open_source(str(folder)), "g", store, info.name).is_consistent


def test_two_concurrent_runs_leave_each_content_with_one_holder(
    any_store: InstanceStore, tmp_path: Path
) -> None:
    ours, theirs = overlapping(tmp_path)
    encoder = CallbackEncoder(lambda: index(theirs, "g", any_store, FakeEncoder()))
    report = index(ours, "g", any_store, encoder, options=IndexOptions(num_encoders=1))
    assert report.merged == 5
    assert_held_once(any_store, tmp_path)


def test_the_next_run_merges_and_reports_contents_stored_twice(tmp_path: Path) -> None:
    ours, theirs = overlapping(tmp_path)
    store, other = MemoryStore(), MemoryStore()
    index(ours, "g", store, FakeEncoder())
    index(theirs, "g", other, FakeEncoder())
    version = store.live_version("g")
    copies = list(other.get_indexed("g", version, list(rows(other))).values())
    store.upsert_images("g", version, copies)
    report = index(ours, "g", store, FakeEncoder())
    assert (report.unchanged, report.merged) == (8, 5)
    assert ("merged", "5", "two concurrent runs stored them; now duplicates") in report._rows()
    assert_held_once(store, tmp_path)
    assert index(ours, "g", store, FakeEncoder()).merged == 0


def test_a_duplicate_of_a_merged_photo_names_the_new_holder(tmp_path: Path) -> None:
    """One run merged the photo while another one was about to write its duplicate."""
    first, second, third = (tmp_path / f"{name}.jpg" for name in "abc")
    write_scenes(tmp_path / "one", 1)[0].rename(first)
    shutil.copy(first, second)
    store = MemoryStore()
    index(tmp_path, "g", store, FakeEncoder())
    shutil.copy(first, third)
    late = replace(
        rows(store)[key_of(second)],
        image_id=key_of(third),
        uri=canonical_uri(third),
        same_as=key_of(second),
    )
    store.upsert_images("g", store.live_version("g"), [IndexedImage(late, None)])
    index(tmp_path, "g", store, FakeEncoder())
    assert holders(store, first, second, third) == ["a.jpg"] * 3


def test_equal_photos_with_different_attributes_are_not_merged() -> None:
    store, place = MemoryStore(), ("g", "v1")
    encoder = FakeEncoder()
    store.create_version(*place, VersionSpec(dim=encoder.dim, digest="d"))
    (instances,) = encoder.encode_images([np.zeros((32, 32, 3), np.uint8)])
    for name in ("x", "y"):
        record = ImageRecord(
            image_id=name,
            uri=f"file:///{name}.jpg",
            status="indexed",
            content_hash="0" * 64,
            num_instances=len(instances),
            attributes={"album": name},
        )
        store.upsert_images(*place, [IndexedImage(record, instances)])
    assert merge_holders(store, *place, {"0" * 64}) == 0
    held = [row.holds_instances for row in store.iter_images(*place)]
    assert held == [True, True]

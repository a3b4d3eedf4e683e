"""All stores give the same results: each test runs a store and a memory store side by side.

Scores are compared with a tolerance; the order of equal scores is not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from reir.errors import FilterError, GalleryNotFound, QueryError, SchemaMismatch, StoreError
from reir.records import FloatArray, ImageRecord, IndexedImage, Instances
from reir.store import InstanceRow, InstanceStore, VersionSpec, collection
from reir.store.filter_numpy import evaluate, photo_column
from reir.store.filters import parse
from reir.store.memory import MemoryStore
from reir.store.validation import instance_id

DIM = 8
SPEC = VersionSpec(dim=DIM, digest="ab" * 32, settings={"num_candidates": 30, "nms": 0.5})
V = "v1"

MakeImage = Callable[..., IndexedImage]


class Pair:
    """A store and a memory store, its twin, that get the same calls."""

    def __init__(self, store: InstanceStore, gallery: str) -> None:
        self.store, self.twin, self.gallery = store, MemoryStore(), gallery
        for each in (store, self.twin):
            each.create_version(gallery, V, SPEC)

    def upsert(self, images: Sequence[IndexedImage]) -> None:
        for each in (self.store, self.twin):
            each.upsert_images(self.gallery, V, images)

    def delete(self, image_ids: Sequence[str]) -> None:
        counts = [
            each.delete_images(self.gallery, V, image_ids) for each in (self.store, self.twin)
        ]
        assert counts[0] == counts[1]

    def check_content(self) -> None:
        """Ledger, instances and counts agree."""
        records = list(self.store.iter_images(self.gallery, V))
        assert records == list(self.twin.iter_images(self.gallery, V))
        ids = [record.image_id for record in records]
        assert self.store.get_images(self.gallery, V, ids) == {r.image_id: r for r in records}
        found = self.store.get_instances(self.gallery, V, ids, with_vectors=True)
        wanted = self.twin.get_instances(self.gallery, V, ids, with_vectors=True)
        assert list(found) == list(wanted)
        for image_id, rows in wanted.items():
            assert len(found[image_id]) == len(rows)
            for row, other in zip(found[image_id], rows, strict=True):
                assert_same_row(row, other)
        assert self.store.versions(self.gallery) == self.twin.versions(self.gallery)
        assert self.store.num_stored(self.gallery, V) == self.twin.num_stored(self.gallery, V)
        photos = self.store.get_photos(self.gallery, V, [*ids, "unknown"])
        assert set(photos) == {image_id for image_id, rows in wanted.items() if rows}
        for image_id, photo in photos.items():
            assert len(photo) == len(photo.vectors) == len(photo.boxes) == len(wanted[image_id])
            for number, (row, vector) in enumerate(
                zip(wanted[image_id], photo.vectors, strict=True)
            ):
                assert_same_row(photo.row(number)._replace(vector=vector), row)

    def check_search(self, queries: FloatArray, limit: int, where: str | None = None) -> None:
        """Hits agree; among equal scores at the end either may be returned."""
        found = self.store.search(self.gallery, V, queries, limit, where=where)
        wanted = self.twin.search(self.gallery, V, queries, limit, where=where)
        everything = self.twin.search(self.gallery, V, queries, 16_384, where=where)
        assert len(found) == len(wanted) == len(queries)
        for hits, twin_hits, all_hits in zip(found, wanted, everything, strict=True):
            scores = [hit.score for hit in hits]
            assert scores == sorted(scores, reverse=True)
            np.testing.assert_allclose(scores, [hit.score for hit in twin_hits], atol=1e-5)
            known = {hit.instance_id: hit for hit in all_hits}
            assert len({hit.instance_id for hit in hits}) == len(hits)
            for hit in hits:
                assert_same_row(hit, known[hit.instance_id])


def assert_same_row(row: InstanceRow, other: InstanceRow) -> None:
    assert (row.instance_id, row.image_id, row.uri) == (
        other.instance_id,
        other.image_id,
        other.uri,
    )
    assert row.box == other.box
    assert (row.objectness, row.area) == (other.objectness, other.area)
    assert row.score == pytest.approx(other.score, abs=1e-5)
    assert row.attributes == other.attributes
    assert (row.vector is None) == (other.vector is None)
    if row.vector is not None:
        np.testing.assert_array_equal(row.vector, other.vector)


@pytest.fixture
def pair(store: InstanceStore, gallery: str) -> Pair:
    return Pair(store, gallery)


def queries(count: int = 3) -> FloatArray:
    return np.random.default_rng(5).standard_normal((count, DIM)).astype(np.float32)


def _whole_image_boxes(count: int) -> FloatArray:
    """Boxes that cover the whole image."""
    return np.tile(np.array([0, 0, 1, 1], dtype=np.float32), (count, 1))


def failed(image_id: str) -> IndexedImage:
    record = ImageRecord(
        image_id=image_id, uri="file:///x", status="failed", reason="empty", detail="0 bytes"
    )
    return IndexedImage(record, None)


def test_writing_a_batch_again_changes_nothing(pair: Pair, make_image: MakeImage) -> None:
    batch = [make_image("a"), make_image("b", 5), failed("c")]
    pair.upsert(batch)
    pair.check_content()
    pair.upsert(batch)
    pair.check_content()
    pair.check_search(queries(), 4)


def test_an_empty_batch_is_allowed(pair: Pair) -> None:
    pair.upsert([])
    pair.delete([])
    pair.check_content()


@pytest.mark.parametrize("counts", [(6, 2), (2, 6), (4, 0), (0, 4), (6, 2, 4), (3, 3)])
def test_replacement_keeps_only_the_new_instances(
    pair: Pair, make_image: MakeImage, counts: tuple[int, ...]
) -> None:
    for seed, count in enumerate(counts):
        pair.upsert([make_image("a", count, seed=seed), make_image("b", 2)])
    pair.check_content()
    pair.check_search(queries(), 20)


def test_the_last_of_two_images_with_the_same_id_is_stored(
    pair: Pair, make_image: MakeImage
) -> None:
    pair.upsert([make_image("a", 5, seed=1), make_image("a", 2, seed=2)])
    pair.check_content()


def test_an_image_may_fail_and_recover(pair: Pair, make_image: MakeImage) -> None:
    pair.upsert([make_image("a", 4)])
    pair.upsert([failed("a")])
    pair.check_content()
    pair.check_search(queries(), 5)
    pair.upsert([make_image("a", 2)])
    pair.check_content()


def test_delete_removes_images_and_returns_their_number(pair: Pair, make_image: MakeImage) -> None:
    pair.upsert([make_image("a", 4), make_image("ab", 3), failed("c")])
    pair.delete(["a", "c", "never there", "a"])
    pair.check_content()
    pair.check_search(queries(), 10)
    pair.delete(["a"])
    pair.upsert([make_image("a", 1, seed=3)])
    pair.check_content()
    pair.check_search(queries(), 10)


def test_touch_changes_only_the_modification_time(pair: Pair, make_image: MakeImage) -> None:
    pair.upsert([make_image("a"), make_image("b", 5), failed("c")])
    for store in (pair.store, pair.twin):
        before = store.get_images(pair.gallery, V, ["a", "b", "c"])
        store.touch_images(pair.gallery, V, {"a": 7, "c": 2**60, "unknown": 1})
        after = store.get_images(pair.gallery, V, ["a", "b", "c", "unknown"])
        times = {"a": 7, "b": before["b"].mtime_ns, "c": 2**60}
        assert after == {key: replace(before[key], mtime_ns=times[key]) for key in before}
        store.touch_images(pair.gallery, V, {})
    pair.check_content()
    pair.check_search(queries(), 4)


def test_get_of_unknown_images_is_empty(pair: Pair, make_image: MakeImage) -> None:
    pair.upsert([make_image("a")])
    assert pair.store.get_images(pair.gallery, V, ["b"]) == {}
    assert pair.store.get_instances(pair.gallery, V, ["b"]) == {}
    assert pair.store.get_images(pair.gallery, V, []) == {}


@pytest.mark.parametrize(
    "where",
    [
        "area >= 0",
        "area > 0.1",
        "area > 0.6",
        "objectness > 0.999",
        "objectness > 2",
        'image_id == "i03"',
        'image_id in ["i01", "i02", "none"]',
        'uri startswith "file:///photos/i0"',
        'not (uri startswith "file:///photos/i0")',
        "x1 < 0.3 and y2 > 0.7 or attr.tenant == 3",
        'attr.camera == "X100"',
        'attr.camera != "X100"',
        'attr.camera in ["X100", "GR"]',
        'attr.camera not in ["X100"]',
        'attr.camera startswith "G"',
        "attr.flash == true",
        "attr.flash != true",
        "attr.tenant >= 2 and attr.tenant < 4",
        "attr.tenant == 2.0",
        "attr.nothing == 1",
        "not (attr.nothing == 1)",
        "attr.tenant in []",
        "cx < 0.5",
        "cy >= 0.25 and height < 0.4",
        "width > 0.2 or width == 0",
        "neighbors == 0",
        "neighbors > 1 and not (neighbors >= 3)",
        "neighbors in [1, 3] and cx > 0.4",
    ],
)
def test_filters(filtered: Pair, where: str) -> None:
    filtered.check_search(queries(), 7, where)
    filtered.check_search(queries(1), 1000, where)
    (hits,) = filtered.store.search(filtered.gallery, V, queries(1), 1000, where=where)
    names = [f"i{number:02}" for number in range(40)]
    for image_id, photo in filtered.store.get_photos(filtered.gallery, V, names).items():
        mask = evaluate(parse(where), partial(photo_column, photo))
        kept = {instance_id(image_id, number) for number in np.flatnonzero(mask).tolist()}
        assert kept == {hit.instance_id for hit in hits if hit.image_id == image_id}


@pytest.fixture(scope="module")
def filtered_galleries() -> dict[int, Pair]:
    return {}


@pytest.fixture
def filtered(
    store: InstanceStore, filtered_galleries: dict[int, Pair], make_image: MakeImage
) -> Pair:
    """40 images with attributes, made once a store."""
    key = 0 if isinstance(store, MemoryStore) else id(store)
    if key not in filtered_galleries:
        if "filtered" in store.galleries():
            store.drop_gallery("filtered")
        pair = filtered_galleries[key] = Pair(store, "filtered")
        pair.upsert(
            [
                make_image(
                    f"i{number:02}",
                    1 + number % 4,
                    attributes={
                        **(
                            {}
                            if number % 5 == 0
                            else {"camera": ["X100", "GR", "é\n%"][number % 3]}
                        ),
                        "tenant": number % 6,
                        "flash": number % 2 == 0,
                        "nothing": None,
                    },
                )
                for number in range(40)
            ]
        )
    return filtered_galleries[key]


def test_attributes_survive_with_their_types(pair: Pair, make_image: MakeImage) -> None:
    attributes = {
        "s": 'a"b\\c\n%_é',
        "i": 2**53 + 1,
        "f": 0.1,
        "b": False,
        "n": None,
        "": "",
        "x y": 1,
    }
    pair.upsert([make_image("a", attributes=attributes)])
    pair.check_content()
    row = pair.store.search(pair.gallery, V, queries(1), 1)[0][0]
    assert row.attributes == attributes
    assert {name: type(value) for name, value in row.attributes.items()} == {
        name: type(value) for name, value in attributes.items()
    }


def test_every_instance_of_equal_score_is_returned_once(pair: Pair) -> None:
    vectors = np.tile(np.eye(DIM, dtype=np.float32)[0], (12, 1))
    instances = Instances(_whole_image_boxes(12), np.ones(12, np.float32), vectors, vectors[0])
    record = ImageRecord(image_id="t", uri="file:///t", status="indexed", num_instances=12)
    pair.upsert([IndexedImage(record, instances)])
    for limit in (1, 5, 12, 13):
        pair.check_search(np.eye(DIM, dtype=np.float32)[:2], limit)


def test_limit_beyond_the_rows_returns_them_all(pair: Pair, make_image: MakeImage) -> None:
    pair.upsert([make_image("a", 4)])
    assert [len(hits) for hits in pair.store.search(pair.gallery, V, queries(2), 16_384)] == [4, 4]


def test_an_empty_version_has_no_hits(pair: Pair) -> None:
    assert pair.store.search(pair.gallery, V, queries(2), 5) == [[], []]
    assert pair.store.search(pair.gallery, V, queries(2), 5, where="area > 0") == [[], []]
    assert pair.store.search(pair.gallery, V, queries(0), 5) == []
    pair.check_content()


@pytest.mark.parametrize("limit", [0, -1, 16_385])
def test_limit_out_of_range_is_refused(pair: Pair, limit: int) -> None:
    with pytest.raises(QueryError, match=f"limit: must be 1 to 16384, got {limit}"):
        pair.store.search(pair.gallery, V, queries(), limit)


@pytest.mark.parametrize("vectors", [np.zeros(DIM), np.full((1, DIM), np.nan)], ids=["1d", "nan"])
def test_bad_queries_are_refused(pair: Pair, vectors: FloatArray) -> None:
    with pytest.raises(QueryError, match="vectors"):
        pair.store.search(pair.gallery, V, vectors, 3)


@pytest.mark.parametrize("where", ["area >", "camera == 1", 'uri == "a" or', "area > 'x'"])
def test_bad_filters_are_refused(pair: Pair, where: str) -> None:
    with pytest.raises(FilterError):
        pair.store.search(pair.gallery, V, queries(), 3, where=where)


ODD_IDS = [
    "plain",
    "with space",
    'quo"te',
    "quo'te",
    "back\\slash",
    "per%cent_",
    "ünïcødé 😀",
    "a#1",
]


def test_unusual_ids_and_uris(pair: Pair, make_image: MakeImage) -> None:
    images = [make_image(image_id) for image_id in ODD_IDS]
    pair.upsert(images)
    pair.check_content()
    for image_id in ODD_IDS:
        quoted = image_id.replace("\\", "\\\\").replace('"', '\\"')
        pair.check_search(queries(1), 5, f'image_id == "{quoted}"')
        pair.check_search(queries(1), 5, f'uri startswith "file:///photos/{quoted}"')
    pair.delete(ODD_IDS[1:4])
    pair.check_content()


def test_newlines_and_percent_signs_in_uris(pair: Pair) -> None:
    for number, uri in enumerate(["file:///a\nb", "file:///a%0Ab", "file:///a%b_c", "file:///é"]):
        vector = np.eye(DIM, dtype=np.float32)[number]
        instances = Instances(_whole_image_boxes(1), np.ones(1, np.float32), vector[None], vector)
        record = ImageRecord(image_id=f"n{number}", uri=uri, status="indexed", num_instances=1)
        pair.upsert([IndexedImage(record, instances)])
    pair.check_content()
    for where in ('uri == "file:///a\\nb"', 'uri startswith "file:///a%"', 'uri >= "file:///é"'):
        pair.check_search(queries(1), 10, where)


def test_failed_images_are_listed_by_status(pair: Pair, make_image: MakeImage) -> None:
    pair.upsert([failed("z"), make_image("m"), failed("b")])
    pair.check_content()
    listed = pair.store.iter_images(pair.gallery, V, status="failed")
    assert [(row.image_id, row.reason, row.detail) for row in listed] == [
        ("b", "empty", "0 bytes"),
        ("z", "empty", "0 bytes"),
    ]
    assert [r.image_id for r in pair.store.iter_images(pair.gallery, V, status="indexed")] == ["m"]


def test_iteration_over_many_pages_is_ordered_and_complete(
    pair: Pair, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collection, "PAGE_ROWS", 7)
    pair.upsert([make_image(f"{number * 37 % 50:03}", 2) for number in range(50)])
    pair.delete(["011", "012"])
    pair.check_content()


def test_more_images_than_milvus_returns_at_once(store: InstanceStore, gallery: str) -> None:
    count = 16_384 + 600
    store.create_version(gallery, V, VersionSpec(dim=2, digest="d"))
    for start in range(0, count, 4096):
        numbers = range(start, min(start + 4096, count))
        store.upsert_images(gallery, V, [failed(f"{number:06}") for number in numbers])
    listed = [record.image_id for record in store.iter_images(gallery, V)]
    assert listed == [f"{number:06}" for number in range(count)]


def test_versions_are_listed_oldest_first(store: InstanceStore, gallery: str) -> None:
    for version in ("zebra", "ant", "bee"):
        store.create_version(gallery, version, SPEC)
    store.promote(gallery, "bee")
    listed = store.versions(gallery)
    assert [info.name for info in listed] == ["zebra", "ant", "bee"]
    assert [info.live for info in listed] == [False, False, True]
    assert listed[0].spec == SPEC
    assert gallery in store.galleries()


def test_creating_a_version_again_keeps_its_images(pair: Pair, make_image: MakeImage) -> None:
    pair.upsert([make_image("a")])
    pair.store.create_version(pair.gallery, V, SPEC)
    pair.check_content()


def test_create_with_another_spec_is_refused(pair: Pair) -> None:
    other = VersionSpec(dim=DIM, digest="other", settings=SPEC.settings)
    with pytest.raises(SchemaMismatch, match="other") as caught:
        pair.store.create_version(pair.gallery, V, other)
    assert SPEC.digest in str(caught.value)


def test_vectors_of_another_dimension_are_refused(pair: Pair, make_image: MakeImage) -> None:
    with pytest.raises(SchemaMismatch, match=f"dimension {DIM}, got 5"):
        pair.store.upsert_images(pair.gallery, V, [make_image("a", dim=5)])
    with pytest.raises(SchemaMismatch, match=f"dimension {DIM}, got 5"):
        pair.store.search(pair.gallery, V, np.ones((1, 5), dtype=np.float32), 3)
    pair.check_content()


def test_promote_switches_and_drop_of_live_is_refused(store: InstanceStore, gallery: str) -> None:
    store.create_version(gallery, "one", SPEC)
    with pytest.raises(GalleryNotFound, match="no live version"):
        store.live_version(gallery)
    store.promote(gallery, "one")
    store.create_version(gallery, "two", SPEC)
    assert store.live_version(gallery) == "one"
    store.promote(gallery, "two")
    assert store.live_version(gallery) == "two"
    with pytest.raises(StoreError, match=r"'two' of gallery .* is live"):
        store.drop_version(gallery, "two")
    store.drop_version(gallery, "one")
    assert [info.name for info in store.versions(gallery)] == ["two"]


def test_a_dropped_version_is_gone_and_can_be_created_again(
    store: InstanceStore, gallery: str, make_image: MakeImage
) -> None:
    for count in (4, 2):
        store.create_version(gallery, V, SPEC)
        store.upsert_images(gallery, V, [make_image("a", count)])
        assert len(store.search(gallery, V, queries(1), 10)[0]) == count
        store.drop_version(gallery, V)
        with pytest.raises(GalleryNotFound):
            store.search(gallery, V, queries(1), 10)


def test_a_dropped_gallery_is_gone(store: InstanceStore, gallery: str) -> None:
    store.create_version(gallery, "one", SPEC)
    store.create_version(gallery, "two", SPEC)
    store.promote(gallery, "one")
    store.drop_gallery(gallery)
    assert gallery not in store.galleries()
    with pytest.raises(GalleryNotFound):
        store.live_version(gallery)
    with pytest.raises(GalleryNotFound):
        store.drop_gallery(gallery)


CALLS: list[tuple[str, Callable[[InstanceStore, str], object]]] = [
    ("promote", lambda store, gallery: store.promote(gallery, "nope")),
    ("drop", lambda store, gallery: store.drop_version(gallery, "nope")),
    ("upsert", lambda store, gallery: store.upsert_images(gallery, "nope", [failed("a")])),
    ("delete", lambda store, gallery: store.delete_images(gallery, "nope", ["a"])),
    ("get", lambda store, gallery: store.get_images(gallery, "nope", ["a"])),
    ("iterate", lambda store, gallery: list(store.iter_images(gallery, "nope"))),
    ("instances", lambda store, gallery: store.get_instances(gallery, "nope", ["a"])),
    ("search", lambda store, gallery: store.search(gallery, "nope", queries(), 3)),
]


@pytest.mark.parametrize("call", [call for _, call in CALLS], ids=[name for name, _ in CALLS])
def test_the_error_names_an_unknown_version(
    store: InstanceStore, call: Callable[[InstanceStore, str], object]
) -> None:
    with pytest.raises(GalleryNotFound, match="no gallery 'unknown'"):
        call(store, "unknown")


def test_the_error_about_an_unknown_version_lists_the_existing_ones(pair: Pair) -> None:
    with pytest.raises(GalleryNotFound, match=f"has no version 'nope'; it has {V}"):
        pair.store.search(pair.gallery, "nope", queries(), 3)
    with pytest.raises(GalleryNotFound):
        pair.store.versions("unknown")
    with pytest.raises(GalleryNotFound):
        pair.store.live_version("unknown")

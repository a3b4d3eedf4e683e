"""The query path: exactness against a slow reference, live versions, refusals."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reir
from reir.errors import FilterError, GalleryNotFound, QueryError, SchemaMismatch
from reir.query import ranking
from reir.query.search import Gallery, open_gallery
from reir.records import FloatArray, ImageRecord, IndexedImage, Instances, MaskRle
from reir.results import Hit
from reir.store import InstanceRow, InstanceStore, VersionSpec, open_store
from reir.store.filters import MAX_LENGTH
from reir.store.memory import MemoryStore
from reir_testing import FakeEncoder, draw_scene
from reir_testing.fake_models import FAKE_KINDS, BetterEncoder, WorseEncoder
from reir_testing.lookup_gallery import (
    DIM,
    TIED_VECTORS,
    LookupEncoder,
    fill_gallery,
    images_from_vectors,
    indexed_image,
)
from reir_testing.serving import draw_photo, index_photos


class CountingStore(MemoryStore):
    """A memory store that notes how many queries and rows each search asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.searches: list[tuple[int, int]] = []

    def search(
        self,
        gallery: str,
        version: str,
        vectors: FloatArray,
        limit: int,
        *,
        where: str | None = None,
    ) -> list[list[InstanceRow]]:
        self.searches.append((len(vectors), limit))
        return super().search(gallery, version, vectors, limit, where=where)


@pytest.fixture(params=["memory", "lite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[InstanceStore]:
    opened = open_store("memory:" if request.param == "memory" else str(tmp_path / "store"))
    yield opened
    opened.close()


def drawn(pool: FloatArray, num: int, seed: int) -> FloatArray:
    return pool[np.random.default_rng(seed).integers(len(pool), size=num)]


def scattered(num: int, seed: int) -> FloatArray:
    """Unit vectors without ties."""
    vectors = np.random.default_rng(seed).normal(size=(num, DIM))
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / lengths, dtype=np.float32)


def reference(
    images: Sequence[IndexedImage],
    query: FloatArray,
    k: int,
    per_image: int,
    parity: int | None = None,
) -> list[tuple[str, float]]:
    """All instances, sorted by Python, then taken one by one: (instance id, score)."""
    rows = []
    for image in images:
        if parity is not None and image.record.attributes["parity"] != parity:
            continue
        assert image.instances is not None
        for number, vector in enumerate(image.instances.vectors):
            rows.append((-float(vector @ query), image.record.image_id, number))
    taken: list[tuple[str, float]] = []
    seen: list[str] = []
    for negative, image_id, number in sorted(rows):
        if len(taken) < k and seen.count(image_id) < per_image:
            seen.append(image_id)
            taken.append((f"{image_id}#{number}", -negative))
    return taken


def named(hits: Sequence[Hit]) -> list[tuple[str, float]]:
    return [(hit.instance_id, hit.score) for hit in hits]


def test_search_matches_reference_with_ties(store: InstanceStore) -> None:
    counts = [0, 1, 30, 12, 2, 30, 30, 7, 1, 25, 30, 30]
    images = images_from_vectors(drawn(TIED_VECTORS, sum(counts), seed=0), counts)
    fill_gallery(store, images)
    gallery = Gallery("photos", store, LookupEncoder())
    for k, per_image, parity, query in product((1, 3, 10, 60), (1, 2, 40), (None, 1), (0, 9, 23)):
        where = None if parity is None else f"attr.parity == {parity}"
        found = gallery.search(f"number {query}", k=k, per_image=per_image, where=where)
        wanted = reference(images, TIED_VECTORS[query], k, per_image, parity)
        assert named(found.hits) == wanted, (k, per_image, parity, query)


def test_search_matches_reference_where_few_photos_crowd_the_top(store: InstanceStore) -> None:
    """40 photos whose 30 instances all score higher than any of the next photo."""
    angles = np.linspace(0, 3, 40 * 30)
    vectors = np.stack([np.cos(angles), np.sin(angles), 0 * angles, 0 * angles], axis=1)
    images = images_from_vectors(vectors.astype(np.float32), [30] * 40)
    fill_gallery(store, images)
    gallery = Gallery("photos", store, LookupEncoder())
    found = gallery.search("number 0", k=40).hits
    assert [hit.instance_id for hit in found] == [f"img{number:03d}#0" for number in range(40)]


def test_equal_scores_beyond_what_is_read_at_first_are_still_in_order(
    store: InstanceStore,
) -> None:
    """Copies of one photo are common: here 200, and the first 88 rows cannot settle 7 hits."""
    fill_gallery(store, images_from_vectors(np.tile(TIED_VECTORS[:2], (200, 1)), [2] * 200))
    hits = Gallery("photos", store, LookupEncoder()).search("number 0", k=7).hits
    assert named(hits) == [(f"img{number:03d}#0", 1.0) for number in range(7)]


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 9), max_size=12),
    seed=st.integers(0, 2**16),
    k=st.integers(1, 12),
    per_image=st.integers(1, 4),
    tied=st.booleans(),
    most=st.integers(1, 400),
)
def test_any_gallery_matches_reference_whatever_one_read_gives(
    counts: list[int], seed: int, k: int, per_image: int, tied: bool, most: int
) -> None:
    """The store gives at most `most` rows at once, so the images are read by parts."""
    num = sum(counts)
    vectors = drawn(TIED_VECTORS, num, seed) if tied else scattered(num, seed)
    images = images_from_vectors(vectors, counts)
    store = MemoryStore()
    fill_gallery(store, images)
    queries = TIED_VECTORS if tied else scattered(3, seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "MAX_LIMIT", max(most, max(counts, default=1) + 1))
        hits = (
            Gallery("photos", store, LookupEncoder(queries))
            .search("number 1", k=k, per_image=per_image)
            .hits
        )
    wanted = reference(images, queries[1], k, per_image)
    assert [hit.score for hit in hits] == pytest.approx([score for _, score in wanted], abs=1e-6)
    if not tied or most > num:
        assert [hit.instance_id for hit in hits] == [each for each, _ in wanted]


def test_reading_by_parts_keeps_the_filter_and_odd_image_ids(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ['a"b', "a\\b", "z'", "ü", "m n"]
    images = [
        indexed_image(f"{name}{number}", part)
        for name in names
        for number, part in enumerate(np.split(scattered(8 * 5, len(name)), 8))
    ]
    store = MemoryStore()
    fill_gallery(store, images)
    monkeypatch.setattr(ranking, "MAX_LIMIT", 6)
    gallery = Gallery("photos", store, LookupEncoder())
    where = "attr.parity == 0 or attr.parity == 7".ljust(MAX_LENGTH)  # as long as allowed
    found = gallery.search("number 0", k=30, where=where).hits
    wanted = reference(images, TIED_VECTORS[0], 30, 1, parity=0)
    assert [hit.instance_id for hit in found] == [each for each, _ in wanted]
    assert len(found) == 20


def test_batch_equals_single_searches_and_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    store, encoder = CountingStore(), LookupEncoder()
    fill_gallery(store, images_from_vectors(drawn(TIED_VECTORS, 100, 1), [10] * 10))
    gallery = Gallery("photos", store, encoder)
    expressions = [f"Number {number}" for number in range(24)]
    batch = gallery.search_batch(expressions, k=4)
    assert encoder.calls == [[each.lower() for each in expressions]]
    assert store.searches[0] == (24, 64)
    singles = [gallery.search(each, k=4) for each in expressions]
    assert [each.hits for each in batch] == [each.hits for each in singles]
    assert [each.expression for each in batch] == expressions
    monkeypatch.setattr(ranking, "_ROWS_PER_CALL", 64 * 5)
    assert [each.hits for each in gallery.search_batch(expressions, k=4)] == [
        each.hits for each in batch
    ]
    assert (5, 64) in store.searches


def test_an_easy_query_reads_little_and_only_once() -> None:
    store = CountingStore()
    fill_gallery(store, images_from_vectors(scattered(3000, 2), [30] * 100))
    Gallery("photos", store, LookupEncoder()).search("number 0", k=10)
    assert store.searches == [(1, 112)]


def test_empty_batch_empty_gallery_and_gallery_of_failures() -> None:
    store = MemoryStore()
    failed = ImageRecord(image_id="x", uri="file:///x", status="failed", reason="empty")
    fill_gallery(store, [])
    gallery = Gallery("photos", store, LookupEncoder())
    assert gallery.search_batch([]) == []
    assert gallery.search("number 0").hits == ()
    store.upsert_images("photos", "v1", [IndexedImage(failed, None)])
    assert gallery.search("number 0").hits == ()


def test_result_carries_what_was_asked_and_the_stages() -> None:
    store = MemoryStore()
    fill_gallery(store, [indexed_image("a", TIED_VECTORS[:2])])
    found = Gallery("photos", store, LookupEncoder()).search("  NUMBER\t0 ", k=1)
    assert (found.expression, found.gallery, found.version) == ("  NUMBER\t0 ", "photos", "v1")
    assert list(found.timings_ms) == ["text", "search", "rank"]
    assert all(value >= 0 for value in found.timings_ms.values())
    (hit,) = found.hits
    assert hit.uri == "file:///photos/a.jpg"
    assert hit.box == (0.0, 0.0, 0.5, 1.0)
    assert (hit.score, hit.objectness, hit.attributes) == (1.0, 1.0, {"parity": 1})


def test_hits_carry_their_masks_where_the_version_keeps_them(store: InstanceStore) -> None:
    vectors = np.eye(DIM, dtype=np.float32)
    plain = indexed_image("img000", vectors)
    assert plain.instances is not None
    masks = tuple(MaskRle((2, 3), f"{n}{6 - n}") for n in range(1, 5))
    image = replace(plain, instances=replace(plain.instances, masks=masks))
    fill_gallery(
        store, [image], spec=VersionSpec(dim=DIM, digest="table", settings={"masks": True})
    )
    gallery = Gallery("photos", store, LookupEncoder())
    for number in (0, 3):
        result = gallery.search(f"number {number}", per_image=4)
        assert len(result.hits) == 4
        for hit in result.hits:
            assert hit.mask == masks[int(hit.instance_id.rpartition("#")[2])]
        assert result.to_dict()["hits"][0]["mask"] == {
            "size": (2, 3),
            "counts": masks[number].counts,
        }
    fill_gallery(store, [image], version="v2")
    assert {hit.mask for hit in gallery.search("number 0", per_image=4).hits} == {None}


def test_a_promotion_counts_from_the_next_search_on(store: InstanceStore) -> None:
    fill_gallery(store, [indexed_image("old", TIED_VECTORS[:1])])
    gallery = Gallery("photos", store, LookupEncoder())
    assert gallery.search("number 0").hits[0].image_id == "old"
    fill_gallery(store, [indexed_image("new", TIED_VECTORS[:1])], version="v2")
    assert gallery.version == "v1"
    found = gallery.search("number 0")
    assert (found.version, found.hits[0].image_id, gallery.version) == ("v2", "new", "v2")
    store.promote("photos", "v1")
    store.drop_version("photos", "v2")
    assert gallery.refresh() == "v1"


def test_a_promotion_to_another_checkpoint_is_refused_and_mended_by_promoting_back() -> None:
    store = MemoryStore()
    fill_gallery(store, [indexed_image("old", TIED_VECTORS[:1])])
    gallery = Gallery("photos", store, LookupEncoder())
    fill_gallery(store, [], version="v2", spec=VersionSpec(dim=DIM, digest="another"))
    with pytest.raises(SchemaMismatch, match=r"'v2' .* another .* table .*reir index SOURCE"):
        gallery.search("number 0")
    store.promote("photos", "v1")
    assert gallery.search("number 0").version == "v1"


def test_a_gallery_loads_the_model_of_a_version_that_becomes_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reir.encoders.KINDS", FAKE_KINDS)
    store = MemoryStore()
    (photo,) = [draw_photo(tmp_path, "green")]
    index_photos(store, "g", [photo], "v1", FakeEncoder())
    index_photos(store, "g", [photo], "v2", BetterEncoder(), spec="better:x")
    index_photos(store, "g", [photo], "v3", WorseEncoder(), spec="worse:x")
    store.promote("g", "v1")
    with open_gallery("g", store=store) as gallery:
        assert gallery.search("the green one").version == "v1"
        store.promote("g", "v2")
        assert gallery.search("the green one").digest == BetterEncoder().digest
        store.promote("g", "v1")
        assert gallery.similar(photo).digest == FakeEncoder().digest
        store.promote("g", "v3")
        assert gallery.refresh() == "v3"
        # This model understands expressions in another way.
        right, wrong = gallery.encode_expressions(["the green one"]), FakeEncoder()
        assert not np.allclose(right, wrong.encode_expressions(["the green one"]))
    with open_gallery("g", store=store, encoder="worse:x") as gallery:
        store.promote("g", "v1")
        with pytest.raises(SchemaMismatch):  # this model was asked for
            gallery.search("the green one")


@pytest.mark.parametrize(
    "spec",
    [VersionSpec(dim=DIM, digest="f00"), VersionSpec(dim=DIM + 1, digest="table")],
    ids=["digest", "dim"],
)
def test_open_refuses_a_version_of_another_checkpoint(spec: VersionSpec) -> None:
    store = MemoryStore()
    fill_gallery(store, [], spec=spec)
    with pytest.raises(SchemaMismatch) as caught:
        open_gallery("photos", store=store, encoder=LookupEncoder())
    message = str(caught.value)
    assert f"{spec.digest} (dimension {spec.dim})" in message
    assert f"table (dimension {DIM})" in message
    assert "`reir index SOURCE --gallery photos`" in message


def test_open_names_the_galleries_that_exist() -> None:
    store = MemoryStore()
    with pytest.raises(GalleryNotFound, match=r"this store has none; `reir index SOURCE"):
        open_gallery("photo", store=store, encoder=LookupEncoder())
    fill_gallery(store, [])
    store.create_version("wide", "v1", VersionSpec(dim=DIM, digest="table"))
    with pytest.raises(
        GalleryNotFound, match=r"this store has photos, wide; did you mean 'photos'."
    ):
        open_gallery("photo", store=store, encoder=LookupEncoder())
    with pytest.raises(GalleryNotFound, match="no live version"):
        open_gallery("wide", store=store, encoder=LookupEncoder())


def test_a_gallery_that_goes_away_is_said_to_be_gone() -> None:
    store = MemoryStore()
    fill_gallery(store, [])
    gallery = Gallery("photos", store, LookupEncoder())
    gallery._retriever._store = MemoryStore()  # the same address, another content
    with pytest.raises(GalleryNotFound, match="photos"):
        gallery.search("number 0")


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("k", {"k": 0}),
        ("k", {"k": 1001}),
        ("k", {"k": 2.5}),
        ("k", {"k": True}),
        ("per_image", {"per_image": 0}),
        ("per_image", {"per_image": -3}),
        ("expression", {"expression": " \u200b "}),
        ("expression", {"expression": "word " * 200}),
        ("expression", {"expression": 7}),
        ("filter", {"where": "areaa > 1"}),
        ("filter", {"where": ""}),
    ],
)
def test_refusals_name_the_field(field: str, arguments: dict[str, object]) -> None:
    store = MemoryStore()
    fill_gallery(store, [indexed_image("a", TIED_VECTORS[:2])])
    gallery = Gallery("photos", store, LookupEncoder())
    asked: dict[str, object] = {"expression": "number 0"} | arguments
    with pytest.raises(QueryError) as caught:
        gallery.search(**asked)  # type: ignore[arg-type]
    assert caught.value.field == field
    assert isinstance(caught.value, FilterError) == (field == "filter")


def test_a_batch_has_a_limit_and_is_no_text() -> None:
    store = MemoryStore()
    fill_gallery(store, [])
    with pytest.raises(QueryError, match="must be a list, got the text 'red'"):
        Gallery("photos", store, LookupEncoder()).search_batch("red")
    with pytest.raises(QueryError, match="holds 1001, at most 1000"):
        Gallery("photos", store, LookupEncoder()).search_batch(["number 0"] * 1001)


def test_open_by_location_finds_the_described_instance_and_closes(tmp_path: Path) -> None:
    encoder = FakeEncoder()
    scenes = {
        "a": draw_scene((200, 100), [("red", (10, 10, 40, 90)), ("blue", (150, 20, 190, 60))]),
        "b": draw_scene((200, 100), [("red", (150, 10, 190, 60))]),
        "c": draw_scene((200, 100), [("green", (60, 10, 90, 60))]),
    }
    encoded = encoder.encode_images(list(scenes.values()))
    images = [
        indexed_scene(name, instances) for name, instances in zip(scenes, encoded, strict=True)
    ]
    with_store = open_store(str(tmp_path))
    fill_gallery(with_store, images, spec=VersionSpec(dim=encoder.dim, digest=encoder.digest))
    with_store.close()
    with reir.open("photos", store=str(tmp_path), encoder=encoder) as gallery:
        left = gallery.search("the red one on the left", k=2).hits
        right = gallery.search("the red one on the right", k=2).hits
        small = gallery.search("a blue thing", where="area < 0.2").hits
    assert [hit.image_id for hit in left] == ["a", "b"]
    assert [hit.image_id for hit in right] == ["b", "a"]
    assert left[0].box == pytest.approx((0.05, 0.1, 0.2, 0.9))
    assert small[0].box == pytest.approx((0.75, 0.2, 0.95, 0.6))


def indexed_scene(name: str, instances: Instances) -> IndexedImage:
    record = ImageRecord(
        image_id=name, uri=f"file:///{name}", status="indexed", num_instances=len(instances)
    )
    return IndexedImage(record, instances)


def test_closing_a_gallery_leaves_the_callers_store_open(store: InstanceStore) -> None:
    fill_gallery(store, [indexed_image("a", TIED_VECTORS[:2])])
    with open_gallery("photos", store=store, encoder=LookupEncoder()) as gallery:
        assert gallery.version == "v1"
    assert store.galleries() == ["photos"]


def test_import_reir_is_light() -> None:
    heavy = "{'numpy', 'torch', 'pymilvus', 'faiss', 'transformers', 'PIL'}"
    code = f"import sys, reir; assert callable(reir.open); print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"

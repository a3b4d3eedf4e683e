"""Every photo that has the instance: the same decisions as one by one, in bounded parts."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reir.errors import CheckpointError, GalleryNotFound, QueryError, SchemaMismatch
from reir.query import every_photo
from reir.query.photo_curve import DEFAULT_MIN_PRESENCE, PhotoCurve
from reir.query.presence import (
    PHOTO_FEATURES,
    Calibration,
    Logistic,
)
from reir.query.search import CheckpointExtras, Gallery
from reir.records import FloatArray
from reir.store import VersionSpec, open_store
from reir.store.contract import InstanceRow
from reir.store.filters import MAX_DEPTH, MAX_LENGTH
from reir.store.memory import MemoryStore
from reir_testing.evaluation.calibrations import score_calibration
from reir_testing.lookup_gallery import DIM, LookupEncoder, fill_gallery, images_from_vectors

CURVE = PhotoCurve(
    thresholds=(0.2, 0.5, 0.8), recalls=(1.0, 0.8, 0.4), false_alarms=(0.5, 0.01, 1e-4)
)
CALIBRATION = score_calibration(
    *("table", 10, -5),
    photo=Logistic(features=PHOTO_FEATURES, weights=(10, -1, 5, 0, 0, 0), bias=-5),
    threshold=0.9,
    photo_threshold=0.6,
    photo_curve=CURVE,
)


class CountingStore(MemoryStore):
    """Counts the searches, and remembers the largest number of rows that one returned."""

    num_searches = most_rows = 0

    def search(self, *arguments: object, **options: object) -> list[list[InstanceRow]]:
        found = super().search(*arguments, **options)  # type: ignore[arg-type]
        self.num_searches += 1
        self.most_rows = max(self.most_rows, *map(len, found))
        return found


def scattered(num: int, seed: int) -> FloatArray:
    """Vectors of few directions, so that many photos have equal scores."""
    vectors = np.random.default_rng(seed).integers(-2, 3, size=(num, DIM)) + np.eye(DIM)[0] / 2
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


def gallery_of(
    vectors: FloatArray, counts: list[int], calibration: Calibration | None = CALIBRATION
) -> Gallery:
    store = CountingStore()
    fill_gallery(store, images_from_vectors(vectors, counts))
    return Gallery("photos", store, LookupEncoder(), CheckpointExtras(calibration=calibration))


def slow_reference(
    vectors: FloatArray, counts: list[int], threshold: float, keep: slice = slice(None)
) -> dict[str, float]:
    """Presence of every photo in which expression "number 0" is, photo by photo."""
    found = {}
    for number, part in enumerate(np.split(vectors, np.cumsum(counts))[:-1]):
        presence = CALIBRATION.of_photo(float(part[:, 0].max()), 0.0, 2)
        if presence >= threshold and number in range(*keep.indices(len(counts))):
            found[f"img{number:03d}"] = presence
    return found


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=40),
    threshold=st.floats(0, 1),
)
def test_decisions_are_those_of_a_slow_reference(
    seed: int, counts: list[int], threshold: float
) -> None:
    vectors = scattered(sum(counts), seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(every_photo, "FIRST_PHOTOS", 2)
        patch.setattr(every_photo, "PART_PHOTOS", 5)
        gallery = gallery_of(vectors, counts)
        found = list(gallery.every_photo("number 0", min_presence=threshold))
    assert max(Counter(each.image_id for each in found).values(), default=1) == 1
    assert {each.image_id: each.presence for each in found} == pytest.approx(
        slow_reference(vectors, counts, threshold), abs=1e-6
    )


def test_an_embedded_store_gives_the_same_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(every_photo, "FIRST_PHOTOS", 3)
    monkeypatch.setattr(every_photo, "PART_PHOTOS", 10)
    vectors, counts = scattered(90, 2), [1, 2, 3] * 15
    extras = CheckpointExtras(calibration=CALIBRATION)
    with closing(open_store(str(tmp_path))) as store:
        fill_gallery(store, images_from_vectors(vectors, counts))
        embedded = Gallery("photos", store, LookupEncoder(), extras)
        for options in ({"min_presence": 0.0}, {"min_presence": 0.9}, {"where": "cx < 0.5"}):
            found = list(embedded.every_photo("number 0", **options))
            wanted = gallery_of(vectors, counts).every_photo("number 0", **options)
            assert [each.instance_id for each in found] == [each.instance_id for each in wanted]


def test_few_photos_come_best_first_and_many_by_image_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(every_photo, "FIRST_PHOTOS", 3)
    monkeypatch.setattr(every_photo, "PART_PHOTOS", 10)
    gallery = gallery_of(scattered(40, 0), [1] * 40)
    few = [each.presence for each in gallery.every_photo("number 0", min_presence=0.999)]
    assert 3 < len(few) < 10
    assert few == sorted(few, reverse=True)
    many = [each.image_id for each in gallery.every_photo("number 0", min_presence=0)]
    assert many == [f"img{number:03d}" for number in range(40)]


@pytest.mark.parametrize(
    "where",
    [
        "area >= 0".ljust(MAX_LENGTH),
        "(" * (MAX_DEPTH - 1) + "area >= 0" + ")" * (MAX_DEPTH - 1),
        "not " * (MAX_DEPTH - 1) + "area < 0",
    ],
    ids=["long", "parentheses", "not"],
)
def test_the_largest_filters_apply_to_every_part(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(every_photo, "FIRST_PHOTOS", 3)
    monkeypatch.setattr(every_photo, "PART_PHOTOS", 10)
    gallery = gallery_of(scattered(40, 0), [1] * 40)
    assert len(list(gallery.every_photo("number 0", min_presence=0, where=where))) == 40


def test_parts_are_read_while_the_answer_is_iterated_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(every_photo, "FIRST_PHOTOS", 3)
    monkeypatch.setattr(every_photo, "PART_PHOTOS", 10)
    gallery = gallery_of(scattered(300, 0), [1] * 300)
    store = gallery._store
    assert isinstance(store, CountingStore)
    found = gallery.every_photo("number 0", min_presence=0)
    next(found)
    begun = store.num_searches
    assert len(list(found)) == 299
    assert store.num_searches > begun + 20
    assert store.most_rows < 300


def test_a_version_that_is_removed_meanwhile_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(every_photo, "FIRST_PHOTOS", 3)
    gallery = gallery_of(scattered(40, 0), [1] * 40)
    found = gallery.every_photo("number 0", min_presence=0)
    spec = gallery._store.versions("photos")[0].spec
    gallery._store.create_version("photos", "v2", spec)
    gallery._store.promote("photos", "v2")
    gallery._store.drop_version("photos", "v1")
    with pytest.raises(GalleryNotFound, match=r"'v1' was removed.*search again"):
        list(found)


def test_a_promotion_to_another_checkpoint_does_not_end_a_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(every_photo, "FIRST_PHOTOS", 1)
    monkeypatch.setattr(every_photo, "PART_PHOTOS", 2)
    gallery = gallery_of(scattered(10, 3), [1] * 10)
    found = gallery.every_photo("number 0", min_presence=0.0)
    first = next(found)
    fill_gallery(gallery._store, [], version="v2", spec=VersionSpec(dim=DIM, digest="another"))
    assert len({first.image_id, *(photo.image_id for photo in found)}) == 10
    with pytest.raises(SchemaMismatch):  # names no version
        gallery.every_photo("number 0", min_presence=0.0)


def test_the_filter_holds_in_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(every_photo, "FIRST_PHOTOS", 2)
    monkeypatch.setattr(every_photo, "PART_PHOTOS", 5)
    vectors = scattered(60, 1)
    gallery = gallery_of(vectors, [1] * 60)
    found = gallery.every_photo("number 0", where="attr.parity == 1 or area < 0", min_presence=0.3)
    # the last character of an odd number is odd, and so is its code
    wanted = slow_reference(vectors, [1] * 60, 0.3, slice(1, None, 2))
    assert [each.image_id for each in found] == list(wanted)
    assert len(wanted) > 10


def test_thresholds() -> None:
    gallery = gallery_of(scattered(40, 0), [1] * 40)
    assert gallery.every_photo("number 0").decision == CURVE.at(DEFAULT_MIN_PRESENCE, 40)
    assert gallery.every_photo("number 0", recall=0.7).decision == CURVE.at(0.5, 40)
    assert gallery.every_photo("number 0", precision=0.9).decision == CURVE.at(0.8, 40)
    assert gallery.every_photo("number 0", min_presence=0.3).decision == CURVE.at(0.3, 40)


def test_the_lines_of_an_answer() -> None:
    gallery = gallery_of(np.eye(DIM, dtype=np.float32), [1] * DIM)
    lines = json.loads(json.dumps(list(gallery.every_photo("number 0").lines())))
    assert [list(line) for line in lines] == [["search"], ["photo"], ["end"]]
    assert lines[0]["search"] | {"recall": 0, "precision": 0} == {
        "expression": "number 0",
        "gallery": "photos",
        "version": "v1",
        "num_photos": DIM,
        "min_presence": DEFAULT_MIN_PRESENCE,
        "recall": 0,
        "precision": 0,
    }
    photo = lines[1]["photo"]
    assert (photo["image_id"], photo["instance_id"], photo["score"]) == ("img000", "img000#0", 1.0)
    assert (photo["box"], photo["attributes"]) == ([0, 0, 1, 1], {"parity": 0})
    assert lines[2] == {"end": {"found": 1, "contradicted": 0}}


@pytest.mark.parametrize(
    ("options", "field", "reason"),
    [
        ({"precision": 0.9, "recall": 0.9}, "recall", "together with precision"),
        ({"min_presence": 1.5}, "min_presence", "from 0 to 1, got 1.5"),
        ({"recall": True}, "recall", "got True"),
        ({"precision": 0.999}, "precision", "gallery of 40 photos"),
        ({"where": "colour == 1"}, "filter", "colour"),
    ],
    ids=["two", "range", "type", "reachable", "filter"],
)
def test_wrong_arguments_are_refused(options: dict[str, object], field: str, reason: str) -> None:
    gallery = gallery_of(scattered(40, 0), [1] * 40)
    with pytest.raises(QueryError, match=reason) as caught:
        gallery.every_photo("number 0", **options)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_no_calibration_no_decision() -> None:
    with pytest.raises(QueryError, match="reir calibrate"):
        gallery_of(scattered(4, 0), [1] * 4, None).every_photo("number 0")
    photo = replace(CALIBRATION.photo, weights=(1, 0, -2, 0, 0, 0))
    falling = replace(CALIBRATION, photo=photo)
    with pytest.raises(CheckpointError, match="fit it anew"):
        gallery_of(scattered(4, 0), [1] * 4, falling).every_photo("number 0")


def test_an_empty_answer() -> None:
    found = gallery_of(-np.eye(DIM, dtype=np.float32), [1] * DIM).every_photo("number 0")
    assert list(found) == []

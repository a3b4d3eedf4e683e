"""Validated containers: what they accept, what they refuse and how they say it."""

from __future__ import annotations

import json
import pickle
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

from reir.records import ImageRecord, IndexedImage, Instances, MaskRle
from reir.results import Hit, SearchResult


def make_instances(num: int = 3, dim: int = 4) -> Instances:
    rng = np.random.default_rng(0)
    corners = np.sort(rng.random((num, 2, 2)), axis=1)
    return Instances(
        boxes=corners.reshape(num, 4).astype(np.float32),
        objectness=np.linspace(1, 0.5, num, dtype=np.float32),
        vectors=rng.standard_normal((num, dim)).astype(np.float32),
        image_vector=rng.standard_normal(dim).astype(np.float32),
    )


def make_record(status: str = "indexed", num_instances: int = 3, reason: str = "") -> ImageRecord:
    return ImageRecord(
        image_id="a",
        uri="file:///a.jpg",
        status=status,  # type: ignore[arg-type]
        num_instances=num_instances,
        reason=reason,
    )


def make_hit() -> Hit:
    return Hit(
        instance_id="a#0",
        image_id="a",
        uri="file:///a.jpg",
        box=(0.1, 0.2, 0.5, 0.7),
        score=0.5,
        objectness=0.9,
        attributes={"camera": "x"},
    )


def test_instances_know_their_number_dimension_and_areas() -> None:
    instances = make_instances(3, 4)
    assert len(instances) == 3
    assert instances.dim == 4
    slow = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in instances.boxes.tolist()]
    assert instances.areas.tolist() == pytest.approx(slow)


def test_an_image_without_instances_is_valid() -> None:
    f32 = np.float32
    empty = Instances(
        np.zeros((0, 4), f32), np.zeros(0, f32), np.zeros((0, 8), f32), np.ones(8, f32)
    )
    assert len(empty) == 0
    assert empty.dim == 8
    assert empty.areas.shape == (0,)


def test_lists_and_doubles_become_contiguous_float32() -> None:
    instances = Instances([[0, 0, 1, 1]], [1], np.asfortranarray(np.ones((1, 2))), [1, 0])  # type: ignore[arg-type]
    for array in (
        instances.boxes,
        instances.objectness,
        instances.vectors,
        instances.image_vector,
    ):
        assert array.dtype == np.float32
        assert array.flags.c_contiguous


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": np.zeros((3, 5))}, r"boxes must have shape \(\*, 4\), got \(3, 5\)"),
        ({"boxes": np.full((3, 4), 1.5)}, r"boxes must lie in \[0, 1\].*got \[1.5, 1.5\]"),
        ({"boxes": np.full((3, 4), -0.5)}, r"boxes must lie in \[0, 1\]"),
        ({"boxes": np.tile([0.5, 0.5, 0.4, 0.6], (3, 1))}, "x2 >= x1"),
        ({"boxes": np.full((3, 4), np.nan)}, "boxes must be finite, got 12 values that are NaN"),
        ({"objectness": np.zeros(2)}, r"objectness must have shape \(3\), got \(2,\)"),
        ({"vectors": np.zeros((2, 4))}, r"vectors must have shape \(3, \*\), got \(2, 4\)"),
        ({"vectors": np.full((3, 4), np.inf)}, "vectors must be finite"),
        ({"image_vector": np.zeros(5)}, r"image_vector must have shape \(4\), got \(5,\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_instances_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(make_instances(), **change)  # type: ignore[arg-type]


def test_ledger_rows_explain_failures() -> None:
    assert make_record("failed", 0, "truncated").reason == "truncated"
    with pytest.raises(ValueError, match="a failed image needs a reason"):
        make_record("failed", 0, "")
    with pytest.raises(ValueError, match="an indexed image must not have one"):
        make_record("indexed", 3, "truncated")
    with pytest.raises(ValueError, match="got 'pending'"):
        make_record("pending")


def test_ledger_row_and_instances_must_agree() -> None:
    assert IndexedImage(make_record(), make_instances()).instances is not None
    assert IndexedImage(make_record("failed", 0, "empty"), None).instances is None
    with pytest.raises(ValueError, match="says 2 instances, got 3"):
        IndexedImage(make_record(num_instances=2), make_instances())
    with pytest.raises(ValueError, match="is indexed but instances are absent"):
        IndexedImage(make_record(num_instances=0), None)
    with pytest.raises(ValueError, match="is failed but instances are present"):
        IndexedImage(make_record("failed", 0, "empty"), make_instances(0))


def test_masks_are_checked() -> None:
    mask = MaskRle((2, 3), "06")
    plain = make_instances(3)
    masked = replace(plain, masks=(mask, mask, mask))
    assert masked.masks is not None
    assert len(masked.masks) == 3
    with pytest.raises(ValueError, match="there must be 3 masks, one for each box, got 1"):
        replace(plain, masks=(mask,))
    for size, counts in (((0, 3), "06"), ((2, 3), ""), ((2, 3), "\u00e4")):
        with pytest.raises(ValueError, match="needs a size of at least"):
            MaskRle(size, counts)


def test_hit_area() -> None:
    assert make_hit().area == pytest.approx(0.4 * 0.5)


def test_results_become_plain_json() -> None:
    result = SearchResult(
        expression="the cat",
        gallery="pets",
        version="v1",
        hits=(make_hit(),),
        timings_ms={"text": 1.5},
        degraded=("rank",),
    )
    read_back = json.loads(json.dumps(result.to_dict()))
    assert read_back["hits"][0]["box"] == [0.1, 0.2, 0.5, 0.7]
    assert read_back["hits"][0]["mask"] is None
    assert read_back["hits"][0]["attributes"] == {"camera": "x"}
    assert read_back["timings_ms"] == {"text": 1.5}
    assert read_back["degraded"] == ["rank"]


def test_a_mask_becomes_what_pycocotools_takes() -> None:
    hit = replace(make_hit(), mask=MaskRle((2, 3), "06"))
    result = SearchResult(expression="x", gallery="g", version="v", hits=(hit,), timings_ms={})
    read_back = json.loads(json.dumps(result.to_dict()))
    assert read_back["hits"][0]["mask"] == {"size": [2, 3], "counts": "06"}


def test_records_are_frozen_and_survive_pickling() -> None:
    hit = make_hit()
    with pytest.raises(FrozenInstanceError):
        hit.score = 1.0  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(hit)) == hit
    assert pickle.loads(pickle.dumps(make_record())) == make_record()
    instances = make_instances()
    copy = pickle.loads(pickle.dumps(instances))
    np.testing.assert_array_equal(copy.vectors, instances.vectors)

"""Masks as runs: against pycocotools' own reading, annotations of every form, and broken ones."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pycocotools.mask as coco
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reir.images.rle import BoolMask, area_px, decode, encode, fitted, from_annotation, resize_mask
from reir.records import MAX_RLE_BYTES


def noise(height: int, width: int, share: float = 0.5, seed: int = 0) -> BoolMask:
    return np.asarray(np.random.default_rng(seed).random((height, width)) < share)


@given(st.integers(1, 60), st.integers(1, 60), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_masks_come_back_from_every_form(h: int, w: int, share: float, seed: int) -> None:
    mask = noise(h, w, share, seed)
    rle = encode(mask)
    assert rle.size == (h, w)
    np.testing.assert_array_equal(decode(rle), mask)
    np.testing.assert_array_equal(coco.decode(asdict(rle)), mask)
    assert area_px(rle) == mask.sum()
    edges = np.flatnonzero(np.diff(mask.T.ravel(), prepend=False)).tolist()
    runs = np.diff([0, *edges, h * w]).tolist()
    for counts in (rle.counts, runs):
        assert from_annotation({"size": [h, w], "counts": counts}, h, w) == rle


def test_a_polygon_covers_its_inside() -> None:
    square = from_annotation([[2, 1, 8, 1, 8, 5, 2, 5]], 10, 12)
    want = np.zeros((10, 12), dtype=bool)
    want[1:5, 2:8] = True
    np.testing.assert_array_equal(decode(square), want)
    two = from_annotation([[0, 0, 3, 0, 3, 3, 0, 3], [6, 6, 9, 6, 9, 9, 6, 9]], 10, 12)
    assert area_px(two) == 18


@pytest.mark.parametrize(
    ("segmentation", "said"),
    [
        ("runs", "neither a list of polygons nor an object"),
        ([], "no polygon"),
        ([[1, 2, 3, 4]], "three points or more"),
        ([[1, 2, 3, 4, 5, 6, 7]], "three points or more"),
        ([[1, 2, 3, 4, 5, "6"]], "something else than numbers"),
        ([[1, 2, 3, 4, 5, float("nan")]], "something else than numbers"),
        ({"size": [4, 5], "counts": [16]}, r"its size must be \[4, 4\]"),
        ({"size": [4, 4], "counts": [3, 4]}, "cover 7 of 16 pixels"),
        ({"size": [4, 4], "counts": [-3, 19]}, "whole numbers of at least 0"),
        ({"size": [4, 4], "counts": [3.5, 12.5]}, "whole numbers of at least 0"),
        ({"size": [4, 4], "counts": ""}, "cover 0 of 16 pixels"),
        ({"size": [4, 4], "counts": "10"}, "cover 1 of 16 pixels"),
        ({"size": [4, 4], "counts": "zz"}, "'z', which is no run"),
        ({"size": [4, 4], "counts": "P"}, "end within a run"),
        ({"size": [4, 4]}, "neither a text"),
    ],
)
def test_what_is_no_segmentation_is_refused(segmentation: object, said: str) -> None:
    """Some of these would have pycocotools read or write beyond its memory."""
    with pytest.raises(ValueError, match=said):
        from_annotation(segmentation, 4, 4)


def test_a_ragged_mask_is_kept_at_a_lower_resolution() -> None:
    rle = encode(noise(400, 600))
    assert len(rle.counts) <= MAX_RLE_BYTES
    assert rle.size in {(200, 300), (100, 150), (50, 75)}


def test_a_reduced_mask_gets_the_asked_size_however_long_its_runs_become() -> None:
    reduced = encode(noise(400, 600))
    whole = fitted(reduced, (400, 600))
    assert whole.size == (400, 600)
    assert len(whole.counts) > MAX_RLE_BYTES
    np.testing.assert_array_equal(decode(whole), resize_mask(decode(reduced), (400, 600)))
    assert fitted(whole, (400, 600)) is whole


def test_polygons_and_runs_that_would_take_gigabytes_or_minutes_are_refused() -> None:
    back_and_forth = [-9e5, 0, 9e5, 1] * 10_000
    with pytest.raises(ValueError, match="has 36000000000 pixels, at most 1000000 are allowed"):
        from_annotation([back_and_forth], 24, 32)
    with pytest.raises(ValueError, match="a run that no photo is large enough for"):
        from_annotation({"size": [24, 32], "counts": "o" * 1_000_000}, 24, 32)

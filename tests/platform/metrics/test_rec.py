"""`reir.metrics.rec` against plain Python."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reir.metrics.rec import EPSILON, IOU_THRESHOLDS, rec_hits

BOX = [10.0, 10.0, 30.0, 30.0]


def slow_hit(a: np.ndarray, b: np.ndarray, threshold: float) -> bool:
    if np.isnan(a).any():
        return False
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return bool((width * height + EPSILON) / (union + EPSILON) > threshold)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 20))
def test_rec_hits_matches_reference(seed: int, num: int) -> None:
    rng = np.random.default_rng(seed)
    corner = rng.integers(0, 3, size=(2, num, 2)).astype(float)
    top, target = np.concatenate([corner, corner + rng.integers(4, 7, (2, num, 2))], axis=-1)
    top[rng.random(num) < 0.2] = np.nan
    result = rec_hits(top, target)
    assert len(result) == num
    for row, hits in enumerate(result.hits.tolist()):
        assert hits == [slow_hit(top[row], target[row], t) for t in IOU_THRESHOLDS]


def test_iou_is_that_of_the_top_box_and_0_without_one() -> None:
    half = [10.0, 10.0, 20.0, 30.0]
    result = rec_hits([BOX, half, [np.nan] * 4], [BOX, BOX, BOX])
    np.testing.assert_allclose(result.iou, [1, 0.5, 0], atol=1e-6)


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"\(1, 4\), target boxes \(2, 4\)"):
        rec_hits([BOX], [BOX, BOX])
    with pytest.raises(ValueError, match="finite"):
        rec_hits([BOX], [[np.nan] * 4])

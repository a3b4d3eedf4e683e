"""What the curve promises: the threshold for a precision or a recall, in galleries of any size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reir.errors import QueryError
from reir.query.photo_curve import PhotoCurve

CURVE = PhotoCurve(
    thresholds=(0.2, 0.5, 0.8), recalls=(1.0, 0.8, 0.4), false_alarms=(0.5, 0.1, 0.001)
)


def test_precision_counts_the_false_alarms_of_the_whole_gallery() -> None:
    found = CURVE.at(0.5, 101)
    assert (found.min_presence, found.recall) == (0.5, 0.8)
    assert found.precision == pytest.approx(0.8 / (0.8 + 0.1 * 100))
    assert CURVE.at(0.5, 1).precision == 1.0
    assert CURVE.at(0.35, 101).recall == pytest.approx(0.9)


def test_the_ends_of_the_curve() -> None:
    assert (CURVE.at(0.0, 101).recall, CURVE.at(1.0, 101).recall) == (1.0, 0.0)
    assert CURVE.at(0.0, 101).precision == pytest.approx(1 / 101)
    assert CURVE.at(1.0, 101).precision == 0.0


def test_the_threshold_of_a_precision_grows_with_the_gallery() -> None:
    assert CURVE.for_precision(0.75, 2).min_presence == 0.5
    assert CURVE.for_precision(0.75, 100).min_presence == 0.8
    with pytest.raises(QueryError, match=r"gallery of 10,000 photos.*0\.038.*min_presence 0\.8"):
        CURVE.for_precision(0.75, 10_000)


def test_the_threshold_of_a_recall_is_the_highest_that_reaches_it() -> None:
    assert [CURVE.for_recall(each, 9).min_presence for each in (0.3, 0.4, 0.5, 1.0)] == [
        0.8,
        0.8,
        0.5,
        0.2,
    ]
    lossy = PhotoCurve(thresholds=(0.5,), recalls=(0.9,), false_alarms=(0.1,))
    assert lossy.for_recall(0.95, 9).min_presence == 0.0


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 10**7))
def test_a_higher_threshold_never_finds_more(one: float, other: float, num_photos: int) -> None:
    low, high = sorted((one, other))
    assert CURVE.at(low, num_photos).recall >= CURVE.at(high, num_photos).recall
    fewer, more = (CURVE.at(high, n).precision for n in (num_photos, num_photos + 1))
    assert fewer is not None
    assert more is not None
    assert fewer >= more


@pytest.mark.parametrize(
    "columns",
    [
        ((), (), ()),
        ((0.5,), (0.9, 0.8), (0.1,)),
        ((0.5, 0.5), (0.9, 0.8), (0.1, 0.1)),
        ((0.5,), (1.1,), (0.1,)),
        ((np.nan,), (0.9,), (0.1,)),
    ],
    ids=["empty", "lengths", "order", "range", "nan"],
)
def test_other_numbers_are_refused(columns: tuple[tuple[float, ...], ...]) -> None:
    with pytest.raises(ValueError, match=r"at least 1|must ascend"):
        PhotoCurve(thresholds=columns[0], recalls=columns[1], false_alarms=columns[2])

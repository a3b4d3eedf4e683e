"""Telling two kinds apart, against the definitions written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from reir.metrics.calibration import (
    auroc,
    expected_calibration_error,
    fpr_at_tpr,
    threshold_at_tpr,
)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40))
def test_auroc_is_the_share_of_pairs_in_the_right_order(rows: list[tuple[int, bool]]) -> None:
    true = [score for score, label in rows if label]
    false = [score for score, label in rows if not label]
    if not true or not false:
        with pytest.raises(ValueError, match="both true and false answers"):
            auroc(*zip(*rows, strict=True))
        return
    wins = [(a > b) + (a == b) / 2 for a in true for b in false]
    assert auroc(*zip(*rows, strict=True)) == pytest.approx(np.mean(wins))


def test_fpr_at_tpr() -> None:
    scores = [0.9, 0.8, 0.7, 0.6, 0.5, 0.75, 0.4, 0.3, 0.2, 0.1]
    labels = [True] * 5 + [False] * 5
    assert threshold_at_tpr(scores, labels, 0.8) == 0.6
    assert fpr_at_tpr(scores, labels, 0.8) == 0.2
    assert threshold_at_tpr(scores, labels, 1.0) == 0.5
    assert threshold_at_tpr(scores, labels, 0.81) == 0.5


def test_ece_is_zero_where_probabilities_come_true_and_their_error_where_not() -> None:
    labels = np.arange(100) < 30
    assert expected_calibration_error(np.full(100, 0.3), labels) == pytest.approx(0)
    assert expected_calibration_error(np.full(100, 0.9), labels) == pytest.approx(0.6)
    assert expected_calibration_error([1.0, 0.0], [True, False]) == pytest.approx(0)


def test_errors_of_bins_do_not_cancel() -> None:
    """One bin is 0.2 too low and the other 0.2 too high; only their mean is right."""
    probabilities = [0.2] * 10 + [0.8] * 10
    labels = [True] * 4 + [False] * 6 + [True] * 6 + [False] * 4
    assert expected_calibration_error(probabilities, labels) == pytest.approx(0.2)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=2, max_size=40))
def test_ece_equals_the_loop_over_bins(rows: list[tuple[float, bool]]) -> None:
    assume(len({label for _, label in rows}) == 2)
    wanted = 0.0
    for number in range(15):
        last = number == 14
        inside = [
            (probability, label)
            for probability, label in rows
            if number <= probability * 15 < number + 1 or (last and probability == 1)
        ]
        if inside:
            confidence = sum(probability for probability, _ in inside) / len(inside)
            accuracy = sum(label for _, label in inside) / len(inside)
            wanted += len(inside) / len(rows) * abs(confidence - accuracy)
    probabilities, labels = zip(*rows, strict=True)
    assert expected_calibration_error(probabilities, labels) == pytest.approx(wanted)


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match=r"must be \(R,\), got \(2,\) and \(3,\)"):
        auroc([1, 2], [True, False, True])

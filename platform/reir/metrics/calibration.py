"""How well scores separate true from false answers, and how well probabilities are calibrated."""

# Shapes: R answers

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.floating]
Labels = npt.NDArray[np.bool_]


def auroc(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Return the area under the ROC curve.

    This is the share of pairs of a true and a false answer in which the true one scores higher;
    equal scores count half.

    Args:
        scores: (R,).
        labels: (R,) whether each answer is true.

    Raises:
        ValueError: lengths differ, or all answers are true, or all are false.
    """
    values, true = _validate(scores, labels)
    # Counting at each distinct score handles ties exactly, without comparing all pairs.
    order, place = np.unique(values, return_inverse=True)
    num_true = np.bincount(place[true], minlength=len(order))
    num_false = np.bincount(place[~true], minlength=len(order))
    false_below = np.cumsum(num_false) - num_false
    wins = (num_true * (false_below + num_false / 2)).sum()
    return float(wins / (num_true.sum() * num_false.sum()))


def fpr_at_tpr(scores: npt.ArrayLike, labels: npt.ArrayLike, tpr: float = 0.9) -> float:
    """Return the false positive rate at the threshold that at least `tpr` of true answers reach."""
    values, true = _validate(scores, labels)
    threshold = threshold_at_tpr(values, true, tpr)
    return float((values[~true] >= threshold).mean())


def threshold_at_tpr(scores: npt.ArrayLike, labels: npt.ArrayLike, tpr: float) -> float:
    """Return the largest threshold that at least `tpr` of the true answers reach."""
    values, true = _validate(scores, labels)
    best_first = np.sort(values[true])[::-1]
    return float(best_first[int(np.ceil(tpr * len(best_first))) - 1])


def expected_calibration_error(
    probabilities: npt.ArrayLike,
    labels: npt.ArrayLike,
    num_bins: int = 15,
    *,
    balanced: bool = False,
) -> float:
    """Return the mean gap between probability and frequency over bins of equal width.

    Args:
        probabilities: (R,) in [0, 1].
        labels: (R,) whether each answer is true.
        num_bins: number of bins.
        balanced: whether true and false answers get the same total weight, whatever their numbers;
            for probabilities that were fitted on as many true answers as false ones.
    """
    values, true = _validate(probabilities, labels)
    weights = np.full(len(values), 1 / len(values))
    if balanced:
        weights = np.where(true, 0.5 / true.sum(), 0.5 / (~true).sum())
    # A probability of 1 belongs to the last bin.
    bins = np.minimum((values * num_bins).astype(np.int64), num_bins - 1)
    predicted = np.bincount(bins, weights=values * weights, minlength=num_bins)
    observed = np.bincount(bins, weights=true * weights, minlength=num_bins)
    # Both sums of a bin are weighted, and all weights sum to 1, so this is the mean of the gaps.
    return float(np.abs(predicted - observed).sum())


def _validate(scores: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Values, Labels]:
    values, true = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.bool_)
    if values.ndim != 1 or values.shape != true.shape:
        raise ValueError(f"scores and labels must be (R,), got {values.shape} and {true.shape}")
    if true.all() or not true.any():
        raise ValueError(
            f"both true and false answers are needed, got {int(true.sum())} true of {len(true)}"
        )
    return values, true

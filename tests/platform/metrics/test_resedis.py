"""`reir.metrics.resedis` against loops over every expression, photo and instance."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reir.images.boxes import pairwise_iou
from reir.metrics import UNRANKED, Gallery
from reir.metrics.resedis import (
    Decisions,
    Expressions,
    Targets,
    f1_score,
    num_matched,
    search_corpus,
    set_f1,
)

DIM = 4
NUM_IMAGES = 7


class Case:
    """Random expressions, targets and instances; with whole-number vectors, scores are exact."""

    def __init__(self, seed: int, num_expressions: int, num_instances: int, largest: int) -> None:
        rng = np.random.default_rng(seed)

        def vectors(num: int) -> np.ndarray:
            return rng.integers(-largest, largest + 1, (num, DIM)).astype(np.float32)

        def boxes(num: int) -> np.ndarray:
            corner = rng.integers(0, 3, (num, 2)).astype(float)
            return np.concatenate([corner, corner + rng.integers(1, 4, (num, 2))], axis=1)

        num_targets = int(rng.integers(0, 3 * num_expressions + 1))
        self.vectors = vectors(num_expressions)
        self.targets = Targets(
            num_expressions,
            rng.integers(0, num_expressions, num_targets),
            rng.integers(0, NUM_IMAGES, num_targets),
            boxes(num_targets),
        )
        self.gallery = Gallery(
            vectors(num_instances), rng.integers(0, NUM_IMAGES, num_instances), boxes(num_instances)
        )
        self.thresholds = rng.integers(-2, 3, num_expressions).astype(float)

    @property
    def expressions(self) -> Expressions:
        return Expressions(self.vectors, self.targets, self.thresholds)

    def scores(self, m: int) -> np.ndarray:
        return np.asarray(self.gallery.vectors @ self.vectors[m])

    def own(self, image: int) -> np.ndarray:
        return np.flatnonzero(self.gallery.images == image)

    def true_images(self, m: int) -> list[int]:
        return sorted(set(self.targets.images[self.targets.expressions == m].tolist()))

    def true_boxes(self, m: int, image: int) -> np.ndarray:
        rows = (self.targets.expressions == m) & (self.targets.images == image)
        return np.asarray(self.targets.boxes_px[rows])

    def photo_score(self, m: int, image: int) -> float:
        own = self.own(image)
        return float(self.scores(m)[own].max()) if len(own) else -np.inf

    def rank(self, m: int, image: int) -> int:
        """Sort all photos: by score, then wrong ones, then true ones; count those before."""
        level, true = self.photo_score(m, image), self.true_images(m)
        if np.isinf(level):
            return UNRANKED
        before = 0
        for other in range(NUM_IMAGES):
            score = self.photo_score(m, other)
            before += score > level or (score == level and other not in true)
        return before

    def top(self, m: int, image: int) -> tuple[float, float]:
        """The score of the answer in a photo, and its IoU: the worst of equal scores."""
        own = self.own(image)
        overlaps = pairwise_iou(self.gallery.boxes_px[own], self.true_boxes(m, image)).max(axis=1)
        rows = zip(self.scores(m)[own].tolist(), overlaps.tolist(), strict=True)
        return min(rows, key=lambda row: (-row[0], row[1]))


cases = st.builds(
    Case,
    seed=st.integers(0, 2**32 - 1),
    num_expressions=st.integers(1, 5),
    num_instances=st.integers(0, 30),
    largest=st.sampled_from([1, 100]),
)


@settings(max_examples=80, deadline=None)
@given(case=cases, scores_at_once=st.sampled_from([1, 40, 10_000]), num_best=st.integers(1, 40))
def test_a_search_equals_the_slow_one(case: Case, scores_at_once: int, num_best: int) -> None:
    found = search_corpus(
        case.expressions,
        case.gallery,
        num_images=NUM_IMAGES,
        num_best=num_best,
        scores_at_once=scores_at_once,
    )
    expressions = range(len(case.vectors))
    pairs = [(m, image) for m in expressions for image in case.true_images(m)]
    assert list(zip(found.pairs.expressions, found.pairs.images, strict=True)) == pairs
    assert found.ranks.tolist() == [case.rank(m, image) for m, image in pairs]
    fits = np.zeros(len(pairs), dtype=bool)
    for at, (m, image) in enumerate(pairs):
        accepted = [j for j in case.own(image) if case.scores(m)[j] >= case.thresholds[m]]
        assert sorted(found.accepted[at].tolist()) == accepted
        boxes = case.targets.boxes_px[found.pairs.targets[at]]
        assert sorted(boxes.tolist()) == sorted(case.true_boxes(m, image).tolist())
        if not len(case.own(image)):
            assert found.tops[at] == -1
            continue
        top = found.tops[at]
        overlap = pairwise_iou(case.gallery.boxes_px[[top]], boxes).max()
        assert (case.scores(m)[top], overlap) == case.top(m, image)
        assert case.gallery.images[top] == image
        fits[at] = overlap >= 0.5
    for k in (1, 2, 5):
        assert found.hits_image(k).tolist() == [
            any(case.rank(m, image) < k for image in case.true_images(m)) for m in expressions
        ]
        assert found.hits_joint(k, fits).tolist() == [
            any(
                case.rank(m, image) < k and case.top(m, image)[1] >= 0.5
                for image in case.true_images(m)
            )
            for m in expressions
        ]
    for m in expressions:
        own = [fits[at] for at, pair in enumerate(pairs) if pair[0] == m]
        assert found.share_fitting(fits)[m] == (sum(own) / len(own) if own else 0)
        wanted = np.sort(case.scores(m))[::-1][:num_best]
        assert found.best_scores[m].tolist() == wanted.tolist()
        assert case.scores(m)[found.best[m]].tolist() == wanted.tolist()
    assert found.decisions is not None
    assert_decisions(case, found.decisions)


def assert_decisions(case: Case, decisions: Decisions) -> None:
    expressions = range(len(case.vectors))
    every = [(m, image) for m in expressions for image in range(NUM_IMAGES)]
    margin = {(m, image): case.photo_score(m, image) - case.thresholds[m] for m, image in every}
    true = {(m, image) for m in expressions for image in case.true_images(m)}
    hits = sum(margin[each] >= 0 for each in true)
    alarms = sum(margin[each] >= 0 for each in every if each not in true)
    assert decisions.precision == (hits / (hits + alarms) if hits + alarms else 0)
    assert decisions.recall == (hits / len(true) if true else 0)
    whole = hits + alarms + len(true)
    assert decisions.f1 == pytest.approx(2 * hits / whole if whole else 0)
    assert decisions.false_found.sum() == alarms
    num_absent = len(every) - len(true)
    assert decisions.false_alarms_per_100 == pytest.approx(
        100 * alarms / num_absent if num_absent else 0
    )
    for precision in (0.5, 0.7, 0.9, 1.0):
        best = 0, 0
        for shift in sorted({margin[each] for each in true if np.isfinite(margin[each])}):
            found = sum(margin[each] >= shift for each in true)
            false = sum(margin[each] >= shift for each in every if each not in true)
            if found >= precision * (found + false) and found > best[0]:
                best = found, false
        recall, per_100 = decisions.at_precision(precision)
        assert recall == (best[0] / len(true) if true else 0)
        assert per_100 == pytest.approx(100 * best[1] / num_absent if num_absent else 0)


@given(st.integers(0, 2**32 - 1), st.integers(0, 4), st.integers(0, 4), st.sampled_from([0.3, 0.5]))
def test_matching_equals_the_best_of_all_assignments(
    seed: int, num: int, num_targets: int, threshold: float
) -> None:
    iou = np.random.default_rng(seed).random((num, num_targets))
    fitting = np.where(iou >= threshold, iou, 0)
    size = max(num, num_targets)
    padded = np.zeros((size, size))
    padded[:num, :num_targets] = fitting
    best = max(
        permutations(range(size)),
        key=lambda columns: sum(padded[row, column] for row, column in enumerate(columns)),
    )
    wanted = sum(padded[row, column] > 0 for row, column in enumerate(best))
    assert num_matched(iou, threshold) == wanted


def test_one_answer_matches_one_target_only() -> None:
    both = np.array([[0.9, 0.8]])
    assert num_matched(both) == 1
    assert num_matched(both.T) == 1
    # Taking the largest IoU first would leave the second answer without a target.
    assert num_matched(np.array([[0.9, 0.8], [0.85, 0.1]])) == 2
    assert num_matched(np.zeros((3, 0))) == 0
    assert set_f1([both, np.zeros((2, 1))]) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert f1_score(0, 0, 0) == 0


def test_expressions_without_targets_only_raise_false_alarms() -> None:
    vectors = np.array([[1.0, 0], [0, 1]], dtype=np.float32)
    boxes_px = np.array([[0.0, 0, 4, 4]] * 2)
    targets = Targets(2, np.array([0]), np.array([0]), boxes_px[:1])
    found = search_corpus(
        Expressions(vectors, targets, np.array([0.5, 0.5])),
        Gallery(vectors, np.array([0, 1]), boxes_px),
        num_images=2,
    )
    assert found.hits_image(1).tolist() == [True, False]
    assert found.decisions is not None
    assert found.decisions.false_found.tolist() == [0, 1]
    assert (found.decisions.precision, found.decisions.recall) == (0.5, 1)
    assert found.decisions.false_alarms_per_100 == pytest.approx(100 / 3)


def test_wrong_input_is_named() -> None:
    case = Case(0, 3, 5, 9)
    wrong: Any
    for wrong in ({"num_best": 0}, {"scores_at_once": 0}, {"num_images": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=0.* must be at least 1"):
            search_corpus(case.expressions, case.gallery, **({"num_images": 7} | wrong))
    with pytest.raises(ValueError, match="dimension 3, instance vectors 4; both must come"):
        search_corpus(Expressions(case.vectors[:, :3], case.targets), case.gallery, num_images=7)
    with pytest.raises(ValueError, match=r"vectors must have shape \(3, D\), got \(2, 4\)"):
        Expressions(case.vectors[:2], case.targets)
    with pytest.raises(ValueError, match=r"thresholds must have shape \(3,\), got \(2,\)"):
        Expressions(case.vectors, case.targets, case.thresholds[:2])
    one = np.array([3]), np.array([0]), np.zeros((1, 4))
    with pytest.raises(ValueError, match=r"expressions must lie in \[0, 3\), got 3 to 3"):
        Targets(3, *one)
    with pytest.raises(ValueError, match=r"shapes \(T,\), \(T,\) and \(T, 4\)"):
        Targets(4, *one[:2], np.zeros((2, 4)))
    with pytest.raises(ValueError, match="boxes_px must be finite"):
        Targets(4, *one[:2], np.full((1, 4), np.nan))
    search = search_corpus(case.expressions, case.gallery, num_images=7)
    assert search.decisions is not None
    with pytest.raises(ValueError, match=r"precision must lie in \[0\.5, 1\], got 0\.4"):
        search.decisions.at_precision(0.4)

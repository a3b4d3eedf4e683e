"""Metrics of ReSeDis: is it there, where is it, and which pixels - over a whole gallery.

A query is an expression with any number of targets: described instances, in one photo or in
several. An expression without targets describes nothing in the gallery. The gallery is every
instance of every photo. The score of a photo is that of its best instance, and a photo ranks by its
score. docs/evaluate.md has the formulas.

**Ties count against the query**, as in `reir.metrics.reir`: of photos with equal scores, wrong ones
rank first; of equal instances of one photo, the one that fits worst is its answer.
"""

# Shapes: M expressions, T targets, A pairs of an expression and one of its true photos,
# J instances, P photos that have instances, C expressions of a chunk, K best instances,
# D vector dimension

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import linear_sum_assignment

from reir.images.boxes import pairwise_iou
from reir.metrics.reir import TIE, UNRANKED, Bools, Floats, Gallery, Ints
from reir.records import FloatArray

IOU_THRESHOLD = 0.5
"""A box or a mask fits a target if their IoU is at least this."""

# So many scores take 64 MiB in float32.
_SCORES_AT_ONCE = 2**24


@dataclass(frozen=True)
class Targets:
    """The T described instances of M expressions: one row for each expression and instance.

    Attributes:
        num_expressions: M, including the expressions without targets.
        expressions: (T,) integers, the expression of each target.
        images: (T,) integers, the photo that it is in.
        boxes_px: (T, 4) its box, xyxy in pixels of that photo.

    Raises:
        ValueError: shapes differ, a box is not finite, or an expression is out of range.
    """

    num_expressions: int
    expressions: Ints
    images: Ints
    boxes_px: Floats

    def __post_init__(self) -> None:
        """Check shapes and ranges."""
        num = len(self.expressions)
        shapes = self.expressions.shape, self.images.shape, self.boxes_px.shape
        if shapes != ((num,), (num,), (num, 4)):
            raise ValueError(f"targets must have shapes (T,), (T,) and (T, 4), got {shapes}")
        if not np.isfinite(self.boxes_px).all():
            raise ValueError("targets.boxes_px must be finite, got NaN or infinity")
        if num and not 0 <= self.expressions.min() <= self.expressions.max() < self.num_expressions:
            raise ValueError(
                f"targets.expressions must lie in [0, {self.num_expressions}), got "
                f"{self.expressions.min()} to {self.expressions.max()}"
            )

    @cached_property
    def pairs(self) -> Pairs:
        """The pairs of an expression and one of its true photos, by expression and photo."""
        keys = np.stack([self.expressions, self.images], axis=1)
        # Sorted by expression first, so that the pairs of a chunk of expressions are one range.
        # `ravel`, because NumPy 2.0.0 returns the inverse as a column if there is an axis.
        unique, pair_of = np.unique(keys, axis=0, return_inverse=True)
        rows = np.argsort(pair_of.ravel(), kind="stable")
        counts = np.bincount(pair_of.ravel(), minlength=len(unique))
        # Without targets, `np.split` still returns one part, which is cut off.
        return Pairs(
            unique[:, 0], unique[:, 1], tuple(np.split(rows, np.cumsum(counts)[:-1])[: len(unique)])
        )


@dataclass(frozen=True)
class Pairs:
    """A pairs of an expression and one of its true photos.

    Attributes:
        expressions: (A,), ascending.
        images: (A,).
        targets: for each pair, the rows of its targets in `Targets`.
    """

    expressions: Ints
    images: Ints
    targets: tuple[Ints, ...]

    def __len__(self) -> int:
        """Return A."""
        return len(self.expressions)


@dataclass(frozen=True)
class Expressions:
    """M expressions to search for.

    Attributes:
        vectors: (M, D) float32.
        targets: what they describe.
        thresholds: (M,) a photo is decided to have what the expression describes if its score is at
            least this; None to decide nothing.

    Raises:
        ValueError: shapes differ.
    """

    vectors: FloatArray
    targets: Targets
    thresholds: Floats | None = None

    def __post_init__(self) -> None:
        """Check that there is a vector and a threshold for each expression."""
        num = self.targets.num_expressions
        if self.vectors.ndim != 2 or len(self.vectors) != num:
            raise ValueError(f"vectors must have shape ({num}, D), got {self.vectors.shape}")
        if self.thresholds is not None and self.thresholds.shape != (num,):
            raise ValueError(f"thresholds must have shape ({num},), got {self.thresholds.shape}")


@dataclass(frozen=True)
class Decisions:
    """For each expression and photo, the decision whether the photo shows the described instance.

    Attributes:
        true_found: (M,) number of true photos that were decided to have it.
        false_found: (M,) number of other photos that were decided to have it: false alarms.
        num_true: (M,) number of true photos.
        num_images: number of photos of the gallery.
        true_margins: (A,) by how much the score of each true photo exceeds the threshold of its
            expression; -inf for a photo without instances.
        false_margins: the A + 1 largest margins of other photos, or all if there are fewer.
    """

    true_found: Ints
    false_found: Ints
    num_true: Ints
    num_images: int
    true_margins: Floats
    false_margins: Floats

    @property
    def precision(self) -> float:
        """Share of photos decided to have it that do; 0 if there are none."""
        found = self.true_found.sum()
        return _ratio(found, found + self.false_found.sum())

    @property
    def recall(self) -> float:
        """Share of true photos decided to have it; 0 if there are none."""
        return _ratio(self.true_found.sum(), self.num_true.sum())

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 0 if there are no true photos."""
        return f1_score(
            int(self.true_found.sum()),
            int((self.true_found + self.false_found).sum()),
            int(self.num_true.sum()),
        )

    @property
    def false_alarms_per_100(self) -> float:
        """False alarms per 100 photos that do not have what the expression describes."""
        return self._per_100(int(self.false_found.sum()))

    def at_precision(self, precision: float) -> tuple[float, float]:
        """Return the recall and the false alarms per 100 photos at another threshold.

        All thresholds are moved by the same margin: as far as the precision stays at least this.
        Both figures are 0 if no margin has this precision.

        Raises:
            ValueError: the precision is below .5 or above 1.
        """
        if not 0.5 <= precision <= 1:
            raise ValueError(f"precision must lie in [0.5, 1], got {precision}")
        # A margin is only worth considering where it is that of a true photo.
        margins = np.sort(self.true_margins[np.isfinite(self.true_margins)])[::-1]
        # For each margin, the number of true photos and of false alarms whose margin is at least as
        # large. Negated, because `searchsorted` needs ascending values; "right" includes equal
        # ones.
        true = np.searchsorted(-margins, -margins, side="right")
        false = np.searchsorted(-np.sort(self.false_margins)[::-1], -margins, side="right")
        precise = np.flatnonzero(true >= precision * (true + false))
        if not len(precise):
            return 0.0, 0.0
        last = precise[-1]
        return _ratio(true[last], self.num_true.sum()), self._per_100(int(false[last]))

    def _per_100(self, false_alarms: int) -> float:
        return 100 * _ratio(false_alarms, (self.num_images - self.num_true).sum())


@dataclass(frozen=True)
class CorpusSearch:
    """The result of searching the gallery for M expressions.

    Attributes:
        pairs: the pairs that `ranks`, `tops` and `accepted` are about.
        num_expressions: M.
        ranks: (A,) rank of each true photo, from 0; `UNRANKED` if it has no instances. True photos
            of the same expression that have equal scores share a rank.
        tops: (A,) index of its best instance in the gallery; -1 if it has none.
        accepted: for each pair, the instances that reach the threshold of the expression; empty
            without thresholds.
        best: (M, K) indices of the best instances of the whole gallery, best first.
        best_scores: (M, K) their scores.
        decisions: None without thresholds.
    """

    pairs: Pairs
    num_expressions: int
    ranks: Ints
    tops: Ints
    accepted: tuple[Ints, ...]
    best: Ints
    best_scores: FloatArray
    decisions: Decisions | None

    def hits_image(self, k: int) -> Bools:
        """(M,) whether one of the true photos is among the first k photos."""
        return self.hits_joint(k, np.ones(len(self.pairs), dtype=bool))

    def hits_joint(self, k: int, fits: Bools) -> Bools:
        """(M,) whether a true photo is among the first k, and its best instance fits there.

        Args:
            k: number of first photos.
            fits: (A,) whether the best instance of each true photo fits one of its targets.
        """
        hits = np.zeros(self.num_expressions, dtype=bool)
        np.logical_or.at(hits, self.pairs.expressions, (self.ranks < k) & fits)
        return hits

    def share_fitting(self, fits: Bools) -> Floats:
        """(M,) share of the true photos whose best instance fits; 0 without true photos."""
        num_pairs = np.bincount(self.pairs.expressions, minlength=self.num_expressions)
        num_fitting = np.bincount(self.pairs.expressions, fits, self.num_expressions)
        return np.asarray(num_fitting / np.maximum(num_pairs, 1))


def search_corpus(
    expressions: Expressions,
    gallery: Gallery,
    *,
    num_images: int,
    num_best: int = 100,
    scores_at_once: int = _SCORES_AT_ONCE,
) -> CorpusSearch:
    """Score all instances for all expressions by inner product, in chunks.

    Args:
        expressions: what to search for.
        gallery: all instances.
        num_images: number of photos of the gallery, including those without instances.
        num_best: maximum number K of best instances to return for each expression.
        scores_at_once: number of scores in memory at a time.

    Raises:
        ValueError: the vectors differ in dimension, or a number is below 1.
    """
    if min(num_best, scores_at_once, num_images) < 1:
        raise ValueError(f"{num_best=}, {scores_at_once=} and {num_images=} must be at least 1")
    dims = expressions.vectors.shape[1], gallery.vectors.shape[1]
    if dims[0] != dims[1]:
        raise ValueError(
            f"expression vectors have dimension {dims[0]}, instance vectors {dims[1]}; both must "
            f"come from one checkpoint"
        )
    num = len(expressions.vectors)
    search = _Search(expressions, gallery, min(num_best, len(gallery)))
    rows_at_once = max(1, scores_at_once // max(len(gallery), 1))
    for first in range(0, num, rows_at_once):
        search.add(slice(first, min(first + rows_at_once, num)))
    return search.result(num_images)


class _Search:
    """The arrays of a `CorpusSearch` while its chunks are added."""

    def __init__(self, expressions: Expressions, gallery: Gallery, num_best: int) -> None:
        vectors, targets = expressions.vectors, expressions.targets
        self._vectors, self._targets = vectors, targets
        self._thresholds = expressions.thresholds
        self._pairs = targets.pairs
        # By photo, so that the instances of a photo are one range.
        self._order = np.argsort(gallery.images, kind="stable")
        self._instances = gallery.vectors[self._order]
        self._boxes_px = gallery.boxes_px[self._order]
        self._image_ids, starts = np.unique(gallery.images[self._order], return_index=True)
        self._ends = np.append(starts[1:], len(gallery)).astype(np.int64)
        self._starts = starts.astype(np.int64)
        # Rounding errors grow with the lengths of the vectors. The longest instance stands for all,
        # since their lengths differ little.
        lengths = np.linalg.norm(vectors, axis=1)
        longest = np.linalg.norm(gallery.vectors, axis=1).max(initial=0.0)
        self._tolerances = TIE * longest * lengths
        num, num_pairs = len(vectors), len(self._pairs)
        self._ranks = np.full(num_pairs, UNRANKED, dtype=np.int64)
        self._tops = np.full(num_pairs, -1, dtype=np.int64)
        self._accepted = [np.empty(0, dtype=np.int64)] * num_pairs
        self._best = np.zeros((num, num_best), dtype=np.int64)
        self._best_scores = np.zeros((num, num_best), dtype=np.float32)
        self._found = np.zeros((2, num), dtype=np.int64)  # in true and in other photos
        self._true_margins = np.full(num_pairs, -np.inf)
        self._false_margins = np.empty(0)

    def add(self, rows: slice) -> None:
        """Search for the expressions of one chunk."""
        if not len(self._instances):
            return
        scores_CJ = self._vectors[rows] @ self._instances.T
        # `reduceat` would be wrong for an empty range, but each of these photos has instances.
        photos_CP = np.maximum.reduceat(scores_CJ, self._starts, axis=1)
        first, past = np.searchsorted(self._pairs.expressions, [rows.start, rows.stop])
        at = np.searchsorted(self._image_ids, self._pairs.images[first:past])
        # A true photo without instances is not among the columns: `at` is then the place of another
        # photo, or past the end. Such pairs keep the values that they were initialized with.
        at = at.clip(max=len(self._image_ids) - 1)
        known = np.flatnonzero(self._image_ids[at] == self._pairs.images[first:past])
        pairs, columns = first + known, at[known]
        own = self._pairs.expressions[pairs] - rows.start
        true_CP = np.zeros(photos_CP.shape, dtype=bool)
        true_CP[own, columns] = True
        self._rank(pairs, photos_CP[own], photos_CP[own, columns], true_CP[own])
        for pair, row, column in zip(pairs.tolist(), own.tolist(), columns.tolist(), strict=True):
            members = slice(self._starts[column], self._ends[column])
            self._localize(pair, members, scores_CJ[row, members])
        self._keep_best(rows, scores_CJ)
        if self._thresholds is not None:
            margins_CP = photos_CP - self._thresholds[rows, None]
            self._true_margins[pairs] = margins_CP[own, columns]
            self._decide(rows, margins_CP, true_CP)

    def result(self, num_images: int) -> CorpusSearch:
        """Return everything that was added."""
        decisions = None
        if self._thresholds is not None:
            num_true = np.bincount(self._pairs.expressions, minlength=len(self._vectors))
            true_found, false_found = self._found
            decisions = Decisions(
                true_found,
                false_found,
                num_true,
                num_images,
                self._true_margins,
                self._false_margins,
            )
        return CorpusSearch(
            self._pairs,
            len(self._vectors),
            self._ranks,
            self._tops,
            tuple(self._accepted),
            self._best,
            self._best_scores,
            decisions,
        )

    def _rank(self, pairs: Ints, photos_AP: FloatArray, own: FloatArray, true_AP: Bools) -> None:
        tolerance = self._tolerances[self._pairs.expressions[pairs]]
        # Of equal photos, wrong ones rank first, but true ones do not outrank one another: the
        # tolerance is subtracted for the former and added for the latter.
        wrong_first = (photos_AP >= (own - tolerance)[:, None]) & ~true_AP
        right_first = (photos_AP > (own + tolerance)[:, None]) & true_AP
        self._ranks[pairs] = (wrong_first | right_first).sum(axis=1)

    def _localize(self, pair: int, members: slice, scores: FloatArray) -> None:
        """Find the answer in a true photo, and all instances that reach the threshold."""
        expression = self._pairs.expressions[pair]
        equals = np.flatnonzero(scores >= scores.max() - self._tolerances[expression])
        true_px = self._targets.boxes_px[self._pairs.targets[pair]]
        overlaps = pairwise_iou(self._boxes_px[members][equals], true_px).max(axis=1)
        self._tops[pair] = self._order[members][equals[overlaps.argmin()]]
        if self._thresholds is not None:
            reached = scores >= self._thresholds[expression]
            self._accepted[pair] = self._order[members][reached]

    def _keep_best(self, rows: slice, scores_CJ: FloatArray) -> None:
        num_best = self._best.shape[1]
        chosen = np.argpartition(-scores_CJ, num_best - 1, axis=1)[:, :num_best]
        scores = np.take_along_axis(scores_CJ, chosen, axis=1)
        # `argpartition` returns the best ones in an arbitrary order. `lexsort` sorts by its last
        # key first, so by score and then by position.
        order = np.lexsort((chosen, -scores), axis=1)
        self._best[rows] = self._order[np.take_along_axis(chosen, order, axis=1)]
        self._best_scores[rows] = np.take_along_axis(scores, order, axis=1)

    def _decide(self, rows: slice, margins_CP: Floats, true_CP: Bools) -> None:
        present = margins_CP >= 0
        self._found[0, rows] = (present & true_CP).sum(axis=1)
        self._found[1, rows] = (present & ~true_CP).sum(axis=1)
        # At a precision of .5 or more, there are no more false alarms than pairs.
        false = np.concatenate([self._false_margins, margins_CP[~true_CP]])
        spare = max(len(false) - len(self._pairs) - 1, 0)
        self._false_margins = np.partition(false, spare)[spare:] if spare else false


def num_matched(iou: Floats, threshold: float = IOU_THRESHOLD) -> int:
    """Return how many answers and targets match one to one, in the best assignment.

    The Hungarian algorithm finds the assignment whose sum of IoU is largest; pairs whose IoU is
    below the threshold count as 0, and do not match.

    Args:
        iou: (N, T) IoU of each answer with each target.
        threshold: smallest IoU of a match.
    """
    fitting = np.where(iou >= threshold, iou, 0.0)
    rows, columns = linear_sum_assignment(fitting, maximize=True)
    return int((fitting[rows, columns] > 0).sum())


def f1_score(matched: int, num_answers: int, num_targets: int) -> float:
    """Return the F1 of answers of which some match targets; 0 if there are neither."""
    return _ratio(2 * matched, num_answers + num_targets)


def set_f1(overlaps: Sequence[Floats]) -> tuple[float, float, float]:
    """Return precision, recall and F1 of sets of answers, each matched to its set of targets.

    Args:
        overlaps: for each set, the (N, T) IoU of its answers with its targets.
    """
    matched = sum(map(num_matched, overlaps))
    answers, wanted = (sum(iou.shape[axis] for iou in overlaps) for axis in (0, 1))
    return _ratio(matched, answers), _ratio(matched, wanted), f1_score(matched, answers, wanted)


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0

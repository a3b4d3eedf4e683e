"""Exact ranks for BoxRecall (BR@K) and image recall, computed in blocks without sorting.

A query is an expression with one true photo and one true box; the gallery is every instance of
every photo. Two definitions of BR@K at an IoU threshold are in use; one pass gives both:

* A: the best instance of the true photo is among the first K, and fits the true box;
* B: one of the first K instances is in the true photo, and fits the true box.

They agree at K = 1. Image recall R@K: fewer than K other photos have an instance ranked above the
best one of the true photo.

**Ties count against the query.** Of instances with equal scores, those of other photos rank first,
then those of the true photo that fit worse. So a model with constant vectors scores 0, and
no figure depends on the order of the gallery. Scores are equal if float32 cannot distinguish them:
if they differ by no more than `TIE` times the lengths of the two vectors.
"""

# Shapes: M queries, J instances, D vector dimension, T IoU thresholds, C queries of a chunk,
# P (query, own instance) pairs of a chunk, where own means "in the query's true photo"

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reir.images.boxes import elementwise_iou
from reir.records import FloatArray

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

IOU_THRESHOLDS = (0.5, 0.7, 0.9)
TIE = 1e-6
UNRANKED = int(np.iinfo(np.int64).max)
"""The rank of a photo that is not in the gallery."""


@dataclass(frozen=True)
class _BoxVectors:
    """N vectors, each with a photo and a box.

    Raises:
        ValueError: shapes differ or a value is not finite.
    """

    vectors: FloatArray
    images: Ints
    boxes_px: Floats

    def __post_init__(self) -> None:
        """Validate the arrays and convert them to their types."""
        _validate(self)

    def __len__(self) -> int:
        """Return N."""
        return len(self.vectors)


@dataclass(frozen=True)
class Queries(_BoxVectors):
    """M expressions, each with its true photo and true box.

    Attributes:
        vectors: (M, D) float32; M may be 0.
        images: (M,) integers, the true photo; it may have no instances in the gallery.
        boxes_px: (M, 4) the true box, xyxy in pixels of the true photo.
    """

    def __getitem__(self, rows: slice | Ints) -> Queries:
        """Return some of the queries."""
        return Queries(self.vectors[rows], self.images[rows], self.boxes_px[rows])


@dataclass(frozen=True)
class Gallery(_BoxVectors):
    """J instances of many photos.

    Attributes:
        vectors: (J, D) float32; J may be 0, which leaves every query unranked.
        images: (J,) integers, the photo of each instance, in any order.
        boxes_px: (J, 4) xyxy in pixels of that photo.
    """


@dataclass(frozen=True)
class ReirRanks:
    """Ranks of the right answers of M queries, from 0; `UNRANKED` if there is no right answer.

    Attributes:
        top_instance: (M,) index of the best instance of the true photo; -1 if it has none.
        top_iou: (M,) IoU of that instance with the true box; 0 if there is none.
        top_rank: (M,) its rank among all instances of the gallery.
        image_rank: (M,) the rank of the true photo among the photos that have instances.
        fitting_rank: (M, T) rank of the best instance of the true photo whose IoU with the true
            box reaches the threshold.
        iou_thresholds: the T thresholds.
    """

    top_instance: Ints
    top_iou: Floats
    top_rank: Ints
    image_rank: Ints
    fitting_rank: Ints
    iou_thresholds: tuple[float, ...]

    def __len__(self) -> int:
        """Return the number of queries M."""
        return len(self.top_rank)

    def hits_a(self, k: int, iou_threshold: float) -> Bools:
        """(M,) success by definition A, at any IoU threshold."""
        return (self.top_rank < k) & (self.top_iou >= iou_threshold)

    def hits_b(self, k: int, iou_threshold: float) -> Bools:
        """(M,) success by definition B, at one of `iou_thresholds`."""
        if iou_threshold not in self.iou_thresholds:
            raise ValueError(
                f"ranks were computed for IoU thresholds {self.iou_thresholds}, "
                f"not for {iou_threshold}; pass it to reir_ranks"
            )
        return self.fitting_rank[:, self.iou_thresholds.index(iou_threshold)] < k

    def hits_image(self, k: int) -> Bools:
        """(M,) whether the true photo is among the first K photos."""
        return self.image_rank < k


@dataclass(frozen=True)
class _GroupedGallery:
    """A gallery with its instances in the order of their photos."""

    vectors: FloatArray
    boxes_px: Floats
    order: Ints  # grouped position -> index in the caller's gallery
    image_ids: Ints  # ascending
    starts: Ints  # where the instances of each photo begin, and where those of the last photo end
    longest: float  # length of the longest vector

    def own_range(self, images: Ints) -> tuple[Ints, Ints]:
        """Return the first and the past-last grouped position of each photo's instances.

        The range is empty if the photo has no instances.
        """
        if not len(self.image_ids):
            return np.zeros_like(images), np.zeros_like(images)
        # A photo after the last one has no place here; `present` is false for it.
        at = np.searchsorted(self.image_ids, images).clip(max=len(self.image_ids) - 1)
        present = self.image_ids[at] == images
        return self.starts[at] * present, self.starts[at + 1] * present

    def blocks(self, size: int) -> Iterator[slice]:
        """Yield ranges of whole photos with about `size` instances (more if a photo has more)."""
        first, last = 0, len(self.image_ids)
        while first < last:
            past = int(np.searchsorted(self.starts, self.starts[first] + size, side="right")) - 1
            past = max(past, first + 1)
            yield slice(first, past)
            first = past


@dataclass(frozen=True)
class _Pairs:
    """All pairs of a query of the chunk and an instance of its true photo, sorted by query."""

    query: Ints  # (P,) row in the chunk
    position: Ints  # (P,) grouped position of the instance
    score: FloatArray  # (P,)
    iou: Floats  # (P,)

    def without(self, rows: Ints) -> _Pairs:
        """Return all other pairs."""
        kept = np.ones(len(self.query), dtype=bool)
        kept[rows] = False
        return _Pairs(self.query[kept], self.position[kept], self.score[kept], self.iou[kept])


def reir_ranks(
    queries: Queries,
    gallery: Gallery,
    *,
    iou_thresholds: Sequence[float] = IOU_THRESHOLDS,
    query_chunk: int = 256,
    instance_block: int = 8192,
) -> ReirRanks:
    """Rank a gallery for every query by inner product.

    Memory beyond the inputs: a few arrays of `query_chunk` x `instance_block`, and a copy of the
    gallery unless it is already grouped by photo.

    Args:
        queries: expressions and their right answers.
        gallery: instances to rank.
        iou_thresholds: an instance fits if its IoU with the true box is at least this.
        query_chunk: number of queries to score at once.
        instance_block: number of instances to score at once.

    Raises:
        ValueError: the vectors differ in dimension, or a chunk size is below 1.
    """
    if min(query_chunk, instance_block) < 1:
        raise ValueError(
            f"chunk sizes must be at least 1, got query_chunk={query_chunk} "
            f"instance_block={instance_block}"
        )
    if queries.vectors.shape[1] != gallery.vectors.shape[1]:
        raise ValueError(
            f"expression vectors have dimension {queries.vectors.shape[1]}, instance vectors "
            f"{gallery.vectors.shape[1]}; both must come from one checkpoint"
        )
    grouped = _group(gallery)
    thresholds = tuple(float(value) for value in iou_thresholds)
    chunks = [
        _rank_chunk(queries[first : first + query_chunk], grouped, thresholds, instance_block)
        # Without queries, there is one empty chunk, so that there are arrays to concatenate.
        for first in range(0, max(len(queries), 1), query_chunk)
    ]
    return _concatenate(chunks)


def top_instances(queries: Queries, gallery: Gallery, *, query_chunk: int = 256) -> Ints:
    """Return the (M,) index of the best instance of each true photo; -1 if it has none.

    Of equal scores, the instance that fits worst wins, as in `reir_ranks`.
    """
    return ranked_instances(queries, gallery, 1, query_chunk=query_chunk)[:, 0]


def ranked_instances(
    queries: Queries, gallery: Gallery, num: int, *, query_chunk: int = 256
) -> Ints:
    """Return the (M, num) indices of the best instances of each true photo, best first.

    Where a photo has fewer instances, the index is -1. Of equal scores, the instance that fits
    worst ranks first, as in `reir_ranks`.
    """
    grouped = _group(gallery)
    found = np.full((len(queries), num), -1, dtype=np.int64)
    for first in range(0, len(queries), query_chunk):
        chunk = queries[first : first + query_chunk]
        pairs, tolerance = _own_pairs(chunk, grouped), _tolerance(chunk, grouped)
        for rank in range(num):
            best = _best_pair(pairs, tolerance)
            answered = np.flatnonzero(best >= 0)
            rows = best[answered]
            found[first + answered, rank] = grouped.order[pairs.position[rows]]
            pairs = pairs.without(rows)
    return found


def _tolerance(queries: Queries, gallery: _GroupedGallery) -> FloatArray:
    """Return the (C,) largest difference at which two scores of a query count as equal."""
    return np.asarray(TIE * gallery.longest * _lengths(queries.vectors), dtype=np.float32)


def _rank_chunk(
    queries: Queries, gallery: _GroupedGallery, thresholds: tuple[float, ...], block: int
) -> ReirRanks:
    """Rank the gallery for one chunk of queries."""
    pairs = _own_pairs(queries, gallery)
    tolerance = _tolerance(queries, gallery)
    top_pair = _best_pair(pairs, tolerance)
    answered = top_pair >= 0
    top_iou = np.zeros(len(queries))
    top_iou[answered] = pairs.iou[top_pair[answered]]
    top_instance = np.full(len(queries), -1, dtype=np.int64)
    top_instance[answered] = gallery.order[pairs.position[top_pair[answered]]]
    # Level 0: the best own score. Level 1 + t: the best own score that fits threshold t.
    least_ious = (-np.inf, *thresholds)
    levels = np.stack([_best_score(pairs, pairs.iou >= v, len(queries)) for v in least_ious], 1)
    # Scores that are equal to a level must count as above it (ties count against the query).
    levels -= tolerance[:, None]
    above, image_rank = _count_others(queries.vectors, gallery, pairs, levels, block)
    above[:, 1:] += _count_own_misfits(pairs, levels[:, 1:], thresholds)
    # No score reaches a level of +inf, so its count is 0, which would read as the first rank.
    above[np.isinf(levels)] = UNRANKED
    image_rank[~answered] = UNRANKED
    return ReirRanks(top_instance, top_iou, above[:, 0], image_rank, above[:, 1:], thresholds)


def _own_pairs(queries: Queries, gallery: _GroupedGallery) -> _Pairs:
    first, past = gallery.own_range(queries.images)
    counts = past - first
    query = np.repeat(np.arange(len(queries)), counts)
    # 0, 1, 2, ... within the pairs of each query.
    step = np.arange(len(query)) - np.repeat(np.cumsum(counts) - counts, counts)
    position = np.repeat(first, counts) + step
    # The matrix product in `_count_others` may differ in the last bits; the tolerance covers that.
    score = np.einsum("pd,pd->p", queries.vectors[query], gallery.vectors[position])
    iou = elementwise_iou(gallery.boxes_px[position], queries.boxes_px[query])
    return _Pairs(query, position, score, np.asarray(iou, dtype=np.float64))


def _best_pair(pairs: _Pairs, tolerance: FloatArray) -> Ints:
    """Return the (C,) index of the pair with the highest score; -1 if a query has no pair.

    Of equal scores, the pair with the lowest IoU is returned.
    """
    num_queries = len(tolerance)
    level = _best_score(pairs, np.ones(len(pairs.query), dtype=bool), num_queries) - tolerance
    equals = np.flatnonzero(pairs.score >= level[pairs.query])
    order = equals[np.lexsort((pairs.iou[equals], pairs.query[equals]))]
    query, first = np.unique(pairs.query[order], return_index=True)
    best = np.full(num_queries, -1, dtype=np.int64)
    best[query] = order[first]
    return best


def _best_score(pairs: _Pairs, eligible: Bools, num_queries: int) -> FloatArray:
    """Return the (C,) highest score among the eligible pairs.

    Without such a pair it is +inf, a level that no score reaches.
    """
    best = np.full(num_queries, -np.inf, dtype=np.float32)
    np.maximum.at(best, pairs.query[eligible], pairs.score[eligible])
    best[np.isneginf(best)] = np.inf
    return best


def _count_others(
    vectors: FloatArray, gallery: _GroupedGallery, pairs: _Pairs, levels: FloatArray, block: int
) -> tuple[Ints, Ints]:
    """Count instances and photos other than the query's own that reach each level.

    Returns:
        (C, 1 + T) instances of other photos that reach each level, and (C,) other photos that
        have an instance reaching level 0.
    """
    instances = np.zeros(levels.shape, dtype=np.int64)
    photos = np.zeros(len(vectors), dtype=np.int64)
    for images in gallery.blocks(block):
        starts = gallery.starts[images]
        first, past = starts[0], gallery.starts[images.stop]
        scores_cb = vectors @ gallery.vectors[first:past].T
        own = (pairs.position >= first) & (pairs.position < past)
        # Own instances are counted separately, because only those that fit worse rank above.
        scores_cb[pairs.query[own], pairs.position[own] - first] = -np.inf
        for column in range(levels.shape[1]):
            instances[:, column] += _count_true(scores_cb >= levels[:, [column]])
        # A block has whole photos, and each has an instance: `reduceat` is wrong for empty ranges.
        best_of_photo = np.maximum.reduceat(scores_cb, starts - first, axis=1)
        photos += _count_true(best_of_photo >= levels[:, :1])
    return instances, photos


def _count_own_misfits(pairs: _Pairs, levels: FloatArray, thresholds: tuple[float, ...]) -> Ints:
    """Return the (C, T) numbers of own instances that reach a level but miss its IoU threshold."""
    counts = np.zeros(levels.shape, dtype=np.int64)
    for column, threshold in enumerate(thresholds):
        above = (pairs.iou < threshold) & (pairs.score >= levels[pairs.query, column])
        counts[:, column] = np.bincount(pairs.query[above], minlength=len(levels))
    return counts


def _count_true(mask_cb: Bools) -> Ints:
    """Return the (C,) number of true values in each row."""
    return np.asarray(np.count_nonzero(mask_cb, axis=1), dtype=np.int64)


def _concatenate(chunks: Sequence[ReirRanks]) -> ReirRanks:
    return ReirRanks(
        top_instance=np.concatenate([chunk.top_instance for chunk in chunks]),
        top_iou=np.concatenate([chunk.top_iou for chunk in chunks]),
        top_rank=np.concatenate([chunk.top_rank for chunk in chunks]),
        image_rank=np.concatenate([chunk.image_rank for chunk in chunks]),
        fitting_rank=np.concatenate([chunk.fitting_rank for chunk in chunks]),
        iou_thresholds=chunks[0].iou_thresholds,
    )


def _group(gallery: Gallery) -> _GroupedGallery:
    """Sort instances by photo; arrays that are already sorted are not copied."""
    vectors, images, boxes_px = gallery.vectors, gallery.images, gallery.boxes_px
    order = np.arange(len(gallery))
    if (np.diff(images) < 0).any():
        order = np.argsort(images, kind="stable")
        vectors, images, boxes_px = vectors[order], images[order], boxes_px[order]
    image_ids, starts = np.unique(images, return_index=True)
    longest = float(_lengths(vectors).max(initial=0.0))
    return _GroupedGallery(
        vectors, boxes_px, order, image_ids, np.append(starts, len(gallery)), longest
    )


def _lengths(vectors: FloatArray) -> FloatArray:
    """Return the (N,) Euclidean lengths of the vectors."""
    return np.asarray(np.sqrt(np.einsum("nd,nd->n", vectors, vectors)), dtype=np.float32)


def _validate(arrays: _BoxVectors) -> None:
    """Check shapes and values, and convert the arrays to their types."""
    name = type(arrays).__name__
    vectors = np.asarray(arrays.vectors, dtype=np.float32)
    images = np.asarray(arrays.images)
    boxes_px = np.asarray(arrays.boxes_px, dtype=np.float64)
    if vectors.ndim != 2:
        raise ValueError(f"{name}.vectors must have shape (*, D), got {vectors.shape}")
    num = len(vectors)
    if images.shape != (num,) or (num and images.dtype.kind not in "iu"):
        raise ValueError(
            f"{name}.images must be ({num},) integers, got {images.shape} {images.dtype}"
        )
    if boxes_px.shape != (num, 4):
        raise ValueError(f"{name}.boxes_px must have shape ({num}, 4), got {boxes_px.shape}")
    for field, array in (("vectors", vectors), ("boxes_px", boxes_px)):
        if not np.isfinite(array).all():
            raise ValueError(f"{name}.{field} must be finite, got NaN or infinity")
    # The dataclass is frozen, so plain assignments would fail.
    object.__setattr__(arrays, "vectors", vectors)
    object.__setattr__(arrays, "images", images.astype(np.int64))
    object.__setattr__(arrays, "boxes_px", boxes_px)

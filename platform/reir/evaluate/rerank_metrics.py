"""BR@k and REC from indexed vectors, with and without the relation re-ranker."""

# Shapes: M expressions, J instances of the whole gallery, N of one photo, P photos

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from reir.models.interfaces import EncodedExpression
from reir.models.reranker import PhotoInstances, Reranker
from reir.records import FloatArray

NUM_PHOTOS = 50
"""Number of photos to re-rank, the best of the dual stream."""

Ints = npt.NDArray[np.int64]


def dual_scores(
    expressions: Sequence[EncodedExpression], photos: Sequence[PhotoInstances]
) -> FloatArray:
    """Return the (M, J) inner products with the instances of all photos, photo by photo."""
    vectors = np.concatenate([photo.vectors for photo in photos])
    return np.asarray(np.stack([each.vector for each in expressions]) @ vectors.T)


def reranked_scores(
    reranker: Reranker,
    expressions: Sequence[EncodedExpression],
    photos: Sequence[PhotoInstances],
    own: Ints,
    *,
    num_photos: int = NUM_PHOTOS,
) -> FloatArray:
    """Return the (M, J) scores after re-ranking, in the order of `dual_scores`.

    Photos that are not re-ranked keep their order and come after all others. The expression's own
    photo is always re-ranked, since REC is measured there.

    Args:
        reranker: re-ranker of the checkpoint.
        expressions: M encoded expressions.
        photos: photos of the gallery.
        own: (M,) index of the photo of each expression.
        num_photos: number of photos to re-rank for each expression.
    """
    dual_MJ = dual_scores(expressions, photos)
    ends = np.cumsum([len(photo.boxes) for photo in photos])
    starts = ends - [len(photo.boxes) for photo in photos]
    # `reduceat` cannot handle empty ranges, so photos without instances are left out.
    filled = np.flatnonzero(ends > starts)
    out = dual_MJ - 10.0  # below any score of a re-ranked photo
    best_MP = np.maximum.reduceat(dual_MJ, starts[filled], axis=1)
    for m, expression in enumerate(expressions):
        top = filled[np.argsort(-best_MP[m], kind="stable")[:num_photos]]
        rows = [*top, *({int(own[m])} - set(top.tolist()))]
        (reranked,) = reranker.score([expression], [[photos[i] for i in rows]])
        for place, (i, one) in enumerate(zip(rows, reranked, strict=True)):
            # The own photo is scored for REC, but must not move up in the gallery by that.
            out[m, starts[i] : ends[i]] = one.scores - (0.0 if place < len(top) else 10.0)
    return out


def hits_at(scores_MJ: FloatArray, fits_MJ: npt.NDArray[np.bool_], k: int) -> FloatArray:
    """Return (M,): 1 if one of the best k instances fits (definition B of BR@k), else 0."""
    top = np.argsort(-scores_MJ, axis=1, kind="stable")[:, :k]
    return np.asarray(np.take_along_axis(fits_MJ, top, 1).any(axis=1), dtype=np.float32)


def hits_in_photo(
    scores_MJ: FloatArray, fits_MJ: npt.NDArray[np.bool_], inside_MJ: npt.NDArray[np.bool_]
) -> FloatArray:
    """Return (M,): 1 if the best instance in the expression's own photo fits (REC), else 0."""
    best = np.where(inside_MJ, scores_MJ, -np.inf).argmax(axis=1)
    return np.asarray(fits_MJ[np.arange(len(best)), best], dtype=np.float32)

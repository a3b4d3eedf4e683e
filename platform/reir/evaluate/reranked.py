"""BR@k and REC of a dual stream with and without its relation re-ranker, from the index alone."""

# Shapes: M expressions, J instances of the whole gallery, N of one photo, P photos

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from reir.models.reranker import PhotoInstances, Reranker
from reir.models.seams import EncodedExpression
from reir.records import FloatArray

NUM_PHOTOS = 50
"""Best photos of the dual stream that are re-ranked."""

Ints = npt.NDArray[np.int64]


def dual_scores(
    expressions: Sequence[EncodedExpression], photos: Sequence[PhotoInstances]
) -> FloatArray:
    """(M, J) inner products; the instances of all photos lie one after the other."""
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
    """(M, J) as `dual_scores`, after re-ranking.

    Photos outside the best `num_photos` come after all others, in their order. The expression's
    own photo is re-ranked in any case, so that REC can be told.

    Args:
        reranker: of the checkpoint.
        expressions: M of them.
        photos: the gallery.
        own: (M,) photo of each expression.
        num_photos: re-ranked for each expression.
    """
    dual_MJ = dual_scores(expressions, photos)
    ends = np.cumsum([len(photo.boxes) for photo in photos])
    starts = ends - [len(photo.boxes) for photo in photos]
    filled = np.flatnonzero(ends > starts)
    out = dual_MJ - 10.0
    best_MP = np.maximum.reduceat(dual_MJ, starts[filled], axis=1)
    for m, expression in enumerate(expressions):
        top = filled[np.argsort(-best_MP[m], kind="stable")[:num_photos]]
        asked = [*top, *({int(own[m])} - set(top.tolist()))]
        (found,) = reranker.score([expression], [[photos[i] for i in asked]])
        for place, (i, one) in enumerate(zip(asked, found, strict=True)):
            out[m, starts[i] : ends[i]] = one.scores - (0.0 if place < len(top) else 10.0)
    return out


def found_at(scores_MJ: FloatArray, fits_MJ: npt.NDArray[np.bool_], k: int) -> FloatArray:
    """(M,) 1 where one of the best k instances fits: definition B of BR@k."""
    top = np.argsort(-scores_MJ, axis=1, kind="stable")[:, :k]
    return np.asarray(np.take_along_axis(fits_MJ, top, 1).any(axis=1), dtype=np.float32)


def found_in_photo(
    scores_MJ: FloatArray, fits_MJ: npt.NDArray[np.bool_], inside_MJ: npt.NDArray[np.bool_]
) -> FloatArray:
    """(M,) 1 where the best instance within the expression's own photo fits: REC."""
    best = np.where(inside_MJ, scores_MJ, -np.inf).argmax(axis=1)
    return np.asarray(fits_MJ[np.arange(len(best)), best], dtype=np.float32)

"""How the order of hits, and of the instances of a photo, changes after their verification."""

# Shapes: N instances of a photo

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reir.models.color_reading import surprisal
from reir.query.stages import VerifyResult
from reir.records import FloatArray

SCORE_OF_SURPRISAL = 0.02
"""What a unit of surprisal of a color takes from the score of a hit; chosen on `val`."""

CANDIDATE_BOOST = 2.5
"""How much more classes and places count among the instances of one photo than between photos;
chosen on `val`."""

VERIFIED_INSTANCES = 5
"""Number of first instances of a photo that are verified; more of them change nothing on `val`."""


def verified_scores(
    scores: Sequence[float], verified: Sequence[VerifyResult | None]
) -> list[float]:
    """Return the scores of hits after verification, which does not change their mean.

    A hit whose photo could not be read is treated like the average of the others.

    Args:
        scores: inner products.
        verified: what the pixels say about each of these hits.
    """
    usual = mean_surprisal(verified)
    return [
        score if each is None else score - SCORE_OF_SURPRISAL * (surprisal(each) - usual)
        for score, each in zip(scores, verified, strict=True)
    ]


def mean_surprisal(verified: Sequence[VerifyResult | None]) -> float:
    """Return the mean surprisal of the hits whose photos could be read; 0 if there are none."""
    known = [surprisal(each) for each in verified if each is not None]
    return float(np.mean(known)) if known else 0.0


def scores_in_photo(
    vectors_ND: FloatArray, vector_D: FloatArray, candidate_dims: int = 0
) -> FloatArray:
    """Return (N,) scores of the instances of one photo.

    These are inner products, but classes and places count more. The best instance by these keeps
    its inner product, and all others lose, so that scores remain comparable with those of other
    photos.

    Args:
        vectors_ND: of the instances.
        vector_D: of the expression.
        candidate_dims: see `CandidateEncoder.candidate_dims`.
    """
    first = len(vector_D) - candidate_dims
    known_N = vectors_ND[:, first:] @ vector_D[first:]
    # `initial` is for a photo without instances, which has no maximum.
    behind_N = known_N - known_N.max(initial=-np.inf)
    return np.asarray(vectors_ND @ vector_D + CANDIDATE_BOOST * behind_N, dtype=np.float32)


def by_score(scores_N: FloatArray) -> npt.NDArray[np.int64]:
    """Return (N,) instances of a photo, best first; equal ones by objectness, as they come."""
    return np.argsort(-scores_N, kind="stable")


@dataclass(frozen=True)
class RankedInstances:
    """The instances of a photo, best first.

    Attributes:
        order: (N,) rows of the instances.
        scores: N scores, see `scores_in_photo`; those of the first instances after their
            verification.
        score: inner product of the best instance.
        colors: what the pixels say about the best instance; nothing without verification.
    """

    order: npt.NDArray[np.int64]
    scores: list[float]
    score: float
    colors: VerifyResult


def rank_instances(
    vectors_ND: FloatArray,
    vector_D: FloatArray,
    candidate_dims: int = 0,
    verified: Sequence[VerifyResult] = (),
) -> RankedInstances:
    """Rank the instances of a photo, of which there is at least one.

    Args:
        vectors_ND, vector_D, candidate_dims: see `scores_in_photo`.
        verified: what the pixels say about the first of them, in the order of these scores.
    """
    scores_N = scores_in_photo(vectors_ND, vector_D, candidate_dims)
    plain = by_score(scores_N)
    scores = scores_N[plain].tolist()
    scores[: len(verified)] = verified_scores(scores[: len(verified)], verified)
    # Only the verified instances change places among themselves.
    first = np.argsort(-np.array(scores[: len(verified)]), kind="stable")
    places = np.append(first, np.arange(len(verified), len(scores))).astype(np.int64)
    # With verification, the best instance is always one of the verified ones, so that this is also
    # its place in `verified`.
    best = int(places[0])
    return RankedInstances(
        order=plain[places],
        scores=[scores[place] for place in places.tolist()],
        score=float(vectors_ND[plain[best]] @ vector_D),
        colors=verified[best] if verified else (),
    )

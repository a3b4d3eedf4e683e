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

SCORE_OF_CANDIDATE = 0.07
"""How much lower the score of an instance becomes for each unit by which its logit of the candidate
head is below the highest one in the photo; chosen on `val`."""

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


def candidate_scores(products_N: FloatArray, logits_N: FloatArray | None) -> FloatArray:
    """Return (N,) scores of the instances of a photo, with what the candidate head says of them.

    The best instance by its logit keeps its score, and all others lose, so that scores remain
    comparable with those of other photos.

    Args:
        products_N: inner products.
        logits_N: see `CandidateScorer.score`; None without a candidate head.
    """
    if logits_N is None:
        return products_N
    behind = logits_N - logits_N.max(initial=-np.inf)
    return np.asarray(products_N + SCORE_OF_CANDIDATE * behind, dtype=np.float32)


def by_score(scores_N: FloatArray) -> npt.NDArray[np.int64]:
    """Return (N,) instances of a photo, best first; equal ones by objectness, as they come."""
    return np.argsort(-scores_N, kind="stable")


@dataclass(frozen=True)
class RankedInstances:
    """The instances of a photo, best first.

    Attributes:
        order: (N,) rows of the instances.
        scores: N scores, with what the candidate head says; those of the first instances after
            their verification.
        score: inner product of the best instance.
        colors: what the pixels say about the best instance; nothing without verification.
    """

    order: npt.NDArray[np.int64]
    scores: list[float]
    score: float
    colors: VerifyResult


def rank_instances(
    products_N: FloatArray,
    verified: Sequence[VerifyResult] = (),
    logits_N: FloatArray | None = None,
) -> RankedInstances:
    """Rank the instances of a photo, of which there is at least one.

    Args:
        products_N: inner products.
        verified: what the pixels say about the first of them, in the order of their
            `candidate_scores`.
        logits_N: see `candidate_scores`.
    """
    scores_N = candidate_scores(products_N, logits_N)
    plain = by_score(scores_N)
    scores = scores_N[plain].tolist()
    scores[: len(verified)] = verified_scores(scores[: len(verified)], verified)
    # Only the verified instances change places among themselves.
    first = np.argsort(-np.array(scores[: len(verified)]), kind="stable")
    places = np.append(first, np.arange(len(verified), len(scores))).astype(np.int64)
    best = int(places[0])
    return RankedInstances(
        order=plain[places],
        scores=[scores[place] for place in places.tolist()],
        score=float(products_N[plain[best]]),
        colors=verified[best] if verified else (),
    )

"""Fits the `Calibration` of a checkpoint: from the scores of a search to a presence probability.

Galleries of several sizes are drawn from photos that the checkpoint was not trained on. Each
expression searches galleries with its own photo in them, and galleries without it. From the scores
of these searches, logistic models learn to predict whether the described instance is there. The
module works on arrays; it uses no encoder and no files.
"""

# Shapes: M expressions, P photos, J instances, R trials, F features

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from reir.errors import DataError
from reir.metrics.calibration import (
    auroc,
    expected_calibration_error,
    fpr_at_tpr,
    threshold_at_tpr,
)
from reir.query.photo_curve import PhotoCurve
from reir.query.presence import (
    BOX_FEATURES,
    GALLERY_FEATURES,
    HIT_FEATURES,
    PHOTO_FEATURES,
    PHOTOS,
    Background,
    Calibration,
    Logistic,
    box_features,
    count_words,
    gallery_features,
    hit_features,
    photo_features,
)
from reir.query.verify.scores import (
    mean_surprisal,
    verified_scores,
)
from reir_training.report.calibration_queries import SHORT
from reir_training.report.score_table import MIN_GALLERY, Floats, Labels, ScoreTable

SEED = 0
"""Seed of the galleries that the calibration is fitted on."""

TARGET_TPR = 0.9
"""An answer counts as found above a threshold that this share of the present instances reaches."""

PHOTO_DRAWS = 8
"""How often each expression is tried on its own photo and on another one; more draws make the
figures depend less on which other photos were drawn."""

CURVE_POINTS = 40
"""Number of thresholds for which recall and false alarms per photo are measured."""

TIED = 0.6
"""If the first of two hits is right less often than this, their order is not meaningful."""

MIN_TIES = 20
"""The share of correct answers among fewer ties would mostly be noise."""

# The ridge keeps the weights finite even if a feature separates the outcomes perfectly.
_STEPS, _RIDGE = 50, 1e-3


@dataclass(frozen=True)
class Trials:
    """The examples that a logistic model is fitted on; each is the result of one search.

    Attributes:
        features: (R, F) features of the scores.
        labels: (R,) whether the described instance is there, or whether a hit is that instance.
        groups: (R,) the photo that the expression describes. Cross-validation keeps all trials of a
            photo on the same side.
    """

    features: Floats
    labels: Labels
    groups: npt.NDArray[np.int64]

    def rows(self, chosen: Labels) -> Trials:
        """Return the chosen trials."""
        return Trials(self.features[chosen], self.labels[chosen], self.groups[chosen])


def draw_galleries(
    scored: ScoreTable, seed: int
) -> Iterator[tuple[int, bool, npt.NDArray[np.int64]]]:
    """Yield galleries of several sizes for each expression, with and without its own photo.

    A gallery without it has no other photo either that may show what the expression describes.

    Yields:
        (expression, whether its own photo is in the gallery, photos of the gallery).
    """
    rng = np.random.default_rng(seed)
    photos = np.arange(scored.best.shape[1])
    for expression, own in enumerate(scored.own):
        others = rng.permutation(np.delete(photos, own))
        absent = others[~np.isin(others, scored.alike[expression])]
        # The score of the best hit grows with the size of the gallery, so the model needs several
        # sizes.
        size = len(absent)
        while size >= MIN_GALLERY:
            yield expression, True, np.append(others[: size - 1], own)
            yield expression, False, absent[:size]
            size //= 2


class FirstHits(NamedTuple):
    """The first hits of a search, best first, at most one of each photo.

    Attributes:
        photos: (N,) of the hits.
        scores: N scores.
        surprisal: mean surprisal of the hits; 0 without verification.
    """

    photos: npt.NDArray[np.int64]
    scores: list[float]
    surprisal: float


def first_hits(
    scored: ScoreTable, expression: int, photos: npt.NDArray[np.int64], *, verified: bool
) -> FirstHits:
    """Search some photos, and verify the colors of the hits if asked to (`scored.pixels`)."""
    photos = best_photos(scored, expression, photos)
    readings = [
        scored.pixels.hits.get((expression, photo), ()) if verified else ()
        for photo in photos.tolist()
    ]
    scores = np.array(verified_scores(scored.best[expression, photos].tolist(), readings))
    order = np.argsort(-scores, kind="stable")
    return FirstHits(photos[order], scores[order].tolist(), mean_surprisal(readings))


def best_photos(
    scored: ScoreTable, expression: int, photos: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Return the photos that score highest before verification: at most `PHOTOS`, best first."""
    return photos[np.argsort(-scored.best[expression, photos], kind="stable")][:PHOTOS]


def gallery_trials(scored: ScoreTable, seed: int, *, verified: bool) -> tuple[Trials, Trials]:
    """Return the trials of whole galleries, and the trials of single hits in them.

    A gallery's label says whether the described instance is in it; a hit's label, whether the hit
    is that instance. Trials of hits are left out for expressions that are not unique, because a hit
    in another photo may be right, too.

    Args:
        scored: scores of all expressions.
        seed: of the galleries, see `draw_galleries`.
        verified: whether the searches verify the colors of their hits (`scored.pixels`).
    """
    unique = scored.unique
    galleries: list[tuple[tuple[float, ...], bool, int]] = []
    hits: list[tuple[tuple[float, ...], bool, int]] = []
    for expression, present, photos in draw_galleries(scored, seed):
        found = first_hits(scored, expression, photos, verified=verified)
        best, surprisal = found.scores, found.surprisal
        size, background = int(scored.counts[photos].sum()), scored.background[expression]
        group, words = int(scored.own[expression]), count_words(scored.texts[expression])
        galleries.append(
            (gallery_features(best, background, size, words, surprisal), present, group)
        )
        if not unique[expression]:
            continue
        for photo, score in zip(found.photos.tolist(), best, strict=True):
            right = bool(scored.right[expression, photo])
            hits.append((hit_features(score, best, background, size), right, group))
    return _trials(galleries), _trials(hits)


def draw_photos(scored: ScoreTable, seed: int) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Yield the photos that each expression is tried on.

    Half of the tries are on the photo that the expression describes. The others are alternately on
    a random photo and on one of the photos with the highest scores, of those that do not show what
    it describes.

    Yields:
        (expression, photos).
    """
    rng = np.random.default_rng(seed)
    for expression, own in enumerate(scored.own):
        others = np.argsort(-scored.best[expression])
        others = others[~np.isin(others, scored.alike[expression])]
        if not len(others):  # all photos may show it
            continue
        # Random photos alone would be too easy to tell from the right one.
        drawn = [rng.choice(others[:PHOTOS] if draw % 2 else others) for draw in range(PHOTO_DRAWS)]
        yield expression, np.array([*drawn, *[own] * PHOTO_DRAWS], dtype=np.int64)


def photo_trials(scored: ScoreTable, seed: int, *, verified: bool) -> tuple[Trials, Trials]:
    """Return trials of two questions: is it in this photo, and is it this instance of the photo?

    Trials of instances are left out for expressions that are not unique.

    Args:
        scored: scores of all expressions.
        seed: of the photos, see `draw_photos`.
        verified: whether the photos are opened (`scored.pixels`), or only their vectors compared.
    """
    unique = scored.unique
    photos: list[tuple[tuple[float, ...], bool, int]] = []
    boxes: list[tuple[tuple[float, ...], bool, int]] = []
    for expression, drawn in draw_photos(scored, seed):
        own, background = int(scored.own[expression]), scored.background[expression]
        words = count_words(scored.texts[expression])
        for photo in drawn.tolist():
            ranked, fits = scored.within(expression, photo, verified=verified)
            features = photo_features(ranked.score, background, words, ranked.colors)
            photos.append((features, photo == own, own))
            if unique[expression]:
                boxes += [
                    (box_features(score, ranked.scores, background), bool(right), own)
                    for score, right in list(zip(ranked.scores, fits, strict=True))[:PHOTOS]
                ]
    return _trials(photos), _trials(boxes)


def fit_calibration(
    scored: ScoreTable, background: Background, digest: str, about: Mapping[str, Any]
) -> Calibration:
    """Fit all logistic models, and measure them by cross-validation.

    Args:
        scored: expressions and photos that the checkpoint was not trained on.
        background: of the checkpoint, with which `scored` was computed.
        digest: digest of the checkpoint.
        about: describes the photos; the measured figures are added to it.

    Raises:
        DataError: there are too few photos or expressions.
    """
    if not scored.unique.any():
        raise DataError(
            f"calibration needs expressions that describe one instance of all photos, but all "
            f"{len(scored.own)} are of the kind {SHORT!r}: add long expressions"
        )
    # The same models serve searches with and without verification.
    ways = (False, True) if scored.pixels.hits else (False,)
    trials = [
        (*gallery_trials(scored, SEED, verified=each), *photo_trials(scored, SEED, verified=each))
        for each in ways
    ]
    whole, hits, photos = (_joined(each) for each in list(zip(*trials, strict=True))[:3])
    boxes = trials[-1][3]  # nobody asks about an instance of a photo without opening the photo
    presence = cross_validated(whole, GALLERY_FEATURES)
    on_photos = cross_validated(photos, PHOTO_FEATURES)
    photo = fit(photos, PHOTO_FEATURES)
    return Calibration(
        digest=digest,
        gallery=fit(whole, GALLERY_FEATURES),
        hit=fit(hits, HIT_FEATURES),
        photo=photo,
        box=fit(boxes, BOX_FEATURES),
        threshold=round(threshold_at_tpr(presence, whole.labels, TARGET_TPR), 4),
        photo_threshold=round(threshold_at_tpr(on_photos, photos.labels, TARGET_TPR), 4),
        photo_curve=photo_curve(scored, photo),
        tie_margin=tie_margin(scored),
        background=background,
        about={
            **about,
            "photos": len(scored.counts),
            "expressions": len(scored.own),
            "verified_hits": len(scored.pixels.hits),
            "gallery": calibration_figures(presence, whole.labels),
            "hit": calibration_figures(cross_validated(hits, HIT_FEATURES), hits.labels),
            "photo": calibration_figures(on_photos, photos.labels),
            "box": calibration_figures(cross_validated(boxes, BOX_FEATURES), boxes.labels),
        },
    )


def photo_curve(scored: ScoreTable, model: Logistic) -> PhotoCurve:
    """Measure the decision about a photo from the index alone, for several thresholds.

    Every expression is tried on every photo, apart from other photos that may show what it
    describes. The thresholds are those at which equal shares of the right photos are lost.
    """
    presence_MP = np.array(
        [
            [model(photo_features(score, background, count_words(text))) for score in best_P]
            for best_P, background, text in zip(
                scored.best.tolist(), scored.background, scored.texts, strict=True
            )
        ]
    )
    photos_P = np.arange(presence_MP.shape[1])
    is_alike_MP = np.array([np.isin(photos_P, alike) for alike in scored.alike])
    right = np.sort(presence_MP[scored.own[:, None] == photos_P])
    wrong = np.sort(presence_MP[~is_alike_MP])
    kept = np.linspace(0, len(right) - 1, CURVE_POINTS).astype(np.int64)
    # Rounded down, or the photo that gave a threshold would not reach it.
    thresholds = np.unique(np.floor(right[kept] * 1e6) / 1e6)
    alarms = len(wrong) - np.searchsorted(wrong, thresholds)
    # One false alarm more than was seen: none among so many photos does not mean that there are
    # none among more.
    return PhotoCurve(
        thresholds=tuple(thresholds.tolist()),
        recalls=tuple(((len(right) - np.searchsorted(right, thresholds)) / len(right)).tolist()),
        false_alarms=tuple(np.minimum(1.0, (alarms + 1) / len(wrong)).tolist()),
    )


def calibration_figures(probabilities: Floats, labels: Labels) -> dict[str, float]:
    """Return AUROC, ECE and FPR at 90 % TPR."""
    return {
        "auroc": round(auroc(probabilities, labels), 4),
        "ece": round(expected_calibration_error(probabilities, labels), 4),
        "fpr90": round(fpr_at_tpr(probabilities, labels), 4),
    }


def cross_validated(trials: Trials, names: tuple[str, ...]) -> Floats:
    """Return (R,) cross-validated probabilities: each half is predicted from the other half.

    Raises:
        DataError: all trials of a half have the same outcome, or it has none.
    """
    # Trials of the same photo are similar, so a photo must not be in both halves. Otherwise, the
    # figures would look better than on new photos.
    half = trials.groups % 2 == 0
    out = np.zeros(len(trials.labels))
    for mine in (half, ~half):
        model = fit(trials.rows(~mine), names)
        out[mine] = [model(row) for row in trials.features[mine].tolist()]
    return out


def fit(trials: Trials, names: tuple[str, ...]) -> Logistic:
    """Fit a logistic model by maximum likelihood: Newton's method with a small ridge penalty.

    Raises:
        DataError: all trials have the same outcome, or there are none.
    """
    x, y = trials.features, trials.labels.astype(np.float64)
    if len(np.unique(y)) < 2:
        # The trials of all photos are never empty, only those of one half of a cross-validation.
        problem = (
            f"all {len(y)} trials have the same outcome"
            if len(y)
            else "there are no trials about half of the photos"
        )
        raise DataError(
            f"calibration needs right and wrong answers, but {problem}: use expressions about more "
            f"photos"
        )
    # Standardize the features, so that the ridge penalizes all of them alike.
    mean, scale = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-9)
    z = np.column_stack([(x - mean) / scale, np.ones(len(x))])
    weights = np.zeros(z.shape[1])
    ridge = _RIDGE * np.eye(z.shape[1])
    for _ in range(_STEPS):
        p = 1.0 / (1.0 + np.exp(-z @ weights))
        gradient = z.T @ (p - y) / len(y) + ridge @ weights
        step = np.linalg.solve((z.T * (p * (1 - p))) @ z / len(y) + ridge, gradient)
        weights -= step
        if np.abs(step).max() < 1e-10:
            break
    # Searches have raw features, so convert the weights back.
    raw = weights[:-1] / scale
    return Logistic(
        features=names,
        weights=tuple(round(float(each), 6) for each in raw),
        bias=round(float(weights[-1] - raw @ mean), 6),
    )


def tie_margin(scored: ScoreTable) -> float:
    """Return the score margin up to which the order of the first two hits is not meaningful.

    Only unique expressions whose instance ranks first or second among all photos are considered.
    They are sorted by the margin between the two scores. The result is the largest margin up to
    which the instance ranks first in less than a share `TIED` of them; 0 if there is none.
    """
    rows = np.flatnonzero(scored.unique)[:, None]
    order = np.argsort(-scored.best[rows[:, 0]], axis=1, kind="stable")[:, :2]
    first, second = scored.best[rows, order].T
    right = scored.right[rows, order]
    decided = right.any(axis=1)
    by_margin = np.argsort((first - second)[decided], kind="stable")
    margins = (first - second)[decided][by_margin]
    shares = np.cumsum(right[decided, 0][by_margin]) / np.arange(1, len(by_margin) + 1)
    tied = np.flatnonzero(shares[MIN_TIES - 1 :] < TIED)
    return round(float(margins[MIN_TIES - 1 + tied[-1]]), 5) if tied.size else 0.0


def _joined(parts: Sequence[Trials]) -> Trials:
    return Trials(
        np.concatenate([each.features for each in parts]),
        np.concatenate([each.labels for each in parts]),
        np.concatenate([each.groups for each in parts]),
    )


def _trials(rows: list[tuple[tuple[float, ...], bool, int]]) -> Trials:
    features, labels, groups = zip(*rows, strict=True)
    return Trials(
        np.array(features, dtype=np.float64),
        np.array(labels, dtype=np.bool_),
        np.array(groups, dtype=np.int64),
    )

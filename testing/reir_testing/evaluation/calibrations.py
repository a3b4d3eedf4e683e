"""Handwritten calibrations, by which presence follows from the score alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from reir.query.photo_curve import PhotoCurve
from reir.query.presence import (
    BOX_FEATURES,
    GALLERY_FEATURES,
    HIT_FEATURES,
    PHOTO_FEATURES,
    Background,
    Calibration,
    Logistic,
)
from reir_testing.fakes import FakeEncoder

ONE_POINT_CURVE = PhotoCurve(thresholds=(0.5,), recalls=(0.9,), false_alarms=(0.1,))


def by_score(features: tuple[str, ...], weight: float, bias: float) -> Logistic:
    """Return the logistic of `weight * score + bias`, whatever the other features are."""
    weights = tuple(weight if each == "score" else 0.0 for each in features)
    return Logistic(features=features, weights=weights, bias=bias)


def score_calibration(digest: str, weight: float, bias: float, **changes: Any) -> Calibration:
    """Return a calibration whose models are all `by_score`.

    Args:
        digest: of the encoder.
        weight, bias: of each model.
        changes: fields of the calibration that differ; both thresholds are .5 by default.
    """
    calibration = Calibration(
        digest=digest,
        gallery=by_score(GALLERY_FEATURES, weight, bias),
        hit=by_score(HIT_FEATURES, weight, bias),
        photo=by_score(PHOTO_FEATURES, weight, bias),
        box=by_score(BOX_FEATURES, weight, bias),
        threshold=0.5,
        photo_threshold=0.5,
        photo_curve=ONE_POINT_CURVE,
        tie_margin=0.0,
        about={},
    )
    return replace(calibration, **changes)


def fake_calibration(background: Background | None = None) -> Calibration:
    """Return a calibration of the fake encoder: a photo has the instance from a score of .8 on.

    Args:
        background: instances of other photos, which raise this score a little; None for none.
    """
    return score_calibration(
        *(FakeEncoder().digest, 10, -8),
        photo=Logistic(features=PHOTO_FEATURES, weights=(10, -2, 0, 0, 0, 0), bias=-8),
        background=background or Background.none(),
    )

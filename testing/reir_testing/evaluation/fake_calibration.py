"""A calibration for the fake encoder."""

from __future__ import annotations

from reir.query.presence import (
    BOX_FEATURES,
    GALLERY_FEATURES,
    HIT_FEATURES,
    PHOTO_FEATURES,
    Background,
    Calibration,
    Logistic,
)
from reir_testing.calibrations import ONE_POINT_CURVE
from reir_testing.fakes import FakeEncoder


def fake_calibration(background: Background | None = None) -> Calibration:
    """Return a calibration by which a photo has the instance from a score of .8 on.

    Args:
        background: instances of other photos, which raise this score a little; None for none.
    """

    def model(features: tuple[str, ...]) -> Logistic:
        weights = {"score": 10.0, "background": -2.0}
        return Logistic(
            features=features, weights=tuple(weights.get(each, 0.0) for each in features), bias=-8.0
        )

    return Calibration(
        digest=FakeEncoder().digest,
        gallery=model(GALLERY_FEATURES),
        hit=model(HIT_FEATURES),
        photo=model(PHOTO_FEATURES),
        box=model(BOX_FEATURES),
        threshold=0.5,
        photo_threshold=0.5,
        photo_curve=ONE_POINT_CURVE,
        tie_margin=0.0,
        about={},
        background=background or Background.none(),
    )

"""Features of an answer, and the file that says what they mean."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import reir
from reir.errors import CheckpointError
from reir.models.color_reading import ColorReading
from reir.query.presence import (
    BACKGROUND_FILE,
    FILE,
    GALLERY_FEATURES,
    PHOTO_FEATURES,
    Background,
    Calibration,
    Logistic,
    box_features,
    gallery_features,
    hit_features,
    load_background,
    load_calibration,
    save_background,
    save_calibration,
)
from reir_testing.evaluation.calibrations import ONE_POINT_CURVE

BEST = [0.9, 0.6, 0.3]


def logistic(num: int) -> Logistic:
    return Logistic(
        features=GALLERY_FEATURES[:num],
        weights=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)[:num],
        bias=-1.0,
    )


def calibration() -> Calibration:
    return Calibration(
        digest="d",
        gallery=logistic(7),
        hit=logistic(5),
        photo=Logistic(features=PHOTO_FEATURES, weights=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0), bias=-1.0),
        box=logistic(4),
        threshold=0.4,
        photo_threshold=0.5,
        photo_curve=ONE_POINT_CURVE,
        tie_margin=0.01,
        about={"photos": 3},
    )


def test_features() -> None:
    assert hit_features(0.9, BEST, 0.5, 99) == pytest.approx((0.9, 0.3, 0.3, 0.5, 2.0))
    assert hit_features(0.6, BEST, 0.5, 99) == pytest.approx((0.6, -0.3, 0.3, 0.5, 2.0))
    assert gallery_features(BEST, 0.5, 99, 7, 2.5) == (*hit_features(0.9, BEST, 0.5, 99), 7, 2.5)
    assert hit_features(0.9, [0.9], 0, 0) == pytest.approx((0.9, 0, 0, 0, 0))
    assert hit_features(0.9, [0.9] * 11 + [0.0], 0, 0)[2] == pytest.approx(0)  # of ten
    assert box_features(0.6, BEST, 0.5) == pytest.approx((0.6, -0.3, 0.3, 0.5))


def test_the_background_score_is_the_mean_of_the_best_photos() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(30, 4, 8)).astype(np.float32)
    asked = rng.normal(size=8).astype(np.float32)
    best = sorted(max(float(row @ asked) for row in photo) for photo in vectors)
    assert Background(vectors).score(asked) == pytest.approx(sum(best[-20:]) / 20, abs=1e-5)
    assert Background.none().score(np.ones(1, dtype=np.float32)) == 0.0
    assert Background.none().score(np.ones(8, dtype=np.float32)) == 0.0


def test_logistic() -> None:
    assert logistic(2)([1, 2]) == pytest.approx(1 / (1 + math.exp(-4)))
    assert logistic(1)([1e9]) == pytest.approx(1)
    with pytest.raises(ValueError, match="2 features but 1 weights"):
        Logistic(features=("a", "b"), weights=(1.0,), bias=0)
    with pytest.raises(ValueError, match="finite"):
        Logistic(features=("a",), weights=(math.nan,), bias=0)


def test_the_file_comes_back(tmp_path: Path) -> None:
    save_calibration(tmp_path, calibration())
    found = load_calibration(tmp_path, "d")
    assert found == calibration()
    assert found.of_gallery(BEST, 0.5, 99, 1, 0.2) == pytest.approx(
        logistic(7)((0.9, 0.3, 0.3, 0.5, 2.0, 1, 0.2))
    )
    assert found.of_hit(0.6, BEST, 0.5, 99) == pytest.approx(
        logistic(5)((0.6, -0.3, 0.3, 0.5, 2.0))
    )
    assert found.of_photo(0.9, 0.5, 1) == pytest.approx(logistic(4)((0.9, 0.5, 0.4, 1)))
    assert found.of_photo(0.3, 0.5, 1) == pytest.approx(logistic(4)((0.3, 0.5, 0.0, 1)))
    colors = [
        ColorReading(word=word, probability=0.5, likely="red", likely_probability=0.5)
        for word in ("dark", "red", "red")
    ]
    assert found.of_photo(-4, -2, 1, colors) == pytest.approx(
        logistic(6)((-4, -2, 0, 1, 3 * math.log(2), 3))
    )
    assert found.of_box(0.3, BEST, 0.5) == pytest.approx(logistic(4)((0.3, -0.6, 0.3, 0.5)))
    assert (found.is_found(0.4), found.is_found(0.39), found.is_found(None)) == (True, False, False)


def test_other_weights_have_no_calibration(tmp_path: Path) -> None:
    assert load_calibration(tmp_path, "d") is None
    save_calibration(tmp_path, calibration())
    assert load_calibration(tmp_path, "other") is None


def test_a_calibration_of_an_earlier_release_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE).write_text('{"format": 1, "digest": "d"}')
    assert load_calibration(tmp_path, "d") is None
    assert "fit it anew with `reir calibrate`" in caplog.text


def test_the_background_comes_back_and_belongs_to_its_weights(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(25, 2, 8)).astype(np.float16)
    background = Background(vectors.astype(np.float32))
    save_background(tmp_path, background.vectors, "d")
    save_calibration(tmp_path, replace(calibration(), background=background))
    found = load_calibration(tmp_path, "d")
    assert found is not None
    np.testing.assert_array_equal(found.background.vectors, background.vectors)
    assert len(load_background(tmp_path, "other").vectors) == 0
    (tmp_path / BACKGROUND_FILE).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"background\.safetensors is damaged"):
        load_calibration(tmp_path, "d")
    (tmp_path / BACKGROUND_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"another background\.safetensors"):
        load_calibration(tmp_path, "d")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": 7, "digest": "d"}', '{"format": 7, "digest": "d", "hit": {}}'],
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(CheckpointError, match=r"calibration\.json is no calibration.*delete it"):
        load_calibration(tmp_path, "d")


def test_other_features_are_refused(tmp_path: Path) -> None:
    other = Logistic(features=("score", "lead", "spread", "color"), weights=(1, 2, 3, 4), bias=0)
    save_calibration(tmp_path, replace(calibration(), box=other))
    with pytest.raises(CheckpointError, match=r"box has features .*color"):
        load_calibration(tmp_path, "d")


def test_the_shipped_checkpoint_is_calibrated() -> None:
    folder = Path(reir.__file__).parent / "checkpoints" / "clare-nano"
    config = json.loads((folder / "config.json").read_text())
    found = load_calibration(folder, config["digest"])
    assert found is not None
    assert len(found.background.vectors) >= 900
    sure, unsure = [0.9, 0.5, 0.4], [0.3, 0.29, 0.29]
    assert (
        found.of_gallery(sure, 0.5, 3000, 9, 0)
        > found.threshold
        > found.of_gallery(unsure, 0.5, 3000, 9, 0)
    )
    # The same scores mean less if the sentence scores high everywhere.
    assert found.of_gallery(sure, 0.9, 3000, 9, 0) < found.of_gallery(sure, 0.5, 3000, 9, 0)
    assert found.of_hit(0.9, sure, 0.5, 3000) > 0.5 > found.of_hit(0.5, sure, 0.5, 3000)
    assert found.of_box(0.9, sure, 0.5) > found.of_box(0.4, sure, 0.5)


def test_an_unknown_value_is_refused(tmp_path: Path) -> None:
    path = save_calibration(tmp_path, calibration())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mystery": 1}))
    with pytest.raises(CheckpointError, match="mystery"):
        load_calibration(tmp_path, "d")

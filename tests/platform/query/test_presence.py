"""Features of an answer, and the file that says what they mean."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

import reir
from reir.errors import CheckpointError
from reir.query.presence import (
    FILE,
    GALLERY_FEATURES,
    Calibration,
    Logistic,
    box_features,
    gallery_features,
    hit_features,
    load_calibration,
    save_calibration,
)

BEST = [0.9, 0.6, 0.3]


def logistic(num: int) -> Logistic:
    return Logistic(features=GALLERY_FEATURES[:num], weights=(1.0, 2.0, 3.0, 4.0)[:num], bias=-1.0)


def calibration() -> Calibration:
    return Calibration(
        digest="d",
        gallery=logistic(4),
        hit=logistic(4),
        photo=logistic(3),
        box=logistic(3),
        threshold=0.4,
        photo_threshold=0.5,
        tie_margin=0.01,
        about={"photos": 3},
    )


def test_features() -> None:
    assert hit_features(0.9, BEST, 99) == pytest.approx((0.9, 0.3, 0.3, 2.0))
    assert hit_features(0.6, BEST, 99) == pytest.approx((0.6, -0.3, 0.3, 2.0))
    assert gallery_features(BEST, 99) == hit_features(0.9, BEST, 99)
    assert hit_features(0.9, [0.9], 0) == pytest.approx((0.9, 0, 0, 0))
    assert hit_features(0.9, [0.9] * 11 + [0.0], 0)[2] == pytest.approx(0)  # of ten
    assert box_features(0.6, BEST) == pytest.approx((0.6, -0.3, 0.3))


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
    assert found.of_gallery(BEST, 99) == pytest.approx(logistic(4)((0.9, 0.3, 0.3, 2.0)))
    assert found.of_hit(0.6, BEST, 99) == pytest.approx(logistic(4)((0.6, -0.3, 0.3, 2.0)))
    assert found.of_photo(BEST) == pytest.approx(logistic(3)((0.9, 0.3, 0.3)))
    assert found.of_box(0.3, BEST) == pytest.approx(logistic(3)((0.3, -0.6, 0.3)))
    assert (found.is_found(0.4), found.is_found(0.39), found.is_found(None)) == (True, False, False)


def test_other_weights_have_no_calibration(tmp_path: Path) -> None:
    assert load_calibration(tmp_path, "d") is None
    save_calibration(tmp_path, calibration())
    assert load_calibration(tmp_path, "other") is None


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": 1, "digest": "d"}', '{"format": 1, "digest": "d", "hit": {}}'],
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(CheckpointError, match=r"calibration\.json is no calibration.*delete it"):
        load_calibration(tmp_path, "d")


def test_other_features_are_refused(tmp_path: Path) -> None:
    other = Logistic(features=("score", "lead", "color"), weights=(1, 2, 3), bias=0)
    save_calibration(tmp_path, replace(calibration(), box=other))
    with pytest.raises(CheckpointError, match=r"box has features .*color"):
        load_calibration(tmp_path, "d")


def test_the_shipped_checkpoint_is_calibrated() -> None:
    folder = Path(reir.__file__).parent / "checkpoints" / "clare-nano"
    config = json.loads((folder / "config.json").read_text())
    found = load_calibration(folder, config["digest"])
    assert found is not None
    sure, unsure = [0.9, 0.5, 0.4], [0.3, 0.29, 0.29]
    assert found.of_gallery(sure, 3000) > found.threshold > found.of_gallery(unsure, 3000)
    assert found.of_hit(0.9, sure, 3000) > 0.5 > found.of_hit(0.5, sure, 3000)
    assert found.of_box(0.9, sure) > found.of_box(0.4, sure)


def test_an_unknown_value_is_refused(tmp_path: Path) -> None:
    path = save_calibration(tmp_path, calibration())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mystery": 1}))
    with pytest.raises(CheckpointError, match="mystery"):
        load_calibration(tmp_path, "d")

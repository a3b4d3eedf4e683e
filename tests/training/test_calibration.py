"""Fitting presence: on instances that are drawn, and as a user types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from reir.datasets import write_reircoco
from reir.errors import DataError
from reir.metrics import Gallery, Queries
from reir.presence import GALLERY_FEATURES, load_calibration
from reir.testing import FakeEncoder
from reir.testing.photo_sets import draw_photo_set, random_scenes
from reir_training.calibrate_cli import calibrate
from reir_training.calibration import (
    Scored,
    Trials,
    crossed,
    fit,
    fit_calibration,
    gallery_trials,
    photo_trials,
)

DIM = 16


def drawn(num_photos: int, noise: float, seed: int = 0) -> tuple[Gallery, Queries]:
    """Three instances a photo, and for the first of each an expression that is a noisy copy."""
    rng = np.random.default_rng(seed)
    vectors = unit(rng.normal(size=(3 * num_photos, DIM)))
    images = np.repeat(np.arange(num_photos), 3)
    corners = np.tile([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]], (num_photos, 1))
    asked = unit(vectors[::3] + noise * rng.normal(size=(num_photos, DIM)))
    boxes_px = corners.astype(np.float64)
    return (
        Gallery(vectors, images, boxes_px),
        Queries(asked, np.arange(num_photos), boxes_px[::3]),
    )


def unit(vectors: Any) -> Any:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_scores_are_those_of_the_best_instance_of_each_photo() -> None:
    gallery, queries = drawn(25, 0.3)
    scored = Scored(gallery, queries)
    scores = queries.vectors @ gallery.vectors.T
    for photo in range(25):
        rows = scores[:, gallery.images == photo]
        np.testing.assert_allclose(scored.best[:, photo], rows.max(axis=1), atol=1e-6)
        right = rows[photo].argmax() == 0
        assert scored.right[photo, photo] == right
    assert scored.right.sum() == np.diag(scored.right).sum()


def test_half_of_the_galleries_hold_the_photo_and_the_others_do_not() -> None:
    scored = Scored(*drawn(50, 0.1))
    whole, hits = gallery_trials(scored, seed=0)
    assert whole.labels.mean() == 0.5
    assert set(np.round(whole.features[:, 3], 1)) == {
        np.round(np.log10(1 + 3 * n), 1) for n in (49, 24)
    }
    assert len(hits.labels) == 10 * len(whole.labels)
    assert hits.labels.sum() <= whole.labels.sum()
    photos, boxes = photo_trials(scored, seed=0)
    assert photos.labels.mean() == 0.5
    assert len(boxes.labels) == 3 * len(photos.labels)


@pytest.mark.parametrize(("noise", "least", "most"), [(0.1, 0.97, 1.0), (3.0, 0.3, 0.75)])
def test_presence_is_sure_of_what_it_can_know_only(noise: float, least: float, most: float) -> None:
    found = fit_calibration(*drawn(80, noise), digest="d", about={"split": "val"})
    assert least <= found.about["gallery"]["auroc"] <= most
    assert found.about["gallery"]["ece"] < 0.15
    assert (found.digest, found.about["split"], found.about["photos"]) == ("d", "val", 80)
    assert 0 < found.threshold < 1
    assert found.gallery.features == GALLERY_FEATURES
    again = fit_calibration(*drawn(80, noise), digest="d", about={"split": "val"})
    assert again == found


def test_a_logistic_is_the_one_that_made_the_outcomes() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20_000, 2)) * [1, 5] + [3, 0]
    p = 1 / (1 + np.exp(-(2 * x[:, 0] - 0.3 * x[:, 1] - 5)))
    trials = Trials(x, rng.random(20_000) < p, np.arange(20_000))
    found = fit(trials, ("a", "b"))
    assert found.weights == pytest.approx((2, -0.3), abs=0.1)
    assert found.bias == pytest.approx(-5, abs=0.25)
    assert np.abs(crossed(trials, ("a", "b")) - p).max() < 0.06


def test_too_little_is_refused() -> None:
    with pytest.raises(DataError, match="19 photos have instances, 20 are needed"):
        Scored(*drawn(19, 0.1))
    trials = Trials(np.ones((3, 1)), np.ones(3, dtype=np.bool_), np.arange(3))
    with pytest.raises(DataError, match="all of 3 trials have one outcome"):
        fit(trials, ("a",))


def test_the_command_writes_the_file_beside_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reir.checkpoint.load_encoder", lambda _path: FakeEncoder())
    write_reircoco(draw_photo_set(tmp_path, random_scenes(0, 60)), tmp_path / "val.json")
    app = typer.Typer()
    app.command()(calibrate)
    options = ["--annotations", str(tmp_path / "val.json"), "--images", str(tmp_path)]
    result = CliRunner().invoke(app, [*options, "--checkpoint", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    found = load_calibration(tmp_path, FakeEncoder().digest)
    assert found is not None
    assert json.loads(result.stdout)["threshold"] == found.threshold
    assert "written: " in CliRunner().invoke(app, [*options, "--checkpoint", str(tmp_path)]).stdout

"""Fitting the calibration, on random instances and with the command."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from reir.datasets import write_reircoco
from reir.errors import DataError
from reir.metrics import Gallery
from reir.metrics.calibration import auroc
from reir.models.color_reading import ColorReading
from reir.query.presence import (
    GALLERY_FEATURES,
    PHOTO_FEATURES,
    Background,
    count_words,
    load_calibration,
    photo_features,
)
from reir.query.stages import VerifyResult
from reir.query.verify.scores import SCORE_OF_SURPRISAL, rank_instances, scores_in_photo
from reir_testing import FakeEncoder
from reir_testing.photo_sets import draw_photo_set, random_scenes
from reir_training.cli.calibrate import calibrate
from reir_training.report.calibration import (
    CURVE_POINTS,
    Trials,
    best_photos,
    cross_validated,
    draw_galleries,
    draw_photos,
    fit,
    fit_calibration,
    gallery_trials,
    photo_curve,
    photo_trials,
    tie_margin,
)
from reir_training.report.calibration_queries import CalibrationQueries, calibration_queries
from reir_training.report.score_table import PixelEvidence, ScoreTable

DIM = 16


def drawn(num_photos: int, noise: float, seed: int = 0) -> tuple[Gallery, CalibrationQueries]:
    """Three instances per photo, and for the first an expression vector that is a noisy copy."""
    rng = np.random.default_rng(seed)
    vectors = unit(rng.normal(size=(3 * num_photos, DIM)))
    images = np.repeat(np.arange(num_photos), 3)
    corners = np.tile([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]], (num_photos, 1))
    asked = unit(vectors[::3] + noise * rng.normal(size=(num_photos, DIM)))
    boxes_px = corners.astype(np.float64)
    return (
        Gallery(vectors, images, boxes_px),
        CalibrationQueries(
            *(asked, np.arange(num_photos), boxes_px[::3]),
            texts=tuple(" ".join(["word"] * (3 + photo % 7)) for photo in range(num_photos)),
            alike=tuple(frozenset({photo}) for photo in range(num_photos)),
        ),
    )


def unit(vectors: Any) -> Any:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


BACKGROUND = Background(unit(np.random.default_rng(9).normal(size=(120, DIM))).reshape(40, 3, DIM))


def test_scores_are_those_of_the_best_instance_of_each_photo() -> None:
    gallery, queries = drawn(25, 0.3)
    scored = ScoreTable(gallery, queries, BACKGROUND)
    scores = queries.vectors @ gallery.vectors.T
    for photo in range(25):
        rows = scores[:, gallery.images == photo]
        np.testing.assert_allclose(scored.best[:, photo], rows.max(axis=1), atol=1e-6)
        right = rows[photo].argmax() == 0
        assert scored.right[photo, photo] == right
    assert scored.right.sum() == np.diag(scored.right).sum()


def test_half_of_the_galleries_contain_the_photo() -> None:
    scored = ScoreTable(*drawn(50, 0.1), BACKGROUND)
    whole, hits = gallery_trials(scored, seed=0, verified=False)
    assert whole.labels.mean() == 0.5
    assert set(np.round(whole.features[:, 4], 1)) == {
        np.round(np.log10(1 + 3 * n), 1) for n in (49, 24)
    }
    assert len(hits.labels) == 10 * len(whole.labels)
    assert hits.labels.sum() <= whole.labels.sum()
    photos, boxes = photo_trials(scored, seed=0, verified=False)
    assert photos.labels.mean() == 0.5
    assert len(boxes.labels) == 3 * len(photos.labels)


def test_the_curve_counts_every_expression_on_every_photo() -> None:
    scored = ScoreTable(*drawn(50, 1.0), BACKGROUND)
    model = fit(photo_trials(scored, seed=0, verified=False)[0], PHOTO_FEATURES)
    curve = photo_curve(scored, model)
    assert curve.recalls[0] == 1.0
    assert 2 < len(curve.thresholds) <= CURVE_POINTS
    for threshold, recall, alarms in list(
        zip(curve.thresholds, curve.recalls, curve.false_alarms, strict=True)
    )[::5]:
        found = wrong = 0
        for m, own in enumerate(scored.own):
            for photo, score in enumerate(scored.best[m].tolist()):
                words = count_words(scored.texts[m])
                features = photo_features(score, scored.background[m], words)
                passed = model(features) >= threshold
                found += passed and photo == own
                wrong += passed and photo != own
        assert recall == pytest.approx(found / 50)
        assert alarms == pytest.approx(min(1.0, (wrong + 1) / (50 * 49)))


@pytest.mark.parametrize(("noise", "least", "most"), [(0.1, 0.97, 1.0), (3.0, 0.3, 0.75)])
def test_presence_reflects_the_noise_of_the_vectors(
    noise: float, least: float, most: float
) -> None:
    scored = ScoreTable(*drawn(80, noise), BACKGROUND)
    found = fit_calibration(scored, BACKGROUND, digest="d", about={"split": "val"})
    assert least <= found.about["gallery"]["auroc"] <= most
    assert found.about["gallery"]["ece"] < 0.15
    assert (found.digest, found.about["split"], found.about["photos"]) == ("d", "val", 80)
    assert 0 < found.threshold < 1
    assert found.gallery.features == GALLERY_FEATURES
    assert fit_calibration(scored, BACKGROUND, digest="d", about={"split": "val"}) == found


def test_fit_recovers_the_logistic_model() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20_000, 2)) * [1, 5] + [3, 0]
    p = 1 / (1 + np.exp(-(2 * x[:, 0] - 0.3 * x[:, 1] - 5)))
    trials = Trials(x, rng.random(20_000) < p, np.arange(20_000))
    found = fit(trials, ("a", "b"))
    assert found.weights == pytest.approx((2, -0.3), abs=0.1)
    assert found.bias == pytest.approx(-5, abs=0.25)
    assert np.abs(cross_validated(trials, ("a", "b")) - p).max() < 0.06


def some_trials(seed: int) -> Trials:
    """Trials of 30 photos; the feature's effect has opposite signs in odd and in even photos."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(30), 6)
    features = rng.normal(size=(len(groups), 2))
    sign = np.where(groups % 2, 1, -1)
    return Trials(
        features, rng.random(len(groups)) < 1 / (1 + np.exp(-3 * sign * features[:, 0])), groups
    )


def test_cross_validation_predicts_each_half_from_the_other() -> None:
    trials = some_trials(0)
    found = cross_validated(trials, ("a", "b"))
    for row in range(len(trials.labels)):
        others = trials.groups % 2 != trials.groups[row] % 2
        model = fit(trials.rows(others), ("a", "b"))
        assert found[row] == pytest.approx(model(trials.features[row].tolist()))
    assert auroc(found, trials.labels) < 0.2  # each model learned the opposite sign


def test_gallery_trials_equal_the_loop() -> None:
    gallery, queries = drawn(24, 0.6)
    scored = ScoreTable(gallery, queries, BACKGROUND)
    whole, hits = gallery_trials(scored, seed=3, verified=False)
    row = 0
    for number, (expression, present, photos) in enumerate(draw_galleries(scored, seed=3)):
        assert present == (queries.images[expression] in photos)
        best = []
        for photo in photos.tolist():
            rows = np.flatnonzero(gallery.images == photo)
            scores = gallery.vectors[rows] @ queries.vectors[expression]
            right = photo == queries.images[expression] and int(scores.argmax()) == 0
            best.append((float(scores.max()), right))
        best = sorted(best, key=lambda each: -each[0])[:10]
        scores_of_best = [score for score, _ in best]
        spread, size = best[0][0] - float(np.mean(scores_of_best)), math.log10(1 + 3 * len(photos))
        lead = best[0][0] - best[1][0]
        background = BACKGROUND.score(queries.vectors[expression])
        assert background > 0.2
        np.testing.assert_allclose(
            whole.features[number],
            (best[0][0], lead, spread, background, size, 3 + expression % 7, 0),
            atol=1e-5,
        )
        assert (whole.labels[number], whole.groups[number]) == (present, queries.images[expression])
        for place, (score, right) in enumerate(best):
            lead = score - best[0][0] if place else score - best[1][0]
            row_of_hit = (score, lead, spread, background, size)
            np.testing.assert_allclose(hits.features[row], row_of_hit, atol=1e-5)
            assert (hits.labels[row], hits.groups[row]) == (right, queries.images[expression])
            row += 1
    assert row == len(hits.labels)


def random_readings(num: int, seed: int) -> dict[tuple[int, int], list[VerifyResult]]:
    """Readings of the three instances of every photo, for every second expression."""
    rng = np.random.default_rng(seed)

    def reading() -> VerifyResult:
        probability = float(rng.uniform(0.01, 1))
        return (
            ColorReading(
                word="red", probability=probability, likely="red", likely_probability=probability
            ),
        )

    return {
        (expression, photo): [reading() for _ in range(3)]
        for expression in range(0, num, 2)
        for photo in range(num)
    }


def test_verified_trials_are_those_of_verified_scores() -> None:
    scored = ScoreTable(*drawn(24, 0.6), BACKGROUND)
    hits = {pair: first for pair, (first, *_) in random_readings(24, seed=1).items()}
    scored.pixels = PixelEvidence(hits=hits)
    whole, of_hits = gallery_trials(scored, seed=3, verified=True)
    plain, plain_hits = gallery_trials(scored, seed=3, verified=False)
    assert plain.features[:, -1].max() == 0
    searches = list(draw_galleries(scored, seed=3))
    reordered = 0
    for number, (expression, _, photos) in enumerate(searches):
        best = best_photos(scored, expression, photos)
        surprisals = [
            sum(each.surprisal for each in hits.get((expression, photo), ()))
            for photo in best.tolist()
        ]
        mean = float(np.mean(surprisals))
        scores = scored.best[expression, best] - SCORE_OF_SURPRISAL * (np.array(surprisals) - mean)
        features = whole.features[number]
        assert (features[0], features[-1]) == pytest.approx((scores.max(), mean))
        of_search = of_hits.features[10 * number : 10 * number + 10, 0]
        np.testing.assert_allclose(of_search, np.sort(scores)[::-1])
        if expression % 2:
            np.testing.assert_array_equal(features, plain.features[number])
        reordered += bool(np.any(np.diff(scores) > 0))
    assert reordered > 5
    assert of_hits.labels.sum() == plain_hits.labels.sum()
    calibration = fit_calibration(scored, BACKGROUND, digest="d", about={})
    assert calibration.gallery.weights[-1] != 0
    assert calibration.about["verified_hits"] == len(hits)


def test_verified_trials_of_photos_are_those_of_verified_instances() -> None:
    gallery, queries = drawn(24, 1.5)
    scored = ScoreTable(gallery, queries, BACKGROUND, candidate_dims=4)
    scored.pixels = PixelEvidence(instances=random_readings(24, seed=2))
    photos, boxes = photo_trials(scored, seed=3, verified=True)
    plain, plain_boxes = photo_trials(scored, seed=3, verified=False)
    assert plain.features[:, -2:].max() == 0
    row = reordered = 0
    for expression, searched in draw_photos(scored, seed=3):
        for photo in searched.tolist():
            rows = slice(3 * photo, 3 * photo + 3)
            compared = (gallery.vectors[rows], queries.vectors[expression], 4)
            products = compared[0] @ compared[1]
            scores = scores_in_photo(*compared)
            readings = scored.pixels.instances.get((expression, photo), ())
            ranked = rank_instances(*compared, readings)
            # The first of these instances are the ones that are verified.
            first_px = scored.first_boxes_px(expression, photo, 1)
            np.testing.assert_allclose(first_px, gallery.boxes_px[rows][[scores.argmax()]])
            background = scored.background[expression]
            words = count_words(scored.texts[expression])
            expected = photo_features(ranked.score, background, words, ranked.colors)
            assert photos.features[row] == pytest.approx(expected, abs=1e-6)
            assert photos.labels[row] == (photo == expression)
            np.testing.assert_allclose(boxes.features[3 * row : 3 * row + 3, 0], ranked.scores)
            # The first instance of a photo is the one that its expressions describe.
            right = (ranked.order == 0) & (photo == expression)
            assert boxes.labels[3 * row : 3 * row + 3].tolist() == right.tolist()
            assert ranked.score == pytest.approx(products[ranked.order[0]], abs=1e-6)
            reordered += ranked.score < products.max()
            row += 1
    assert row == len(photos.labels) == len(plain.labels)
    assert len(boxes.labels) == len(plain_boxes.labels)
    assert reordered > 3


def test_short_expressions_alone_are_refused() -> None:
    gallery, queries = drawn(25, 0.3)
    queries = replace(queries, alike=tuple(frozenset({m, (m + 1) % 25}) for m in range(25)))
    scored = ScoreTable(gallery, queries, BACKGROUND)
    with pytest.raises(DataError, match="all 25 are of the kind 'short': add long expressions"):
        fit_calibration(scored, BACKGROUND, digest="d", about={})


def test_a_gallery_without_it_has_nothing_that_is_alike() -> None:
    gallery, queries = drawn(60, 0.3)
    alike = frozenset({0, 5, 10, 15})
    queries = replace(queries, alike=(alike, *queries.alike[1:]))
    scored = ScoreTable(gallery, queries, BACKGROUND)
    of_first = [each for each in draw_galleries(scored, seed=0) if each[0] == 0]
    sizes = [len(photos) for _, _, photos in of_first]
    assert sizes == [56, 56, 28, 28]
    for _, present, photos in of_first:
        assert (0 in photos) == present
        assert len(set(photos.tolist())) == len(photos)
        if not present:
            assert alike.isdisjoint(photos.tolist())
    assert scored.unique.tolist() == [False] + [True] * 59
    tried = dict(draw_photos(scored, seed=0))
    assert list(tried) == list(range(60))
    assert alike.isdisjoint(set(tried[0].tolist()) - {0})
    assert alike & set(tried[1].tolist())
    # What may be in all photos is tried on none of them.
    scored.alike[0] = np.arange(60)
    assert 0 not in dict(draw_photos(scored, seed=0))


def test_short_expressions_may_describe_any_instance_of_their_class(tmp_path: Path) -> None:
    dataset = draw_photo_set(tmp_path, random_scenes(0, 6))
    short = tuple(replace(each, kind="short") for each in dataset.expressions)
    found = calibration_queries(FakeEncoder(), dataset, short)
    for expression, alike, own in zip(short, found.alike, found.images.tolist(), strict=True):
        category = dataset.instances_by_id[str(expression.instance_id)].category
        photos = {each.image_id for each in dataset.instances if each.category == category}
        assert own in alike
        assert {dataset.images[place].image_id for place in alike} == photos
    assert found.texts == tuple(each.text for each in short)
    unique = calibration_queries(FakeEncoder(), dataset, dataset.expressions)
    assert all(len(each) == 1 for each in unique.alike)


def test_tie_margin_is_the_largest_with_accuracy_near_chance() -> None:
    scored = ScoreTable(*drawn(120, 0.3), BACKGROUND)
    decided = []
    for m in range(len(scored.own)):
        first, second = np.argsort(-scored.best[m], kind="stable")[:2]
        if scored.right[m, first] or scored.right[m, second]:
            margin = scored.best[m, first] - scored.best[m, second]
            decided.append((float(margin), bool(scored.right[m, first])))
    decided.sort()
    tied = [
        decided[num - 1][0]
        for num in range(20, len(decided) + 1)
        if sum(right for _, right in decided[:num]) / num < 0.6
    ]
    assert tied
    assert tie_margin(scored) == pytest.approx(max(tied), abs=1e-5)


def test_too_few_photos_or_expressions_are_refused() -> None:
    with pytest.raises(DataError, match="at least 21 photos with instances, got 20"):
        ScoreTable(*drawn(20, 0.1), BACKGROUND)
    trials = Trials(np.ones((3, 1)), np.ones(3, dtype=np.bool_), np.arange(3))
    with pytest.raises(DataError, match="all 3 trials have the same outcome"):
        fit(trials, ("a",))


def test_the_fewest_allowed_photos_can_be_calibrated_on() -> None:
    scored = ScoreTable(*drawn(21, 1.0), BACKGROUND)
    found = fit_calibration(scored, BACKGROUND, digest="d", about={})
    assert found.about["photos"] == 21


def test_expressions_about_one_half_of_the_photos_are_refused() -> None:
    gallery, queries = drawn(40, 1.0)
    even = slice(0, 40, 2)
    queries = CalibrationQueries(
        *(queries.vectors[even], queries.images[even], queries.boxes_px[even]),
        texts=queries.texts[even],
        alike=queries.alike[even],
    )
    scored = ScoreTable(gallery, queries, BACKGROUND)
    with pytest.raises(DataError, match="no trials about half of the photos: use expressions"):
        fit_calibration(scored, BACKGROUND, digest="d", about={})


def test_the_command_writes_calibration_json(
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
    assert "wrote" in CliRunner().invoke(app, [*options, "--checkpoint", str(tmp_path)]).stdout

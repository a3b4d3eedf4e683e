"""A trained model as a localizer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reir.models.interfaces import ExpressionLocalizer, FoundBoxes
from reir.models.localizers import load_localizer_spec
from reir.models.weak_rec.anchors import Anchors
from reir.models.weak_rec.checkpoint import load_weak_rec, save_weak_rec
from reir.models.weak_rec.localizer import WeakLocalizer
from reir.models.weak_rec.model import WeakRec
from reir_testing.weak.tiny import SENTENCES, make_random, noise_photos, tiny_weak_rec

PHOTOS = [*noise_photos(), *noise_photos()[:2]]
TEXTS = [SENTENCES[number] for number in (0, 1, 2, 3, 2)]
FORMS: dict[str, dict[str, Any]] = {
    "shipped": {"anchors": "candidates", "language": "phrase"},
    "published": {"anchors": "yolov3", "language": "gru", "attention": True},
}


@pytest.fixture(scope="module", params=FORMS)
def model(request: pytest.FixtureRequest) -> WeakRec:
    model = tiny_weak_rec(**FORMS[request.param])
    make_random(model)
    return model


@pytest.fixture
def localizer(model: WeakRec) -> WeakLocalizer:
    return WeakLocalizer(model, "digest")


def assert_same(found: FoundBoxes, expected: FoundBoxes) -> None:
    np.testing.assert_allclose(found.scores, expected.scores, atol=2e-3)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-3)


def test_anchors_are_returned_best_first(localizer: WeakLocalizer, model: WeakRec) -> None:
    assert isinstance(localizer, ExpressionLocalizer)
    found = localizer.localize(PHOTOS[:3], TEXTS[:3])
    anchors = model.anchors(model.source.load(PHOTOS[:3]))
    with torch.no_grad():
        scores = model.score(anchors, model.language.load(TEXTS[:3]))
    for row, each in enumerate(found):
        assert each.boxes.dtype == each.scores.dtype == np.float32
        assert each.scores.sum() == pytest.approx(1, abs=1e-5)
        assert (np.diff(each.scores) <= 0).all()
        assert ((each.boxes >= 0) & (each.boxes <= 1)).all()
        valid = anchors.valid[row]
        assert len(each.boxes) == int(valid.sum()) > 1
        best = anchors.answers()[row][scores[row].argmax()]
        np.testing.assert_allclose(each.boxes[0], best, atol=1e-5)
        np.testing.assert_allclose(
            each.scores, scores[row][valid].softmax(0).sort(descending=True).values, atol=1e-5
        )


def test_a_batch_gives_what_each_photo_gives_alone(localizer: WeakLocalizer) -> None:
    together = localizer.localize(PHOTOS, TEXTS)
    assert len(together) == len(PHOTOS)
    for photo, text, found in zip(PHOTOS, TEXTS, together, strict=True):
        (alone,) = localizer.localize([photo], [text])
        assert_same(found, alone)


def test_more_photos_than_a_batch(
    localizer: WeakLocalizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = localizer.localize(PHOTOS, TEXTS)
    monkeypatch.setattr("reir.models.weak_rec.localizer.BATCH", 2)
    for found, each in zip(localizer.localize(PHOTOS, TEXTS), expected, strict=True):
        assert_same(found, each)


def test_a_photo_with_several_sentences_is_loaded_once(
    localizer: WeakLocalizer, model: WeakRec, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [localizer.localize([PHOTOS[0]], [text])[0] for text in SENTENCES]
    load, loaded = model.source.load, list[int]()

    def counting(photos: Any) -> Any:
        loaded.append(len(photos))
        return load(photos)

    monkeypatch.setattr(model.source, "load", counting)
    found = localizer.localize([PHOTOS[0]] * len(SENTENCES), SENTENCES)
    assert loaded == [1]
    for each, alone in zip(found, expected, strict=True):
        assert_same(each, alone)
    assert len({each.scores.tobytes() for each in found}) > 1


def test_threads_do_not_disturb_each_other(localizer: WeakLocalizer) -> None:
    expected = [localizer.localize([p], [t])[0] for p, t in zip(PHOTOS, TEXTS, strict=True)]

    def again(number: int) -> FoundBoxes:
        place = number % len(PHOTOS)
        return localizer.localize([PHOTOS[place]], [TEXTS[place]])[0]

    with ThreadPoolExecutor(2) as pool:
        for number, found in enumerate(pool.map(again, range(3 * len(PHOTOS)))):
            assert_same(found, expected[number % len(PHOTOS)])


def test_nothing_to_localize_and_numbers_that_differ(localizer: WeakLocalizer) -> None:
    assert localizer.localize([], []) == []
    with pytest.raises(ValueError, match="got 2 and 1"):
        localizer.localize(PHOTOS[:2], TEXTS[:1])


def test_a_photo_without_anchors_has_no_boxes(
    localizer: WeakLocalizer, model: WeakRec, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = model.anchors

    def nothing_in_the_first(inputs: Any) -> Anchors:
        found = find(inputs)
        valid = found.valid.clone()
        valid[0] = False
        return found._replace(valid=valid)

    monkeypatch.setattr(model, "anchors", nothing_in_the_first)
    nothing, something = localizer.localize(PHOTOS[:2], TEXTS[:2])
    assert nothing.boxes.shape == (0, 4)
    assert nothing.scores.shape == (0,)
    assert len(something.boxes)


@pytest.mark.parametrize("folder", ["{}", "~"])
def test_a_spec_loads_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model = tiny_weak_rec(anchors="yolov3", language="gru")
    digest = save_weak_rec(tmp_path, model, {})
    localizer = load_localizer_spec(f"weak:{folder.format(tmp_path)}")
    assert localizer.digest == digest
    (found,) = localizer.localize(PHOTOS[:1], TEXTS[:1])
    (expected,) = WeakLocalizer(load_weak_rec(tmp_path), digest).localize(PHOTOS[:1], TEXTS[:1])
    assert_same(found, expected)

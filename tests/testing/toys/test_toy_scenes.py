"""Toys with invented names: exact boxes, one true toy per sentence, and other words than photos."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from reir.checkpoint import load_encoder
from reir.datasets.coco_classes import COCO_CLASSES
from reir.images.boxes import pairwise_iou
from reir.images.rle import decode
from reir_testing.fakes import PALETTE
from reir_testing.scenes import draw_ground, to_dataset
from reir_testing.toys.forms import EYES, FORMS, PATTERNS, draw_toy
from reir_testing.toys.scenes import MAX_TOYS, make_toy_scenes, render_toys


@pytest.mark.parametrize("form", FORMS)
def test_a_toy_touches_all_sides_of_its_box(form: str) -> None:
    pixels = draw_toy(form, "dotted", (220, 20, 20), 80)
    assert pixels.shape == (80, 80, 4)
    cover = pixels[..., 3] > 40
    assert cover[0].any()
    assert cover[-1].any()
    assert cover[:, 0].any()
    assert cover[:, -1].any()
    x, y, _ = EYES[form]
    assert 0 < x < 1
    assert 0 < y < 1


def test_forms_patterns_and_colors_look_different() -> None:
    looks = {
        draw_toy(form, pattern, PALETTE[color], 40).tobytes()
        for form in FORMS
        for pattern in PATTERNS
        for color in ("red", "blue")
    }
    assert len(looks) == 2 * len(FORMS) * len(PATTERNS)
    assert not set(FORMS) & {word for name in COCO_CLASSES for word in name.split()}


def test_scenes_are_reproducible_and_drawn_where_the_boxes_are() -> None:
    scenes = make_toy_scenes(6, 4, 200)
    assert make_toy_scenes(6, 4, 200) == scenes
    assert make_toy_scenes(6, 5, 200) != scenes
    for scene in scenes:
        assert 2 <= len(scene.shapes) <= MAX_TOYS
        changed = np.abs(render_toys(scene).astype(int) - draw_ground(scene).round()).max(-1) > 2
        inside = np.zeros_like(changed)
        for shape in scene.shapes:
            x1, y1, x2, y2 = scene.box_px(shape)
            inside[y1:y2, x1:x2] = True
            mask = decode(scene.mask(shape))
            assert not mask[~inside].any()
            # Only a toy of the color of the ground could stay unseen.
            assert changed[mask].mean() > 0.8
        assert not changed[~inside].any()


def test_a_sentence_is_true_of_one_toy_of_the_gallery() -> None:
    scenes = make_toy_scenes(40, 1, 200)
    dataset = to_dataset(scenes, per_instance=1)
    texts = Counter(each.text for each in dataset.expressions)
    assert max(texts.values()) == 1
    assert len(texts) > 0.9 * len(dataset.instances)
    words = {word for text in texts for word in text.split()}
    assert set(FORMS) <= words
    looks = Counter(
        f"the {shape.size} {shape.color} {shape.form}" for scene in scenes for shape in scene.shapes
    )
    plain = [text for text in texts if text in looks]
    assert plain
    assert all(looks[text] == 1 for text in plain)


@pytest.mark.slow
def test_the_shipped_model_finds_the_toys() -> None:
    encoder = load_encoder()
    found = []
    for scene in make_toy_scenes(12, 0):
        (instances,) = encoder.encode_images([render_toys(scene)])
        boxes = np.array([shape.box for shape in scene.shapes])
        found += pairwise_iou(boxes, instances.boxes).max(axis=1).tolist()
    assert np.mean(np.array(found) >= 0.5) > 0.9

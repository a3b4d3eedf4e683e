"""Ranks of right photos and right boxes, against a slow count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reir.datasets import ReferringDataset
from reir_testing.fakes import FakeEncoder
from reir_testing.photo_sets import draw_photo_set, random_scenes, three_photos
from reir_training.finetune.measure import Ranks, measure


def slow_hits(dataset: ReferringDataset, folder: Path, k: int) -> tuple[list[bool], list[bool]]:
    """Return for each sentence whether the right photo, and a right box, is among the first k.

    Ties count against the sentence.
    """
    from reir.images.boxes import elementwise_iou
    from reir.images.decode import read_image

    encoder = FakeEncoder()
    found = [encoder.encode_images([read_image(folder / i.file_name)])[0] for i in dataset.images]
    photo_hits, box_hits = [], []
    for text in dataset.expressions:
        vector = encoder.encode_expressions([text.text])[0]
        best, rows = {}, []
        image = dataset.images_by_id[text.image_id]
        size = np.array([image.width_px, image.height_px] * 2)
        for photo, instances in zip(dataset.images, found, strict=True):
            scores = instances.vectors @ vector
            best[photo.image_id] = scores.max(initial=-9.0)
            for score, box in zip(scores, instances.boxes, strict=True):
                fits = photo.image_id == text.image_id and text.instance_id is not None
                if fits:
                    true = dataset.instances_by_id[str(text.instance_id)].box_xyxy_px
                    fits = bool(elementwise_iou(box * size, true) >= 0.5)
                rows.append((score, fits))
        own = best.pop(text.image_id)
        photo_hits.append(own > -9 and sum(other >= own - 1e-6 for other in best.values()) < k)
        right = max((score for score, fits in rows if fits), default=None)
        wrong = [score for score, fits in rows if not fits]
        box_hits.append(right is not None and sum(s >= right - 1e-6 for s in wrong) < k)
    return photo_hits, box_hits


@pytest.mark.parametrize("seed", range(4))
def test_hits_are_those_of_a_slow_count(tmp_path: Path, seed: int) -> None:
    dataset = draw_photo_set(tmp_path, random_scenes(seed, 7))
    found = measure(FakeEncoder(), dataset, tmp_path)
    for k in (1, 5, 10):
        photo_hits, box_hits = slow_hits(dataset, tmp_path, k)
        assert found.hits()[f"photo_p{k}"].tolist() == photo_hits
        # Several fitting boxes of one photo would make the slow count of ties differ.
        assert found.hits()[f"br{k}"].tolist() == box_hits


def test_sentences_without_a_box_count_for_photos_only(tmp_path: Path) -> None:
    dataset = three_photos(tmp_path)
    first, *rest = dataset.expressions
    mixed = dataset.with_expressions([replace(first, instance_id=None), *rest])
    found, whole = (
        measure(FakeEncoder(), mixed, tmp_path),
        measure(FakeEncoder(), dataset, tmp_path),
    )
    assert found.has_box.tolist() == [False, True, True, True]
    assert found.figures()["photo_p1"] == whole.figures()["photo_p1"] == 75.0
    assert found.figures()["br1"] == pytest.approx(66.67)  # two of three
    assert np.isnan(found.hits()["br1"][0])
    bare = dataset.with_expressions(replace(e, instance_id=None) for e in dataset.expressions)
    assert "br1" not in measure(FakeEncoder(), bare, tmp_path).figures()


def test_ranks_survive_json_and_gains_are_differences(tmp_path: Path) -> None:
    import json

    before = measure(FakeEncoder(), three_photos(tmp_path), tmp_path)
    again = Ranks.from_dict(json.loads(json.dumps(before.to_dict())))
    assert again.figures() == before.figures()
    after = replace(before, photo_ranks=np.zeros(4, int), box_ranks=np.zeros(4, int))
    gains = after.gain_over(again)
    assert gains["photo_p1"].mean == pytest.approx(25.0)
    assert gains["br1"].mean == pytest.approx(25.0)
    assert gains["photo_p1"].low == 0.0
    assert all(gain.mean == 0 for gain in before.gain_over(again).values())

"""Simulated users say what their manner is to say."""

from __future__ import annotations

from pathlib import Path

import pytest

from reir.images.boxes import elementwise_iou
from reir.operations.feedback import Feedback, read_feedback
from reir.operations.feedback.records import user_of
from reir_testing.feedback.simulated_users import (
    record_feedback,
    simulate_feedback,
    users_with_hostile,
)
from reir_testing.scenes import make_scenes, to_dataset

DATASET = to_dataset(make_scenes(80, 4), per_instance=1)
URIS = {each.image_id: f"file:///photos/{each.file_name}" for each in DATASET.images}


def is_right(said: Feedback) -> bool:
    (text,) = [each for each in DATASET.expressions if each.text == said.expression]
    instance = DATASET.instances_by_id[text.instance_id or ""]
    image = DATASET.images_by_id[instance.image_id]
    true = [side / image.width_px for side in instance.box_xyxy_px]
    if said.uri != URIS[instance.image_id] or said.box is None:
        return False
    return float(elementwise_iou([said.box], [true])[0]) > 0.7


def test_honest_users_err_sometimes_and_the_hostile_one_is_never_right() -> None:
    feedback = simulate_feedback(DATASET, URIS, users_with_hostile(5), 500, seed=0)
    assert len(feedback) == 500
    assert len({(each.user, each.expression) for each in feedback}) == 500
    hostile = user_of("hostile")
    assert sum(each.user == hostile for each in feedback) == 100
    assert not any(is_right(each) for each in feedback if each.user == hostile)
    right = [is_right(each) for each in feedback if each.user != hostile]
    assert sum(right) / len(right) == pytest.approx(0.9, abs=0.05)
    assert {each.verdict for each in feedback} == {"right", "box"}
    assert feedback == simulate_feedback(DATASET, URIS, users_with_hostile(5), 500, seed=0)


def test_feedback_is_recorded_as_it_is(tmp_path: Path) -> None:
    feedback = simulate_feedback(DATASET, URIS, users_with_hostile(3), 12, seed=1)
    record_feedback(tmp_path / "log", "scenes", feedback)
    assert read_feedback(tmp_path / "log", "scenes") == feedback

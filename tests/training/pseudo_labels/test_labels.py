"""Labels of a whole data set: what is kept, what is refused, what is counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from reir.datasets import read_reircoco, write_reircoco
from reir_testing.fakes import FakeLocalizer
from reir_testing.photo_sets import draw_photo_set
from reir_training.pseudo_labels.agreement import AgreementFilter, Refusal
from reir_training.pseudo_labels.labels import label_sentences

SCENES = [
    [
        ("red", (10, 40, 50, 80), "the red one on the left"),
        ("red", (100, 40, 150, 100), "the right red one"),
    ],
    [("green", (60, 20, 90, 100), "green"), ("blue", (100, 20, 140, 60), "blue")],
    [],
]


def test_sentences_get_the_boxes_that_both_looks_find(tmp_path: Path) -> None:
    drawn = draw_photo_set(tmp_path, SCENES)
    bare = replace(
        drawn,
        instances=(),
        expressions=tuple(replace(each, instance_id=None) for each in drawn.expressions),
    )
    steps: list[tuple[int, int]] = []
    labels = label_sentences(
        bare, tmp_path, AgreementFilter(FakeLocalizer()), lambda *step: steps.append(step)
    )
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert labels.to_dict() == {
        "sentences": 4,
        "kept": 4,
        "drawn": 0,
        "refused": {str(reason): 0 for reason in Refusal},
    }
    true = {e.text: drawn.instances_by_id[str(e.instance_id)] for e in drawn.expressions}
    for text in labels.dataset.expressions:
        found = labels.dataset.instances_by_id[str(text.instance_id)]
        assert found.box_xyxy_px == pytest.approx(true[text.text].box_xyxy_px, abs=1e-4)
        assert found.image_id == true[text.text].image_id
        assert found.score is not None
        assert 0 < found.score <= 1

    write_reircoco(labels.dataset, tmp_path / "labels.json")
    again = read_reircoco(tmp_path / "labels.json")
    scores = sorted(each.score or 0 for each in again.instances)
    assert scores == pytest.approx(sorted(e.score or 0 for e in labels.dataset.instances), abs=1e-4)
    assert {image.file_name for image in again.images} == {"0.png", "1.png", "2.png"}


def test_drawn_boxes_stay_and_refused_sentences_go(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    drawn = draw_photo_set(tmp_path, SCENES)
    first, *others = drawn.expressions
    # Nothing in the second photo is orange, and the third has no instance at all.
    texts = (
        first,
        replace(others[1], instance_id=None),
        replace(others[2], instance_id=None, image_id="2.png", text="orange"),
    )
    (tmp_path / "1.png").write_bytes(b"damaged")
    labels = label_sentences(
        replace(drawn, expressions=texts), tmp_path, AgreementFilter(FakeLocalizer())
    )
    assert (labels.num_sentences, labels.num_kept, labels.num_drawn) == (3, 1, 1)
    assert dict(labels.refused) == {Refusal.UNREADABLE: 1, Refusal.NOTHING_FOUND: 1}
    assert labels.dataset.expressions == (first,)
    assert labels.dataset.instances_by_id[str(first.instance_id)].score is None
    assert "1.png: cannot be decoded" in caplog.text

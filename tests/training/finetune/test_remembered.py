"""The photos on which it is measured what a model has forgotten."""

from __future__ import annotations

from pathlib import Path

from reir.datasets import write_reircoco
from reir_testing.photo_sets import three_photos
from reir_training.finetune.remembered import built_in_set, read_remembered_set


def test_the_built_in_gallery_is_the_default() -> None:
    known = built_in_set()
    assert len(known.dataset.expressions) == 50
    assert all((known.images_dir / image.file_name).is_file() for image in known.dataset.images)


def test_annotations_of_any_format_can_take_its_place(tmp_path: Path) -> None:
    write_reircoco(three_photos(tmp_path), tmp_path / "old.json")
    known = read_remembered_set(tmp_path / "old.json", tmp_path)
    assert known.name == str(tmp_path / "old.json")
    assert len(known.dataset.expressions) == 4
    assert len(known.dataset.images) == 3

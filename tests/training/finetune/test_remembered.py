"""The photos on which it is measured what a model has forgotten."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from reir.datasets import write_reircoco
from reir_testing.photo_sets import three_photos
from reir_training.finetune.remembered import (
    RememberedSet,
    built_in_set,
    read_remembered_set,
)


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


def test_the_digest_tells_sets_apart_that_give_other_figures(tmp_path: Path) -> None:
    photos = three_photos(tmp_path)
    one = RememberedSet("old", photos, tmp_path)
    assert RememberedSet("old", three_photos(tmp_path), tmp_path).digest == one.digest
    assert replace(one, name="renamed").digest == one.digest
    fewer = photos.with_expressions(photos.expressions[1:])
    moved = replace(photos.instances[0], box_xyxy_px=(0.0, 0.0, 5.0, 5.0))
    others = (
        replace(one, dataset=fewer),
        replace(one, dataset=replace(photos, instances=(moved, *photos.instances[1:]))),
        replace(one, images_dir=tmp_path / "other"),
    )
    assert len({one.digest, *(each.digest for each in others)}) == 4

"""The built-in gallery: free photos, each attributed, and sentences with one answer each."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from reir.demo.gallery import PHOTOS, demo_dataset, demo_sentences
from reir.images.decode import read_image
from reir_testing import data_dir

FREE_LICENSES = {"CC BY 2.0": 4, "CC BY-SA 2.0": 5}
"""License -> its number in the annotations of COCO."""


def attributed() -> dict[str, str]:
    """File name -> license, from the attribution page."""
    rows = re.findall(
        r"^\| (\S+\.jpg) \| https://www\.flickr\.com/photo\.gne\?id=\d+ \| (.+) \|$",
        (PHOTOS / "ATTRIBUTION.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    return dict(rows)


def test_every_photo_is_attributed_to_a_free_license() -> None:
    found = attributed()
    assert sorted(found) == sorted(path.name for path in PHOTOS.glob("*.jpg"))
    assert set(found.values()) <= set(FREE_LICENSES)


def test_every_sentence_has_one_answer_or_none() -> None:
    sentences = demo_sentences()
    assert len({each.text for each in sentences}) == len(sentences) == 60
    assert sum(each.is_absent for each in sentences) == 10
    answers = Counter((each.photo, each.box) for each in sentences if not each.is_absent)
    assert set(answers.values()) == {1}
    for photo, box in answers:
        assert photo is not None
        assert box is not None
        assert (PHOTOS / photo).is_file()
        x1, y1, x2, y2 = box
        assert 0 <= x1 < x2 <= 1
        assert 0 <= y1 < y2 <= 1
    for path in PHOTOS.glob("*.jpg"):
        assert max(read_image(path).shape) <= 448


@pytest.mark.data
@pytest.mark.skipif(data_dir() is None, reason="needs the shared photos (REIR_DATA)")
def test_no_photo_was_used_in_training_and_licenses_are_those_of_coco() -> None:
    folder = data_dir()
    assert folder is not None
    splits = json.loads((folder / "photos/expressions.json").read_text())["splits"]
    images = json.loads((folder / "photos/instances.json").read_text())["images"]
    licenses = {each["file_name"]: (each["id"], each["license"]) for each in images}
    for name, license_name in attributed().items():
        image_id, number = licenses[name]
        assert number == FREE_LICENSES[license_name]
        assert image_id in splits["val"]
        assert image_id not in splits["train"]


def test_the_gallery_is_also_a_data_set() -> None:
    dataset = demo_dataset()
    present = [each for each in demo_sentences() if not each.is_absent]
    assert [e.text for e in dataset.expressions] == [each.text for each in present]
    assert {i.file_name for i in dataset.images} == {path.name for path in PHOTOS.glob("*.jpg")}
    for image in dataset.images[::10]:
        assert read_image(PHOTOS / image.file_name).shape[:2] == (image.height_px, image.width_px)
    for text, each in zip(dataset.expressions, present, strict=True):
        image = dataset.images_by_id[text.image_id]
        box = dataset.instances_by_id[str(text.instance_id)].box_xyxy_px
        sides = (image.width_px, image.height_px) * 2
        assert each.box == pytest.approx([a / b for a, b in zip(box, sides, strict=True)])

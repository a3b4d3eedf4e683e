"""Scenes: photos with and without annotations, and the photos that a source lists."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from reir.datasets.coco_classes import COCO_CLASSES
from reir.errors import ConfigError, DataError
from reir.models.interfaces import ClassifyingEncoder
from reir.records import FloatArray, Instances, RgbImage
from reir_ingestion.build_dataset.look_alikes import find_look_alikes
from reir_ingestion.build_dataset.photos import open_photos
from reir_ingestion.build_dataset.scenes import SceneReader
from reir_testing import FakeEncoder
from reir_testing.data_engine.drawn_photos import draw_photos


class NamingEncoder(FakeEncoder):
    """Takes the first blob of a photo for a certain dog, and the others for uncertain cats."""

    def encode_with_classes(self, images: Sequence[RgbImage]) -> list[tuple[Instances, FloatArray]]:
        found = []
        for instances in self.encode_images(images):
            scores = np.zeros((len(instances), len(COCO_CLASSES)), np.float32)
            scores[:1, COCO_CLASSES.index("dog")] = 0.9
            scores[1:, COCO_CLASSES.index("cat")] = 0.3
            found.append((instances, scores))
        return found


def test_annotated_instances_get_class_color_and_vector(tmp_path: Path) -> None:
    photos = open_photos(str(draw_photos(tmp_path / "photos"))).photos
    scene = SceneReader(FakeEncoder(), tmp_path / "work").read(photos)[0]
    assert [(each.category, each.color) for each in scene.instances] == [
        ("dog", "red"),
        ("dog", "blue"),
    ]
    assert scene.instances[0].box == pytest.approx((10 / 160, 20 / 120, 50 / 160, 60 / 120))
    assert all(each.vector is not None and each.described for each in scene.instances)
    assert scene.photo.captions == ("A drawing with number 0.",)


def test_photos_alone_get_the_candidates_of_the_model(tmp_path: Path) -> None:
    photos = open_photos(str(draw_photos(tmp_path / "photos") / "images")).photos
    assert isinstance(NamingEncoder(), ClassifyingEncoder)
    scenes = SceneReader(NamingEncoder(), tmp_path / "work").read(photos)
    named = [[(each.category, each.described) for each in scene.instances] for scene in scenes]
    assert named == [[("dog", True), ("cat", False)]] * 3 + [[("dog", True)]]


def test_photos_alone_need_an_encoder_that_names_classes(tmp_path: Path) -> None:
    photos = open_photos(str(draw_photos(tmp_path / "photos") / "images")).photos
    with pytest.raises(ConfigError, match="does not name the classes"):
        SceneReader(FakeEncoder(), tmp_path / "work").read(photos)


def test_look_alikes_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    photos = open_photos(str(draw_photos(tmp_path / "photos", num=8))).photos
    scenes = SceneReader(FakeEncoder(), tmp_path / "work").read(photos)
    groups = [0, 1, 2, 3, 0, 5, 6, 7]
    found = find_look_alikes(scenes, groups, num=3)
    assert len(found) == sum(len(scene.instances) for scene in scenes)
    for place, similar in found.items():
        own = scenes[place.scene].instances[place.instance].vector
        assert own is not None
        cosines = [
            float(own @ each.vector)
            for at, scene in enumerate(scenes)
            if groups[at] != groups[place.scene]
            for each in scene.instances
            if each.vector is not None
        ]
        assert [s.similarity for s in similar] == pytest.approx(sorted(cosines)[:-4:-1], abs=1e-5)


def test_a_file_outside_the_folder_is_refused(tmp_path: Path) -> None:
    photos = draw_photos(tmp_path / "photos")
    text = (photos / "instances.json").read_text()
    (photos / "instances.json").write_text(text.replace("001.png", "../../secret.png"))
    with pytest.raises(DataError, match="below the folder"):
        open_photos(str(photos))


def test_a_list_of_web_addresses_is_refused(tmp_path: Path) -> None:
    listed = tmp_path / "photos.csv"
    listed.write_text("uri\nfile:///photos/1.jpg\n")
    with pytest.raises(ConfigError, match="not a folder"):
        open_photos(str(listed))

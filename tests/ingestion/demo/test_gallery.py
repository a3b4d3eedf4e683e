"""The built-in gallery: one right answer a sentence, true boxes, the same photos every time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reir.images.decode import read_image
from reir_ingestion.demo.cutouts import KINDS, cut_out
from reir_ingestion.demo.gallery import HEIGHT_PX, WIDTH_PX, DemoGallery, build_demo_gallery
from reir_ingestion.demo.scenes import (
    NAMES,
    Description,
    Scene,
    Subject,
    describe,
    make_scenes,
)


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> DemoGallery:
    return build_demo_gallery(tmp_path_factory.mktemp("demo"))


def slow_matches(scenes: tuple[Scene, ...], sentence: str) -> list[tuple[int, int]]:
    """Spots that a sentence fits, judged from its words alone."""
    found = []
    for number, scene in enumerate(scenes):
        for place, subject in enumerate(scene.subjects):
            head, relation, other = sentence, "", ""
            for words in (" left of the ", " right of the ", " next to the "):
                if words in sentence:
                    (head, other), relation = sentence.split(words), words.strip()
            ground_fits = True
            for ground, words in (
                ("field", " in a green field"), ("gravel", " on gravel"), ("sand", " on sand"),
                ("bricks", " on a brick pavement"), ("sunset", " at sunset"),
            ):  # fmt: skip
                if head.endswith(words):
                    head, ground_fits = head.removesuffix(words), scene.ground == ground
            name = head.removeprefix("the ")
            full = NAMES[subject.kind, subject.color]
            kinds = {
                "left of the": [one.kind for one in scene.subjects[place + 1 :]],
                "right of the": [one.kind for one in scene.subjects[:place]],
                "next to the": [one.kind for n, one in enumerate(scene.subjects) if n != place],
            }
            neighbors = [kind.replace("cup", "coffee cup") for kind in kinds.get(relation, [])]
            if name == full and ground_fits and (not relation or other in neighbors):
                found.append((number, place))
    return found


def test_every_sentence_describes_exactly_one_subject() -> None:
    scenes = make_scenes()
    described = list(describe(scenes))
    assert len(described) >= 30
    assert len({sentence for sentence, _, _ in described}) == len(described)
    for sentence, number, place in described:
        assert slow_matches(scenes, sentence) == [(number, place)], sentence


def test_relations_of_a_description() -> None:
    scene = Scene("field", (Subject("cat"), Subject("cup"), Subject("man")))
    assert Description("cup", relation="left of", other="man").fits(scene, 1)
    assert not Description("cup", relation="left of", other="cat").fits(scene, 1)
    assert Description("cup", relation="next to", other="cat").fits(scene, 1)
    assert not Description("cup", relation="next to", other="cup").fits(scene, 1)
    assert not Description("cup", color="blue").fits(scene, 1)
    assert not Description("cup", ground="sand").fits(scene, 1)
    assert str(Description("cup", "", "right of", "cat")) == "the red coffee cup right of the cat"


def test_photos_and_boxes(gallery: DemoGallery) -> None:
    photos = sorted(gallery.photos_dir.iterdir())
    assert 35 <= len(photos) <= 60
    for photo in photos:
        assert read_image(photo).shape == (HEIGHT_PX, WIDTH_PX, 3)
    for expression in gallery.expressions:
        x1, y1, x2, y2 = expression.box_xyxy_px
        assert 0 <= x1 < x2 <= WIDTH_PX
        assert 0 <= y1 < y2 <= HEIGHT_PX
        assert (x2 - x1) * (y2 - y1) > 0.02 * WIDTH_PX * HEIGHT_PX
        assert (gallery.photos_dir / expression.file_name).exists()


@pytest.mark.parametrize(
    ("word", "channel"),
    [
        ("blue motorcycle", 2),
        ("green motorcycle", 1),
        ("red motorcycle", 0),
        ("blue coffee cup", 2),
    ],
)
def test_boxes_hold_the_color_that_the_sentence_names(
    gallery: DemoGallery, word: str, channel: int
) -> None:
    asked = [one for one in gallery.expressions if one.text.startswith(f"the {word}")]
    assert asked
    for one in asked:
        x1, y1, x2, y2 = (round(side) for side in one.box_xyxy_px)
        pixels = read_image(gallery.photos_dir / one.file_name).astype(int)
        others = [n for n in range(3) if n != channel]
        vivid = pixels[..., channel] - pixels[..., others].max(-1) > 70
        inside = vivid[y1:y2, x1:x2].mean()
        assert inside > 0.03, one.text


def test_the_annotations_agree_with_the_sentences(gallery: DemoGallery) -> None:
    content = json.loads(gallery.annotations.read_text())
    photos = {photo.name for photo in gallery.photos_dir.iterdir()}
    assert {image["file_name"] for image in content["images"]} == photos
    boxes = {one["image_id"]: one["bbox"] for one in content["annotations"]}
    asked = {
        (image["expressions"][0], image["file_name"], tuple(boxes[image["id"]]))
        for image in content["images"]
        if image["expressions"]
    }
    expected = {
        (one.text, one.file_name, (x1, y1, x2 - x1, y2 - y1))
        for one in gallery.expressions
        for x1, y1, x2, y2 in (one.box_xyxy_px,)
    }
    assert asked == expected


def test_the_gallery_depends_only_on_the_seed(gallery: DemoGallery, tmp_path: Path) -> None:
    again, other = build_demo_gallery(tmp_path / "a"), build_demo_gallery(tmp_path / "b", seed=8)
    assert again.expressions == gallery.expressions
    assert other.expressions != gallery.expressions
    for photo in gallery.photos_dir.iterdir():
        assert (again.photos_dir / photo.name).read_bytes() == photo.read_bytes()


def test_building_again_removes_photos_of_an_older_gallery(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "old.jpg").write_bytes(b"old")
    (photos / "notes.txt").write_text("kept")
    build_demo_gallery(tmp_path)
    assert not (photos / "old.jpg").exists()
    assert (photos / "notes.txt").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_cutouts_are_opaque_with_a_soft_edge(kind: str) -> None:
    cut = cut_out(kind)
    assert cut.mode == "RGBA"
    alpha = np.asarray(cut)[..., 3]
    opaque, partly = (alpha > 250).mean(), ((alpha > 5) & (alpha < 250)).mean()
    assert 0.2 < opaque < 0.95
    assert partly < 0.09, "a soft edge only, no half-seen background"
    assert alpha.max(0).min() > 0, "no empty columns: cropped to what is visible"


def test_recoloring_changes_only_the_paint() -> None:
    before, after = (np.asarray(cut_out("motorcycle", color)) for color in ("", "blue"))
    assert (before[..., 3] == after[..., 3]).all()
    changed = (np.abs(before.astype(int) - after).max(-1) > 30) & (before[..., 3] > 200)
    assert 0.05 < changed.mean() < 0.4
    red = before[changed][:, 0].mean() - before[changed][:, 2].mean()
    blue = after[changed][:, 2].mean() - after[changed][:, 0].mean()
    assert red > 60
    assert blue > 60
    grey = np.asarray(cut_out("cat", "grey").convert("RGB")).astype(int)
    assert (grey.max(-1) - grey.min(-1)).max() < 30


@pytest.mark.parametrize(("kind", "color"), [("dog", ""), ("cat", "blue"), ("cup", "purple")])
def test_unknown_kinds_and_colors_are_refused(kind: str, color: str) -> None:
    with pytest.raises(ValueError, match=r"must be one of|does not come in"):
        cut_out(kind, color)


def test_composed_photos_are_plain_jpegs(gallery: DemoGallery) -> None:
    with Image.open(gallery.photos_dir / gallery.expressions[0].file_name) as photo:
        assert (photo.format, photo.mode, photo.size) == ("JPEG", "RGB", (WIDTH_PX, HEIGHT_PX))

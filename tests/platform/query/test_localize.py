"""Expressions in one photo, and hits seen again in a crop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reir.errors import ImageError
from reir.images import rle
from reir.images.decode import canonical_uri
from reir.models.delegating_encoder import DelegatingEncoder
from reir.models.interfaces import Segment
from reir.models.masked_encoder import MaskedEncoder
from reir.query.localize import PixelLocalizer
from reir.query.presence import (
    Calibration,
)
from reir.query.search import Gallery
from reir.query.stages import RefineRequest, RefineResult
from reir.query.verify.scores import CANDIDATE_BOOST
from reir.records import FloatArray, Instances, RgbImage
from reir.store.memory import MemoryStore
from reir_testing import FakeEncoder, draw_scene
from reir_testing.evaluation.calibrations import score_calibration
from reir_testing.serving import index_elsewhere, index_photos

SCENE = draw_scene((400, 200), [("red", (20, 20, 60, 180)), ("blue", (300, 40, 340, 80))])
ENCODER = FakeEncoder()


class Sharper(FakeEncoder):
    """Sees the true box in a crop only: in a whole photo every side is 4 % of the photo off."""

    masks = True

    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        found = []
        for image, seen in zip(images, super().encode_images(images), strict=True):
            height, width = image.shape[:2]
            whole = (height, width) == SCENE.shape[:2]
            boxes = np.clip(seen.boxes + ([-0.04, -0.04, 0.04, 0.04] if whole else 0), 0, 1)
            masks = tuple(rle.encode(_inside(box, height, width)) for box in seen.boxes)
            found.append(replace(seen, boxes=boxes, masks=masks))
        return found


def _inside(box: FloatArray, height: int, width: int) -> rle.BoolMask:
    x1, y1, x2, y2 = (box * (width, height, width, height)).round().astype(int)
    mask = np.zeros((height, width), dtype=np.bool_)
    mask[y1:y2, x1:x2] = True
    return mask


def in_photo(threshold: float) -> Calibration:
    return score_calibration(ENCODER.digest, 10, -5, photo_threshold=threshold)


def refinement(path: Path, box: tuple[float, float, float, float]) -> RefineRequest:
    return RefineRequest(image_id="a", uri=canonical_uri(path), box=box)


def refine(localizer: PixelLocalizer, *requests: RefineRequest) -> list[RefineResult]:
    """Refine hits of which every photo can be read."""
    found = [each for each in localizer.refine(requests) if each]
    assert len(found) == len(requests)
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    Image.fromarray(SCENE).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_expressions_find_their_boxes() -> None:
    red, blue = PixelLocalizer(ENCODER).locate(SCENE, ["the red one", "a blue thing"], k=1)
    assert red.boxes[0].box == pytest.approx((0.05, 0.1, 0.15, 0.9))
    assert blue.boxes[0].box == pytest.approx((0.75, 0.2, 0.85, 0.4))
    assert (red.present, red.presence, red.boxes[0].presence) == (True, None, None)


def test_presence_decides_whether_it_is_there() -> None:
    localizer = PixelLocalizer(ENCODER, in_photo(0.9))
    red, purple = localizer.locate(SCENE, ["red", "purple"])
    assert red.present
    assert not purple.present
    assert purple.presence == purple.boxes[0].presence
    assert [each.score for each in red.boxes] == sorted(
        (each.score for each in red.boxes), reverse=True
    )
    (empty,) = localizer.locate(np.full((50, 50, 3), 128, np.uint8), ["red"])
    assert (empty.boxes, empty.presence, empty.present) == ((), 0.0, False)


def test_a_box_moves_half_way_to_what_the_crop_shows_and_takes_its_mask(path: Path) -> None:
    (found,) = refine(PixelLocalizer(Sharper()), refinement(path, (0.73, 0.18, 0.87, 0.42)))
    assert found.box == pytest.approx((0.74, 0.19, 0.86, 0.41), abs=1e-6)
    assert found.mask is not None
    assert found.mask.size == (200, 400)
    np.testing.assert_array_equal(rle.decode(found.mask)[40:80, 300:340], True)
    assert rle.area_px(found.mask) == 40 * 40


def test_the_old_box_stays_where_the_crop_shows_nothing_there(path: Path) -> None:
    localizer = PixelLocalizer(Sharper())
    empty, beside = (0.45, 0.5, 0.55, 0.6), (0.78, 0.1, 0.98, 0.5)
    found = refine(localizer, refinement(path, empty), refinement(path, beside))
    assert [each.box for each in found] == [empty, beside]
    assert localizer.refine([]) == []


def test_a_photo_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        PixelLocalizer(ENCODER).refine([refinement(tmp_path / "b.png", (0, 0, 1, 1))])


class Halves:
    """A segmenter whose masks are the left half of each box; it remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def segment(self, image: RgbImage, boxes: FloatArray) -> list[Segment]:
        self.asked.append(len(boxes))
        height, width = image.shape[:2]
        halves = boxes.copy()
        halves[:, 2] = (boxes[:, 0] + boxes[:, 2]) / 2
        masks = [rle.encode(_inside(box, height, width)) for box in halves]
        return [
            Segment((x1, y1, x2, y2), mask)
            for (x1, y1, x2, y2), mask in zip(halves.tolist(), masks, strict=True)
        ]


def test_a_segmenter_gives_hits_their_masks_and_remembers_them(path: Path) -> None:
    segmenter = Halves()
    localizer = PixelLocalizer(ENCODER, segmenter=segmenter)
    boxes = [(0.1, 0.2, 0.5, 0.8), (0.0, 0.0, 1.0, 1.0), (0.5, 0.5, 0.9, 0.7)]
    requests = [refinement(path, box) for box in boxes]
    found = refine(localizer, *requests)
    assert [each.box[2] for each in found] == pytest.approx([0.4, 0.75, 0.8])
    assert [rle.area_px(each.mask) for each in found if each.mask] == [9600, 40000, 3200]
    assert localizer.refine(requests[::-1]) == found[::-1]
    assert segmenter.asked == [1, 1, 1]  # the second time, they were remembered
    assert localizer.max_hits > PixelLocalizer(ENCODER).max_hits
    with pytest.raises(ImageError, match="does not exist"):
        localizer.refine([refinement(path.with_name("b.png"), boxes[0])])


def test_boxes_in_a_photo_get_masks_only_if_asked(path: Path) -> None:
    segmenter = Halves()
    localizer = PixelLocalizer(ENCODER, segmenter=segmenter)
    (plain,) = localizer.locate(SCENE, ["the red one"], k=2)
    assert [each.mask for each in plain.boxes] == [None, None]
    (masked,) = localizer.locate(SCENE, ["the red one"], k=2, masks=True)
    assert segmenter.asked == [2]
    first = masked.boxes[0]
    assert first.mask is not None
    assert first.box == pytest.approx((0.05, 0.1, 0.125, 0.9))
    assert [each.score for each in masked.boxes] == [each.score for each in plain.boxes]
    grey = np.full((50, 50, 3), 128, np.uint8)
    assert localizer.locate(grey, ["red"], masks=True)[0].boxes == ()


@pytest.mark.parametrize("segmenter", [None, Halves()])
def test_a_photo_that_cannot_be_read_costs_only_its_own_hit(
    path: Path, caplog: pytest.LogCaptureFixture, segmenter: Halves | None
) -> None:
    box = (0.73, 0.18, 0.87, 0.42)
    seen = refinement(path, box)
    lost = replace(seen, uri="tar+file:///photos.tar#a.png")
    localizer = PixelLocalizer(Sharper(), segmenter=segmenter)
    (alone,) = refine(localizer, seen)
    assert alone != RefineResult(box=box)
    assert localizer.refine([lost, seen]) == [None, alone]
    (message,) = caplog.messages
    assert "1 of 2 hits were not localized" in message


def test_an_answer_names_the_stage_if_only_one_photo_cannot_be_read(path: Path) -> None:
    store = MemoryStore()
    index_photos(store, "photos", [path])
    index_elsewhere(store, "photos", path, "tar+file:///photos.tar#a.png")
    gallery = Gallery("photos", store, FakeEncoder(), segmenter=Halves())
    plain, found = (gallery.search("the red one", localize=each) for each in (False, True))
    assert found.degraded == ("localize",)
    assert [hit.instance_id for hit in found] == [hit.instance_id for hit in plain]
    for before, hit in zip(plain, found, strict=True):
        is_here = hit.uri.startswith("file:")
        assert (hit.mask is not None, hit.box != before.box) == (is_here, is_here)


def test_a_replaced_photo_is_segmented_anew(path: Path) -> None:
    segmenter = Halves()
    localizer = PixelLocalizer(ENCODER, segmenter=segmenter)
    request = refinement(path, (0, 0, 1, 1))
    for size in ((400, 200), (200, 100)):
        Image.fromarray(draw_scene(size, [])).save(path)
        (found,) = refine(localizer, request)
        assert found.mask is not None
        assert found.mask.size == size[::-1]


class Placing(DelegatingEncoder):
    """Its vectors have one more dimension, in which "right" prefers instances on the right."""

    masks = False

    def __init__(self) -> None:
        super().__init__(FakeEncoder())

    @property
    def dim(self) -> int:
        return super().dim + 1

    @property
    def candidate_dims(self) -> int:
        return 1

    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        return [
            replace(
                each,
                vectors=np.concatenate([each.vectors, each.boxes[:, :1]], axis=1),
                image_vector=np.append(each.image_vector, np.float32(0)),
            )
            for each in self._encoder.encode_images(images)
        ]

    def encode_expressions(self, expressions: Sequence[str]) -> FloatArray:
        right = np.array([[0.2 * ("right" in text)] for text in expressions], dtype=np.float32)
        return np.concatenate([super().encode_expressions(expressions), right], axis=1)


def test_classes_and_places_count_more_in_one_photo() -> None:
    encoder = Placing()
    texts = ["the red one", "the red one on the right"]
    left, right = PixelLocalizer(encoder).locate(SCENE, texts)
    assert [each.box[0] for each in left.boxes] == pytest.approx([0.05, 0.75])
    (instances,) = encoder.encode_images([SCENE])
    products = instances.vectors @ encoder.encode_expressions(texts).T
    red, blue = np.argsort(instances.boxes[:, 0])
    # Without a wish for a place, the scores are the inner products.
    assert [each.score for each in left.boxes] == pytest.approx([*products[[red, blue], 0]])
    # The best one by its place keeps its score, and the other one loses by what it is behind.
    found = {round(each.box[0], 2): each.score for each in right.boxes}
    assert found[0.75] == pytest.approx(products[blue, 1])
    behind = CANDIDATE_BOOST * 0.2 * 0.7
    assert found[0.05] == pytest.approx(products[red, 1] - behind, abs=1e-5)
    masked = MaskedEncoder(encoder, Halves())
    assert PixelLocalizer(masked).locate(SCENE, texts)[1].boxes[0].score == pytest.approx(
        right.boxes[0].score
    )


def test_a_photo_without_instances_has_no_scores() -> None:
    (found,) = PixelLocalizer(Placing()).locate(draw_scene((60, 60), []), ["a red box"])
    assert found.boxes == ()

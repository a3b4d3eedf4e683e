"""Batches of CLARE, loaded from real files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reir.datasets.coco_classes import COCO_CLASSES
from reir.errors import ConfigError, ImageError
from reir.images.rle import encode
from reir_training.clare.data import (
    DETECTION,
    GROUNDING,
    MAX_BOXES_PER_PHOTO,
    NO_TARGET,
    ClareBatch,
    ClareData,
)
from reir_training.data.augment import Augmentation
from reir_training.data.examples import TrainExpression, TrainPhoto

PLAIN = Augmentation(short_sides=(60,), long_side=120, crop_probability=0.0, mirror_probability=0.0)
CUT = Augmentation(
    short_sides=(48, 60), long_side=120, crop_short_sides=(80,), crop_sides=(20, 40),
    crop_probability=1.0,
)  # fmt: skip
DOG, CAR = COCO_CLASSES.index("dog"), COCO_CLASSES.index("car")
COLORS = ((255, 0, 0), (0, 0, 255))


def write_photo(folder: Path, number: int, *, wide: bool) -> TrainPhoto:
    """A grey photo with a red and a blue rectangle, one left of the other."""
    width, height = (160, 80) if wide else (80, 160)
    pixels = np.full((height, width, 3), 90, np.uint8)
    boxes_px = [[4, 10, 34, 50], [44, 20, 74, 70]]
    for (x1, y1, x2, y2), color in zip(boxes_px, COLORS, strict=True):
        pixels[y1:y2, x1:x2] = color
    path = folder / f"{number}.png"
    Image.fromarray(pixels).save(path)
    return TrainPhoto(
        path=path,
        split="train",
        boxes=(np.array(boxes_px) / ([width, height] * 2)).astype(np.float32),
        categories=np.array([DOG, CAR]),
        names=("dog", "car"),
        expressions=(
            TrainExpression("the red one on the left", 0, "long"),
            TrainExpression("red left", 0, "short"),
            TrainExpression("the blue one on the right", 1, "long"),
        ),
        is_wide=wide,
    )


@pytest.fixture
def photos(tmp_path: Path) -> list[TrainPhoto]:
    return [write_photo(tmp_path, i, wide=i % 3 > 0) for i in range(12)]


def make(
    photos: list[TrainPhoto],
    how: Augmentation = PLAIN,
    texts: int = 1,
    stride_px: int | None = None,
) -> ClareData:
    return ClareData(
        photos, how, batch_size=4, texts_per_photo=texts, seed=3, mask_stride_px=stride_px
    )


def assert_targets_show_their_color(batch: ClareBatch, task: str) -> None:
    """Within every target box the photo has the color that its text stands for."""
    for box, photo, text in zip(batch.boxes, batch.box_photo, batch.box_text, strict=True):
        height, width = batch.size_px[photo].tolist()
        x1, y1, x2, y2 = (box.numpy() * ([width, height] * 2)).round().astype(int)
        part = batch.pixels[photo, :, y1:y2, x1:x2].float().mean((1, 2))
        name = batch.texts[int(text)]
        is_red = name == "dog" if task == DETECTION else "red" in name
        assert (part[0] > part[2]) == is_red
        target = int(batch.text_target[int(text)])
        assert target == NO_TARGET if task == DETECTION else batch.box_photo[target] == photo


@pytest.mark.parametrize("how", [PLAIN, CUT], ids=["plain", "cut"])
@pytest.mark.parametrize("task", [DETECTION, GROUNDING])
@pytest.mark.parametrize("texts", [1, 2])
def test_targets_follow_their_pixels(
    photos: list[TrainPhoto], how: Augmentation, task: str, texts: int
) -> None:
    data = make(photos, how, texts)
    sampler = data.sampler([task])
    for number in range(sampler.steps_per_epoch):
        batch = ClareBatch.from_arrays(data.load(sampler.step(number)))
        assert len(batch.pixels) == 4
        assert batch.pixels.dtype.is_floating_point is False
        assert_targets_show_their_color(batch, task)
        for pixels, (height, width) in zip(batch.pixels, batch.size_px.tolist(), strict=True):
            assert not pixels[:, height:].any()
            assert not pixels[:, :, width:].any()


def test_a_mirrored_view_swaps_the_words(photos: list[TrainPhoto]) -> None:
    data = make(photos, PLAIN.model_copy(update={"mirror_probability": 1.0}), texts=2)
    batch = ClareBatch.from_arrays(data.load(data.sampler([GROUNDING]).step(0)))
    assert_targets_show_their_color(batch, GROUNDING)
    assert all(("right" in text) == ("red" in text) for text in batch.texts)


def test_every_instance_is_a_target_once_per_epoch(photos: list[TrainPhoto]) -> None:
    for texts in (1, 2):
        data = make(photos, texts=texts)
        sampler = data.sampler([GROUNDING])
        keys: list[int] = []
        for number in range(sampler.steps_per_epoch):
            keys += ClareBatch.from_arrays(data.load(sampler.step(number))).instance_key.tolist()
        assert len(set(keys)) == 24
        assert len(keys) == 24


def test_all_expressions_of_an_instance_are_used(photos: list[TrainPhoto]) -> None:
    data = make(photos[:4])
    sampler = data.sampler([GROUNDING])
    texts = {t for n in range(40) for t in map(str, data.load(sampler.step(n))["texts"])}
    assert texts == {e.text for e in photos[0].expressions}


def test_additional_expressions_follow_the_first_of_each_target(photos: list[TrainPhoto]) -> None:
    data = make(photos, texts=2)
    step = data.sampler([GROUNDING]).step(0)
    one, all_of_them = (
        ClareBatch.from_arrays(data.load(step, per_instance=number)) for number in (1, 9)
    )
    num_targets = len(all_of_them.boxes)
    assert len(one.texts) == num_targets == len(one.boxes)
    assert all_of_them.text_target[:num_targets].tolist() == list(range(num_targets))
    assert all_of_them.box_text.tolist() == list(range(num_targets))
    said: dict[int, list[str]] = {}
    for text, key in zip(all_of_them.texts, all_of_them.instance_key.tolist(), strict=True):
        said.setdefault(key, []).append(text)
    for key, texts in said.items():
        photo, box = divmod(key, MAX_BOXES_PER_PHOTO)
        assert sorted(texts) == sorted(e.text for e in photos[photo].expressions if e.box == box)
    assert len(all_of_them.texts) > num_targets


def test_a_step_is_the_same_in_every_process(photos: list[TrainPhoto]) -> None:
    first, second = make(photos, CUT), make(photos, CUT)
    sampler = first.sampler([DETECTION, GROUNDING])
    whole, again = first.load(sampler.step(5)), second.load(sampler.step(5))
    for name, value in whole.items():
        np.testing.assert_array_equal(value, again[name])
    shares = [second.load(sampler.step(5, rank, 2), rank) for rank in range(2)]
    for name in ("boxes", "texts", "instance_key", "photo_key", "noise_seeds"):
        np.testing.assert_array_equal(np.concatenate([s[name] for s in shares]), whole[name])
    assert [int(share["max_targets"]) for share in shares] == [int(whole["max_targets"])] * 2
    assert len(set(whole["noise_seeds"].tolist())) == len(whole["noise_seeds"])


def test_photos_without_targets_are_not_used(photos: list[TrainPhoto]) -> None:
    bare = replace(photos[0], expressions=(), categories=np.array([-1, -1]))
    with pytest.raises(ConfigError, match="'grounding' has no samples"):
        make([bare]).sampler([GROUNDING])
    with pytest.raises(ConfigError, match="'detection' has no samples"):
        make([bare]).sampler([DETECTION])


def test_a_broken_photo_is_named(photos: list[TrainPhoto]) -> None:
    photos[0].path.write_bytes(b"nothing")
    data = make(photos[:1])
    with pytest.raises(ImageError):
        data.load(data.sampler([GROUNDING]).step(0))


# ------------------------------------------------------------------------------------------- masks


def with_masks(photo: TrainPhoto) -> TrainPhoto:
    """The red one's mask is its rectangle without a corner, painted grey; the blue one has none."""
    pixels = np.asarray(Image.open(photo.path)).copy()
    pixels[10:30, 4:19] = 90
    Image.fromarray(pixels).save(photo.path)
    red = (pixels[..., 0] > 200) & (pixels[..., 2] < 50)
    return replace(photo, masks=(encode(red), None))


@pytest.mark.parametrize("task", [DETECTION, GROUNDING])
def test_masks_follow_their_pixels(photos: list[TrainPhoto], task: str) -> None:
    data = make([with_masks(photo) for photo in photos], CUT, 2, stride_px=4)
    sampler = data.sampler([task])
    for number in range(sampler.steps_per_epoch):
        batch = ClareBatch.from_arrays(data.load(sampler.step(number)))
        assert batch.masks is not None
        assert batch.has_mask is not None
        assert batch.masks.shape[1:] == tuple(-(-side // 4) for side in batch.pixels.shape[2:])
        for target, (mask, photo) in enumerate(zip(batch.masks, batch.box_photo, strict=True)):
            name = batch.texts[int(batch.box_text[target])]
            is_red = name == "dog" if task == DETECTION else "red" in name
            assert bool(batch.has_mask[target]) == is_red
            if not is_red:
                assert not mask.any()
                continue
            seen = batch.pixels[photo, :, 2::4, 2::4]
            red = (seen[0] > 170) & (seen[2] < 50)
            rows, columns = red.shape
            assert (mask[:rows, :columns] == red).float().mean() > 0.9  # but for the edges
            box_px = (batch.boxes[target] * batch.size_px[photo].flip(0).repeat(2)).tolist()
            ys, xs = mask.nonzero(as_tuple=True)
            if len(xs):  # the box is that of the mask
                assert abs(4 * int(xs.min()) - box_px[0]) <= 4
                assert abs(4 * int(ys.max()) + 4 - box_px[3]) <= 4


def test_photos_without_masks_have_empty_masks(photos: list[TrainPhoto]) -> None:
    data = make(photos, stride_px=4)
    batch = ClareBatch.from_arrays(data.load(data.sampler([GROUNDING]).step(0)))
    assert batch.masks is not None
    assert batch.has_mask is not None
    assert not batch.masks.any()
    assert not batch.has_mask.any()
    bare = make(photos)
    assert ClareBatch.from_arrays(bare.load(bare.sampler([GROUNDING]).step(0))).masks is None


def test_a_mask_outside_of_its_box_does_not_change_the_box(photos: list[TrainPhoto]) -> None:
    elsewhere = np.zeros((160, 160), dtype=bool)
    elsewhere[-2:, -2:] = True
    odd = [replace(photo, masks=(encode(elsewhere), None)) for photo in photos]
    data = make(odd, CUT, stride_px=4)
    sampler = data.sampler([GROUNDING])
    for number in range(sampler.steps_per_epoch):
        batch = ClareBatch.from_arrays(data.load(sampler.step(number)))
        assert (batch.boxes[:, 2:] > batch.boxes[:, :2]).all()
        assert len(batch.boxes) == 4


def test_batches_are_pinned_if_there_is_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Needs no GPU: `pin_memory` is replaced by a function that records its calls."""
    pinned: list[torch.Size] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.shape)
        return tensor

    data = make([write_photo(tmp_path, 0, wide=True)] * 4)
    arrays = data.load(data.sampler([GROUNDING]).step(0))
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    ClareBatch.from_arrays(arrays)
    assert pinned == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    batch = ClareBatch.from_arrays(arrays)
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert pinned == [tensor.shape for tensor in tensors]

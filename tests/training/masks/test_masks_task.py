"""The stage `masks`: its examples, how workers divide them, what it learns, and the checkpoint."""

from __future__ import annotations

import filecmp
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reir.checkpoint import load_encoder, load_model, load_segmenter, module_digest
from reir.images import rle
from reir.models.nano.mask_head import MaskHead, MaskHeadConfig
from reir.models.nano.segmenter import NanoSegmenter
from reir_testing.tiny import save_tiny_run, tiny_batch
from reir_training.config import MaskSettings, NanoTrainConfig
from reir_training.data.examples import TrainPhoto
from reir_training.figures import PART_FIGURES
from reir_training.masks.data import MaskBatch, MaskBatchMaker, mask_examples
from reir_training.masks.task import MaskTask, edge_loss, mask_ious
from reir_training.run.schedule import Epoch

NUM_PHOTOS = 8
EPOCH = Epoch(0, "masks", 0, 1)
BOXES = np.array([[0.1, 0.2, 0.4, 0.6], [0.5, 0.3, 0.9, 0.8], [0.0, 0.0, 0.1, 0.1]], np.float32)
SIZE = (96, 128)


def ellipse(box: np.ndarray) -> np.ndarray:
    """The (H, W) pixels of the largest ellipse in a box."""
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    x1, y1, x2, y2 = box * np.array([SIZE[1], SIZE[0]] * 2)
    across, down = (columns + 0.5 - (x1 + x2) / 2), (rows + 0.5 - (y1 + y2) / 2)
    inside = (2 * across / (x2 - x1)) ** 2 + (2 * down / (y2 - y1)) ** 2 <= 1
    return np.asarray(inside)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, photos of two ellipses, and cached candidates near them."""
    root = tmp_path_factory.mktemp("masks")
    batch = tiny_batch(NUM_PHOTOS, 4)
    rng = np.random.default_rng(0)
    near = BOXES[[0, 1, 1]] + rng.normal(0, 0.02, (NUM_PHOTOS, 3, 4)).astype(np.float32)
    batch.boxes[:, :3] = torch.from_numpy(near.clip(0, 1))
    batch.boxes[:, 3] = torch.tensor([0.6, 0.85, 0.7, 0.95])  # of no instance
    batch.valid[:] = True
    save_tiny_run(root, batch, "# a model\n\n## Sources\n\nphotos\n")
    for row in range(NUM_PHOTOS):
        photo = rng.integers(0, 90, (*SIZE, 3)).astype(np.uint8)
        for box in BOXES[:2]:
            photo[ellipse(box)] = rng.integers(150, 255, 3)
        Image.fromarray(photo).save(root / f"{row}.png")
    return root


def photos_of(folder: Path) -> list[TrainPhoto]:
    """Two ellipses per photo, of which the first has a mask, and a box that nobody found."""
    return [
        TrainPhoto(
            path=folder / f"{row}.png",
            split="val" if row >= NUM_PHOTOS - 2 else "train",
            boxes=BOXES,
            categories=np.array([0, 1, 1]),
            names=("dog", "cat", "cat"),
            expressions=(),
            masks=(rle.encode(ellipse(BOXES[0])), None, None),
        )
        for row in range(NUM_PHOTOS)
    ]


def task_of(folder: Path, rank: int = 0, world_size: int = 1) -> MaskTask:
    config = NanoTrainConfig.model_validate(
        {
            "data": [{"format": "photos", "path": str(folder)}],
            "weights": str(folder),
            "optimization": {"photos_per_batch": 6, "precision": "fp32"},
            "masks": {"width": 16, "crop_px": 64},
        }
    )
    return MaskTask(
        config,
        photos_of(folder),
        cache=folder / "cache",
        init=folder / "checkpoint",
        rank=rank,
        world_size=world_size,
    )


def test_candidates_are_prompts_of_the_instance_that_they_overlap(folder: Path) -> None:
    (photo, *_) = photos_of(folder)
    first, second = mask_examples(photo, BOXES[[1, 0, 0]] + np.float32(0.01))
    assert first.mask is not None
    np.testing.assert_allclose(first.candidates, BOXES[[0, 0]] + 0.01)
    assert second.mask is None
    np.testing.assert_allclose(second.candidates, BOXES[[1]] + 0.01)
    # Without candidates, only the instance with a mask can be learned from.
    assert len(mask_examples(photo, np.zeros((0, 4), np.float32))) == 1


def test_everything_in_a_batch_fits_the_crop(folder: Path) -> None:
    task = task_of(folder)
    (batch,) = task.batches(EPOCH, 0)
    assert batch.crops.shape == (12, 64, 64, 3)
    assert batch.masked.sum() == 6
    assert batch.found[~batch.masked].all()  # a box alone is learned from what the detector found
    for crop, box, mask, masked in zip(
        batch.crops, batch.boxes, batch.masks, batch.masked, strict=True
    ):
        bright = crop.float().mean(2) > 125
        x1, y1, x2, y2 = (64 * box).round().int().tolist()
        # The ellipse fills .79 of its box, and nothing else is bright.
        assert bright[y1:y2, x1:x2].float().mean() == pytest.approx(0.785, abs=0.1)
        assert bright.sum() == pytest.approx(bright[y1:y2, x1:x2].sum(), abs=120)
        if masked:
            seen = torch.nn.functional.interpolate(mask[None, None], (64, 64))[0, 0] > 0.5
            assert (seen & bright).sum() / (seen | bright).sum() > 0.85


@pytest.mark.parametrize("scale", [0.5, 2])
def test_masks_fit_copies_of_the_photos_at_another_size(
    folder: Path, tmp_path: Path, scale: float
) -> None:
    photo, *_ = photos_of(folder)
    size_px = (int(scale * SIZE[1]), int(scale * SIZE[0]))
    Image.open(photo.path).resize(size_px).save(tmp_path / "copy.png")
    copy = replace(photo, path=tmp_path / "copy.png")
    examples = mask_examples(copy, np.zeros((0, 4), np.float32))
    maker = MaskBatchMaker([copy], [examples], MaskHeadConfig(width=16, crop_px=64), MaskSettings())
    batch = maker.batch([0], np.random.default_rng(0))
    assert batch.masked.all()
    bright = batch.crops[0].float().mean(2) > 125
    seen = torch.nn.functional.interpolate(batch.masks[None], (64, 64))[0, 0] > 0.5
    assert (seen & bright).sum() / (seen | bright).sum() > 0.8
    network = load_model(folder / "checkpoint")[0].crop_network
    head = MaskHead(MaskHeadConfig(width=16, crop_px=64), network.level_channels)
    (iou,) = mask_ious(NanoSegmenter(network, head, torch.float32), copy)
    assert 0 <= iou <= 1


def rows(batch: MaskBatch) -> list[tuple[float, ...]]:
    return sorted(tuple(round(x, 4) for x in row) for row in batch.boxes.tolist())


def test_the_batches_of_an_epoch_can_be_repeated_and_differ_between_epochs(folder: Path) -> None:
    task = task_of(folder)
    (one,), (again,) = task.batches(EPOCH, 0), task.batches(EPOCH, 0)
    assert rows(one) == rows(again)
    (later,) = task.batches(Epoch(1, "masks", 0, 2), 0)
    assert rows(one) != rows(later)


def test_workers_share_the_photos_of_a_step(folder: Path) -> None:
    parts = [next(iter(task_of(folder, rank, 2).batches(EPOCH, 0))) for rank in range(2)]
    assert [len(part.crops) for part in parts] == [6, 6]


def test_it_learns_the_ellipses(folder: Path) -> None:
    task = task_of(folder)
    figures = task.validate()
    assert (*figures,) == PART_FIGURES["masks"]
    before = figures["mask_iou"]
    optimizer = torch.optim.AdamW(task.groups(), lr=3e-3)
    for number in range(40):
        (batch,) = task.batches(Epoch(number, "masks", 0, 40), 0)
        loss, terms = task.objective(batch, "masks")
        assert set(terms) == {"pixels", "dice", "edges", "box"}
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = task.validate()["mask_iou"]
    assert after > max(before, 85)  # filling the box gives 79


def test_validation_and_checkpoint_take_the_weights_from_any_device(
    folder: Path, tmp_path: Path
) -> None:
    task = task_of(folder)
    task.objective.to("meta")
    # Weights of this device have no values, but both ask for them on the CPU.
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        task.validate()
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        module_digest(task.network)


def test_the_checkpoint_has_a_mask_head_and_the_same_model(folder: Path, tmp_path: Path) -> None:
    task = task_of(folder)
    about = {
        **task.about(),
        "stage": "masks",
        "steps": 3,
        "hours": 0.1,
        "metrics": {"mask_iou": 71.0},
        "settings": {"optimization": {"photos_per_batch": 6}},
    }
    task.save(tmp_path / "first", about)
    task._init = tmp_path / "first"  # a second mask head replaces the first one
    task.save(tmp_path / "second", about)
    found, source = tmp_path / "second", folder / "checkpoint"
    assert filecmp.cmp(found / "model.safetensors", source / "model.safetensors")
    segmenter = load_segmenter(found)
    assert segmenter is not None
    photo = np.zeros((*SIZE, 3), dtype=np.uint8)
    assert len(segmenter.segment(photo, BOXES)) == 3
    card = (found / "README.md").read_text()
    assert card.startswith("# a model\n\n## Sources\n")
    assert card.count("## Mask head") == 1
    assert "| mask_iou | 71.0 |" in card
    (instances,) = load_encoder(found, masks=True).encode_images([photo])
    assert instances.masks is not None
    assert len(instances.masks) == len(instances)


def test_edges_have_a_cross_entropy_at_both_neighbors() -> None:
    logits = torch.zeros(1, 4, 8)
    boxes = torch.tensor([[0.25, 0.25, 0.75, 0.75]])  # between positions 1 and 2, and 5 and 6
    assert edge_loss(logits, boxes).item() == pytest.approx(np.log(8))
    logits[..., [1, 2, 5, 6]] = 20
    assert edge_loss(logits, boxes).item() == pytest.approx(np.log(4), abs=1e-4)
    assert edge_loss(logits[:0], boxes[:0]).item() == 0


def test_a_step_without_masks_or_found_boxes_has_a_finite_loss(folder: Path) -> None:
    task = task_of(folder)
    (batch,) = task.batches(EPOCH, 0)
    batch.masked[:], batch.found[:] = False, False
    loss, _ = task.objective(batch, "masks")
    loss.backward()
    assert loss.item() == 0


def test_an_odd_width_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 2"):
        MaskSettings(width=9)

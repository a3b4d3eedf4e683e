"""The stage `crops`: the pixels that it sees, what it trains, and the checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reir.checkpoint import load_encoder, load_model
from reir.images.decode import read_image
from reir.models.nano.model import ClareNanoConfig
from reir_testing.tiny import save_tiny_run, tiny_batch
from reir_training.config import NanoTrainConfig
from reir_training.crops.data import CropBatch, changed_pixels, plain_pixels
from reir_training.crops.task import CropNetworkCache, CropObjective, CropTask, teacher_loss
from reir_training.data.examples import VAL, TrainExpression, TrainPhoto
from reir_training.nano.objective import NanoObjective
from reir_training.run.schedule import Epoch

NUM_PHOTOS, NUM_CANDIDATES, HELD_OUT = 10, 4, 2
CROP_PX, STRIDE_16 = 32, 3
EPOCH = Epoch(0, "crops", 0, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, photos, and their cached candidates, of which some photos have fewer."""
    root = tmp_path_factory.mktemp("crops")
    batch = tiny_batch(NUM_PHOTOS, NUM_CANDIDATES)
    batch.valid[::3, -1] = False
    save_tiny_run(root, batch, "# a model\n")
    rng = np.random.default_rng(0)
    for row in range(NUM_PHOTOS):
        photo = rng.integers(0, 255, (60, 80, 3)).astype(np.uint8)
        Image.fromarray(photo).save(root / f"{row}.png")
    return root


def photos_of(folder: Path) -> list[TrainPhoto]:
    """Photos whose first two candidates are described."""
    boxes = tiny_batch(NUM_PHOTOS, NUM_CANDIDATES).boxes.numpy()
    return [
        TrainPhoto(
            path=folder / f"{row}.png",
            split=VAL if row >= NUM_PHOTOS - HELD_OUT else "train",
            boxes=boxes[row, :2],
            categories=np.array([0, 1]),
            names=("dog", "cat"),
            expressions=(
                TrainExpression("the left dog", 0, "long"),
                TrainExpression("a cat", 1, "short"),
            ),
            captions=("a dog and a cat",),
        )
        for row in range(NUM_PHOTOS)
    ]


def task_of(folder: Path, **changes: object) -> CropTask:
    config = NanoTrainConfig.model_validate(
        {
            "data": [{"format": "photos", "path": str(folder)}],
            "weights": str(folder),
            "optimization": {"photos_per_batch": 4, "precision": "fp32", **changes},
            "crops": {"crop_px": CROP_PX},
        }
    )
    return CropTask(
        config,
        photos_of(folder),
        cache=folder / "cache",
        init=folder / "checkpoint",
        rank=0,
        world_size=1,
    )


def objective_of(task: CropTask) -> CropObjective:
    assert isinstance(task.objective, CropObjective)
    return task.objective


def test_pixels_change_at_random_but_not_their_form(folder: Path) -> None:
    photo = read_image(folder / "0.png")
    boxes = np.array([[0.1, 0.2, 0.6, 0.9], [0.5, 0.5, 0.505, 0.505]], np.float32)
    config = ClareNanoConfig(crop_px=CROP_PX)
    plain, whole = plain_pixels(photo, boxes, config)
    first, scene = changed_pixels(photo, boxes, config, np.random.default_rng(1))
    again, _ = changed_pixels(photo, boxes, config, np.random.default_rng(1))
    other, _ = changed_pixels(photo, boxes, config, np.random.default_rng(2))
    assert first.shape == plain.shape == (2, CROP_PX, CROP_PX, 3)
    assert scene.shape == whole.shape == (config.scene_px, config.scene_px, 3)
    assert first.dtype == scene.dtype == torch.uint8
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, plain)
    assert not torch.equal(scene, whole)


def test_batches_hold_the_pixels_of_all_candidates(folder: Path) -> None:
    task = task_of(folder)
    batches = list(task.batches(EPOCH, 0))
    assert len(batches) == (NUM_PHOTOS - HELD_OUT) // 4
    for batch in batches:
        assert isinstance(batch, CropBatch)
        assert batch.crops.shape == (4, NUM_CANDIDATES, CROP_PX, CROP_PX, 3)
        valid = batch.step.candidates.valid[:4]
        assert not batch.crops[~valid].any()
        assert batch.crops[valid].flatten(1).any(1).all()


def plain_batch(task: CropTask, number: int) -> CropBatch:
    """The first batch of an epoch without random changes of pixels."""
    batch = next(iter(task.batches(Epoch(number, "crops", number, 1), 0)))
    assert isinstance(batch, CropBatch)
    rows = task._maker.epoch(number, 0, 1)[0]
    for i, row in enumerate(rows):
        boxes = task._cache.boxes(row)
        photo = read_image(task._photos[row].path)
        crops, batch.scenes[i] = plain_pixels(photo, boxes, task.model.config)
        batch.crops[i, : len(crops)] = crops
    return batch


@pytest.mark.parametrize("mirrored", [False, True])
def test_unchanged_pixels_give_the_loss_of_their_cached_features(
    folder: Path, mirrored: bool
) -> None:
    task = task_of(folder)
    objective = objective_of(task).eval()
    number = next(
        n
        for n in range(20)
        if next(iter(task.batches(Epoch(n, "crops", n, 1), 0))).step.mirrored is mirrored
    )
    batch = plain_batch(task, number)
    loss, terms = objective(batch, "crops")

    network, config = task.model.crop_network, task.model.config
    task._maker._cache = CropNetworkCache(folder / "cache", task._photos, network, config)
    cached = next(iter(task.batches(Epoch(number, "crops", number, 1), 0))).step
    streams = objective.objective
    assert isinstance(streams, NanoObjective)
    expected, same = streams(cached, "clia")
    found = {name: value for name, value in terms.items() if name != "teacher"}
    assert found == pytest.approx(same, rel=1e-3, abs=1e-4)
    assert loss.item() == pytest.approx(expected.item() + terms["teacher"], rel=1e-3)
    assert terms["teacher"] > 0.1  # the features of the file are random


def test_the_teacher_loss_is_one_minus_the_correlation() -> None:
    random = torch.Generator().manual_seed(0)
    found = torch.randn(2, 3, 50, generator=random)
    valid = torch.tensor([[True, True, False], [True, False, False]])
    # A different mean and size do not matter, nor does what is not valid.
    taught = torch.where(valid[..., None], 3 * found + 1, torch.zeros(()))
    assert float(teacher_loss(found, taught, valid)) == pytest.approx(0, abs=1e-4)
    assert float(teacher_loss(found, -taught, valid)) == pytest.approx(2, abs=1e-4)
    assert float(teacher_loss(found, taught, torch.zeros_like(valid))) == 0


def test_it_trains_the_coarse_part_only_and_the_checkpoint_has_it(
    folder: Path, tmp_path: Path
) -> None:
    task = task_of(folder)
    before = {k: v.clone() for k, v in task.model.crop_network.state_dict().items()}
    optimizer = torch.optim.AdamW(task.groups())
    losses = []
    for number in range(6):
        for batch in task.batches(Epoch(number, "crops", 0, 6), 0):
            loss, terms = task.objective(batch, "crops")
            losses.append(loss.item())
            assert {"teacher", "clia", "ranking"} <= set(terms)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    found = task.validate()
    assert {"br1_50", "rec_long"} <= set(found)

    about = {**task.about(), "stage": "crops", "steps": 12, "hours": 0.1, "metrics": found}
    task.save(tmp_path / "new", about | {"settings": task._config.model_dump(mode="json")})
    card = " ".join((tmp_path / "new" / "README.md").read_text().split())
    assert "crop network (coarse part trained)" in card
    model, _ = load_model(tmp_path / "new")
    assert model.config.crop_px == CROP_PX
    after = model.crop_network
    pixels = torch.from_numpy(np.array(read_image(folder / "0.png"))).permute(2, 0, 1)[None].float()
    old = load_model(folder / "checkpoint")[0].crop_network
    # Other parts of a checkpoint read features at stride 16, so these must stay as they are.
    same, changed = old.levels(pixels), after.levels(pixels)
    torch.testing.assert_close(same[: STRIDE_16 + 1], changed[: STRIDE_16 + 1])
    assert not torch.allclose(same[-1], changed[-1])
    moved = {k for k, v in task.model.crop_network.state_dict().items() if not v.equal(before[k])}
    assert moved
    assert all(k.startswith(("blocks.", "head.")) for k in moved)
    assert load_encoder(tmp_path / "new").encode_images([read_image(folder / "0.png")])


def test_weights_of_the_crop_network_move_in_proportion_to_their_size(folder: Path) -> None:
    task = task_of(folder, crop_network_factor=2.0, learning_rate=1e-3)
    network = {id(p): p for p in task.model.crop_network.parameters()}
    rates = {
        id(p): (group["lr"], group["weight_decay"])
        for group in task.groups()
        for p in group["params"]
        if id(p) in network
    }
    assert rates
    for key, (rate, decay) in rates.items():
        size = float(network[key].detach().square().mean().sqrt())
        assert rate == pytest.approx(2e-3 * size, rel=1e-5)
        assert decay == 0


def test_the_order_of_photos_does_not_change_their_pixels(folder: Path) -> None:
    task = task_of(folder)
    seed = [0, 0, 0]
    some, others = task._batch([1, 2], seed), task._batch([2, 3], seed)
    assert torch.equal(some.crops[1], others.crops[0])
    assert torch.equal(some.scenes[1], others.scenes[0])
    assert not torch.equal(some.crops[0], others.crops[0])

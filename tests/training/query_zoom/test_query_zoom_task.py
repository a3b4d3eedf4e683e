"""The stage `query-zoom`: its looks, its examples, how workers divide them, and the checkpoint."""

from __future__ import annotations

import filecmp
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reir.checkpoint import load_encoder, load_zoom_policy
from reir.errors import CheckpointError, ConfigError
from reir.images import rle
from reir.images.boxes import elementwise_iou
from reir.models.query_zoom.frames import WHOLE
from reir.models.query_zoom.zoomer import zoomer_of
from reir_testing.tiny import save_tiny_run, tiny_batch
from reir_training.config import NanoTrainConfig
from reir_training.data.examples import TrainExpression, TrainPhoto
from reir_training.figures import PART_FIGURES
from reir_training.query_zoom.data import CONTAINED, contains
from reir_training.query_zoom.looks import ZoomMosaics, _one_per_file, build_look_cache, read_looks
from reir_training.query_zoom.task import ZoomTask, build_zoom_cache, mosaics_of
from reir_training.run.schedule import Epoch

NUM_PHOTOS = 24
BOXES = np.array([[0.1, 0.2, 0.4, 0.6], [0.5, 0.3, 0.9, 0.8]], np.float32)
EPOCH = Epoch(0, "query-zoom", 0, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and photos of two boxes."""
    root = tmp_path_factory.mktemp("zoom")
    save_tiny_run(root, tiny_batch(), "# a model\n\n## Sources\n\nphotos\n")
    rng = np.random.default_rng(0)
    for row in range(NUM_PHOTOS):
        photo = rng.integers(0, 90, (96, 128, 3)).astype(np.uint8)
        for x1, y1, x2, y2 in np.rint(BOXES * [128, 96, 128, 96]).astype(int):
            photo[y1:y2, x1:x2] = rng.integers(150, 255, 3)
        Image.fromarray(photo).save(root / f"{row}.png")
    return root


def photos_of(folder: Path) -> list[TrainPhoto]:
    return [
        TrainPhoto(
            path=folder / f"{row}.png",
            split="val" if row >= NUM_PHOTOS - 8 else "train",
            boxes=BOXES,
            categories=np.array([0, 1]),
            names=("dog", "cat"),
            expressions=(
                TrainExpression("the red dog", 0, "long"),
                TrainExpression("a cat", 1, "short"),
            ),
        )
        for row in range(NUM_PHOTOS)
    ]


def config_of(folder: Path) -> NanoTrainConfig:
    return NanoTrainConfig.model_validate(
        {
            "data": [{"format": "photos", "path": str(folder)}],
            "weights": str(folder),
            "optimization": {"photos_per_batch": 4, "precision": "fp32"},
            "query_zoom": {"num_mosaics": 1, "num_held_out": 1},
        }
    )


def task_of(folder: Path, rank: int = 0, world_size: int = 1) -> ZoomTask:
    return ZoomTask(
        config_of(folder),
        photos_of(folder),
        cache=folder / "looks",
        init=folder / "checkpoint",
        rank=rank,
        world_size=world_size,
    )


@pytest.fixture(scope="module")
def mosaics(folder: Path) -> ZoomMosaics:
    train, held_out = mosaics_of(config_of(folder), photos_of(folder))
    assert held_out is not None
    paths = {Path(photo.file_name) for m in held_out.mosaics for photo in m.photos}
    assert paths <= {photo.path for photo in photos_of(folder) if photo.split == "val"}
    return train


def test_targets_are_the_long_expressions_at_their_place_in_the_mosaic(
    mosaics: ZoomMosaics,
) -> None:
    assert {each.text for each in mosaics.targets} == {"the red dog"}
    (plan_,) = mosaics.mosaics
    assert len(mosaics.targets) == len(plan_.photos)
    size = np.array([plan_.image.width_px, plan_.image.height_px] * 2)
    frames = plan_.frames_px / size
    for target in mosaics.targets:
        inside = contains(frames.astype(np.float32), target.box)
        assert inside.sum() == 1
        (frame,) = frames[inside]
        sides = frame[2:] - frame[:2]
        expected = frame[[0, 1, 0, 1]] + BOXES[0] * np.tile(sides, 2)
        np.testing.assert_allclose(target.box, expected, atol=1e-3)


def test_looks_are_encoded_once_and_an_interrupted_run_continues(
    folder: Path, mosaics: ZoomMosaics
) -> None:
    config, photos = config_of(folder), photos_of(folder)
    seen: list[int] = []
    build_zoom_cache(
        config, photos, root=folder / "looks", init=folder / "checkpoint", on_progress=seen.append
    )
    assert seen == [1, 1]
    files = sorted((folder / "looks").glob("*/*.npz"))
    times = [path.stat().st_mtime_ns for path in files]
    assert len(files) == 2
    build_zoom_cache(config, photos, root=folder / "looks", init=folder / "checkpoint")
    assert [path.stat().st_mtime_ns for path in files] == times
    for path in files:
        looks = read_looks(path)
        np.testing.assert_array_equal(looks[0].frame, WHOLE)
        assert len({tuple(look.frame) for look in looks}) == len(looks)
    frames = mosaics.frames(0)
    for target in mosaics.targets:  # each is small, and whole in a frame of each level
        assert sum(contains(np.array(frames), target.box)) >= 3


def test_another_photo_under_the_same_name_is_encoded_again(folder: Path, tmp_path: Path) -> None:
    for row in range(NUM_PHOTOS):
        shutil.copy(folder / f"{row}.png", tmp_path)
    photos = [replace(each, expressions=()) for each in photos_of(tmp_path)]
    encoder = load_encoder(folder / "checkpoint")

    def cache() -> Path:
        return build_look_cache(tmp_path, encoder, ZoomMosaics(photos, 1, seed=0))

    before = cache()
    assert cache() == before
    (plan,) = ZoomMosaics(photos, 1, seed=0).mosaics
    path = Path(plan.photos[0].file_name)
    pixels = np.asarray(Image.open(path))
    Image.fromarray(255 - pixels).save(path)
    assert cache() != before
    Image.fromarray(pixels).save(path)
    assert cache() == before


def test_labels_say_what_is_found_and_which_frames_contain_it(folder: Path) -> None:
    task = task_of(folder)
    batch = next(task.batches(EPOCH, 0))
    num = len(batch.features)
    assert batch.found.shape == (num,)
    assert batch.contains.shape == batch.closer.shape
    assert batch.valid[:, :2].all()
    np.testing.assert_array_equal(batch.paths[:, 0], np.tile(WHOLE, (num, 1)))
    # A candidate that is the described instance lies in the frame around it.
    closer = batch.closer & batch.found[:, None]
    assert batch.contains[closer].all()
    # Behind the look at the smallest frames there is none.
    assert not batch.closer[batch.valid.all(1)].any()


def test_a_frame_contains_an_instance_up_to_a_small_part() -> None:
    box = np.array([0.4, 0.4, 0.5, 0.5], dtype=np.float32)
    edge = 0.5 - (1 - CONTAINED) * 0.1
    frames = np.array(
        [[0, 0, 1, 1], [0, 0, edge + 1e-3, 1], [0, 0, edge - 1e-3, 1], [0.6, 0, 1, 1]]
    )
    assert contains(frames.astype(np.float32), box).tolist() == [True, True, False, False]
    assert elementwise_iou(frames[3], box) == 0


def test_workers_divide_the_targets(folder: Path) -> None:
    whole = next(task_of(folder).batches(EPOCH, 0))
    parts = [next(task_of(folder, rank, 2).batches(EPOCH, 0)) for rank in range(2)]
    assert all(0 < len(part.features) < len(whole.features) for part in parts)
    again = next(task_of(folder).batches(EPOCH, 0))
    assert torch.equal(whole.features, again.features)


def test_the_policy_learns_and_its_checkpoint_loads_with_the_model_only(
    folder: Path, tmp_path: Path
) -> None:
    task = task_of(folder)
    batch = next(task.batches(EPOCH, 0))
    optimizer = torch.optim.AdamW(task.objective.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        loss, terms = task.objective(batch, "query-zoom")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert terms.keys() == {"found", "contains"}
    assert losses[-1] < 0.6 * losses[0]
    assert task.validate().keys() == {"score_p50", *PART_FIGURES["query-zoom"]}
    about = {
        "metrics": {"policy_p50": 1.0},
        "steps": 4,
        "settings": config_of(folder).model_dump(mode="json"),
    }
    task.save(tmp_path / "new", about | task.about())
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert filecmp.cmp(folder / "checkpoint" / name, tmp_path / "new" / name, shallow=False)
    assert "## Zoom policy" in (tmp_path / "new" / "README.md").read_text()
    encoder = load_encoder(tmp_path / "new")
    policy = load_zoom_policy(tmp_path / "new", encoder.digest)
    assert policy is not None
    for name, value in task.model.state_dict().items():
        assert torch.equal(value, policy.state_dict()[name])
    image = np.asarray(Image.open(folder / "0.png").resize((700, 500)))
    (search,) = zoomer_of(encoder, policy).zoom([image], ["the red dog"])
    assert 1 <= len(search.steps) <= 7
    with pytest.raises(CheckpointError, match="reir train --stage query-zoom"):
        load_zoom_policy(tmp_path / "new", "another digest")
    damaged = json.loads((tmp_path / "new" / "query_zoom.json").read_text())
    damaged["model_config"]["hidden"] = 8
    (tmp_path / "new" / "query_zoom.json").write_text(json.dumps(damaged))
    with pytest.raises(CheckpointError, match="cannot load the zoom policy"):
        load_zoom_policy(tmp_path / "new", encoder.digest)


def test_a_checkpoint_without_policy_has_none(folder: Path) -> None:
    assert load_zoom_policy(folder / "checkpoint", "any") is None


def test_too_few_photos_for_a_mosaic_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="too few for one mosaic"):
        mosaics_of(config_of(folder), photos_of(folder)[:3])


def test_mosaics_without_long_expressions_are_refused(folder: Path) -> None:
    short = [replace(each, expressions=each.expressions[1:]) for each in photos_of(folder)]
    with pytest.raises(ConfigError, match="more than the 0 long expressions in mosaics: add"):
        mosaics_of(config_of(folder), short)


def test_photos_of_two_sources_become_one(folder: Path) -> None:
    """One source describes the dogs, the other the cats, under another path to the same file."""
    photos = photos_of(folder)
    cat = TrainExpression("the green cat", 0, "long")
    same = [
        replace(
            each,
            path=folder / ".." / folder.name / each.path.name if row % 2 else each.path,
            boxes=each.boxes[1:],
            categories=each.categories[1:],
            names=each.names[1:],
            expressions=(cat,),
        )
        for row, each in enumerate(photos)
    ]
    alone, both = (ZoomMosaics(each, 2, seed=0) for each in (photos, [*photos, *same]))
    assert [m.photos for m in both.mosaics] == [m.photos for m in alone.mosaics]
    dogs = [each for each in both.targets if each.text == "the red dog"]
    cats = [each for each in both.targets if each.text == "the green cat"]
    assert len(dogs) == len(cats) == sum(len(m.photos) for m in both.mosaics)
    for dog, found in zip(dogs, alone.targets, strict=True):
        np.testing.assert_array_equal(dog.box, found.box)
    # Both lie in one copy of the photo.
    image = both.mosaics[dogs[0].mosaic].image
    apart = (BOXES[1] - BOXES[0]) * np.tile([128 / image.width_px, 96 / image.height_px], 2)
    np.testing.assert_allclose(cats[0].box - dogs[0].box, apart, atol=1e-5)


def test_the_masks_of_one_source_are_not_taken_for_those_of_all_boxes(folder: Path) -> None:
    photo = photos_of(folder)[0]
    mask = rle.encode(np.ones((96, 128), bool))
    with_masks = replace(photo, masks=(mask,) * len(photo.boxes))
    (joined,) = _one_per_file([with_masks, photo])
    assert len(joined.boxes) == len(joined.names) == 2 * len(photo.boxes)
    assert joined.masks == ()


def large_photos(folder: Path, sizes: Sequence[tuple[int, int]]) -> list[TrainPhoto]:
    """Photos of a green box on black."""
    (plain, *_) = photos_of(folder)
    for row, (width, height) in enumerate(sizes):
        pixels = np.zeros((height, width, 3), np.uint8)
        x1, y1, x2, y2 = np.rint(BOXES[0] * [width, height, width, height]).astype(int)
        pixels[y1:y2, x1:x2] = (0, 255, 0)
        Image.fromarray(pixels).save(folder / f"large_{row}.png", compress_level=1)
    return [replace(plain, path=folder / f"large_{row}.png") for row in range(len(sizes))]


def test_photos_of_any_size_fit_a_mosaic(folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("looks"))
    # Those within 750 px keep their size: 16 of them fit 3,000 x 3,000 px.
    fitted = {
        (1024, 768): (750, 562),
        (768, 1024): (562, 750),
        (4000, 3000): (750, 562),
        (640, 480): (640, 480),
    }
    sizes = [*fitted] * 4
    photos = large_photos(folder, sizes)
    for seed in range(20):
        assert len(ZoomMosaics(photos, 1, seed).mosaics) == 1
    mosaics = ZoomMosaics(photos, 1, seed=0)
    pixels, (plan_,) = mosaics.draw(0), mosaics.mosaics
    rows = {str(each.path): row for row, each in enumerate(photos)}
    for each in plan_.photos:
        size = fitted[sizes[rows[each.file_name]]]
        assert (each.width_px, each.height_px) == size
    for target in mosaics.targets:
        whole_px = np.tile([plan_.image.width_px, plan_.image.height_px], 2)
        x1, y1, x2, y2 = np.rint(target.box * whole_px).astype(int)
        inside = pixels[y1 + 3 : y2 - 3, x1 + 3 : x2 - 3]
        assert (inside == (0, 255, 0)).all()
        assert (pixels[y1 - 5, x1:x2] == 0).all()

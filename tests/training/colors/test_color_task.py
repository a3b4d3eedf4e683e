"""The stage `colors`: its examples, how workers divide them, what it learns, and the checkpoint."""

from __future__ import annotations

import filecmp
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reir.checkpoint import load_color_reader, load_model, save_checkpoint
from reir.datasets.generated_expressions import COLOR_WORDS
from reir.errors import CheckpointError, ConfigError
from reir.images.decode import read_image
from reir_testing.tiny import tiny_model, tiny_tokenizer
from reir_training.colors.data import build_color_cache, with_color_words
from reir_training.colors.task import ColorTask
from reir_training.config import NanoTrainConfig
from reir_training.data.examples import VAL, TrainExpression, TrainPhoto
from reir_training.figures import PART_FIGURES
from reir_training.run.schedule import Epoch

EPOCH = Epoch(0, "colors", 0, 1)
NUM_PHOTOS = 60
RGB = {"red": (200, 30, 30), "green": (40, 150, 40), "blue": (40, 60, 200)}
BOXES = np.array([[0.1, 0.2, 0.4, 0.8], [0.6, 0.2, 0.9, 0.8]], np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and photos of two rectangles of different colors."""
    root = tmp_path_factory.mktemp("colors")
    save_checkpoint(root / "checkpoint", tiny_model(), tiny_tokenizer(), {})
    (root / "checkpoint" / "README.md").write_text("# a model\n\n## Sources\n\nphotos\n")
    rng = np.random.default_rng(0)
    for row in range(NUM_PHOTOS):
        photo = rng.integers(100, 140, (100, 150, 3)).astype(np.uint8)
        for (x1, y1, x2, y2), color in zip(BOXES, colors_of(row), strict=True):
            part = np.s_[round(100 * y1) : round(100 * y2), round(150 * x1) : round(150 * x2)]
            photo[part] = RGB[color]
        Image.fromarray(photo).save(root / f"{row}.png")
    return root


def colors_of(row: int) -> tuple[str, str]:
    """The colors of the two rectangles of a photo."""
    names = list(RGB)
    return names[row % 3], names[(row + 1 + row // 3 % 2) % 3]


def photos_of(folder: Path) -> list[TrainPhoto]:
    """Both rectangles are described, the second one also by the first one's color."""
    photos = []
    for row in range(NUM_PHOTOS):
        first, second = colors_of(row)
        written = [(f"the {first} dog", 0), (f"a {second} car right of the {first} dog", 1)]
        photos.append(
            TrainPhoto(
                path=folder / f"{row}.png",
                split=VAL if row >= NUM_PHOTOS - 3 else "train",
                boxes=BOXES,
                categories=np.array([0, 1]),
                names=("dog", "car"),
                expressions=tuple(TrainExpression(text, box, "long") for text, box in written),
            )
        )
    plain = TrainExpression("the dog", 0, "long")
    return [*photos, TrainPhoto(**(vars(photos[0]) | {"expressions": (plain,)}))]


def task_of(folder: Path, rank: int = 0, world_size: int = 1) -> ColorTask:
    config = NanoTrainConfig.model_validate(
        {
            "data": [{"format": "photos", "path": str(folder)}],
            "weights": str(folder),
            "optimization": {"photos_per_batch": 9, "precision": "fp32"},
            "colors": {"width": 32, "dropout": 0},
        }
    )
    return ColorTask(
        config,
        photos_of(folder),
        cache=folder / "cache",
        init=folder / "checkpoint",
        rank=rank,
        world_size=world_size,
    )


def test_each_color_word_is_an_example(folder: Path) -> None:
    task = task_of(folder)
    assert task.about() == {
        "photos": 57,
        "boxes": 114,
        "expressions": 114,
        "captions": 0,
        "held_out_photos": 3,
        "color_words": 171,
    }
    assert task.steps("colors") == 19
    colors = [c for batch in task.batches(EPOCH, 0) for c in batch.colors.tolist()]
    expected = [c for row in range(57) for c in (*colors_of(row), colors_of(row)[0])]
    assert sorted(colors) == sorted(COLOR_WORDS.index(c) for c in expected)


def test_what_is_cached_is_not_computed_again(folder: Path) -> None:
    photos, init = with_color_words(photos_of(folder)), folder / "checkpoint"
    assert len(photos) == NUM_PHOTOS
    done: list[int] = []
    cache = build_color_cache(folder / "again", photos[:5], init, done.append)
    assert build_color_cache(folder / "again", photos, init, done.append) == cache
    assert done == [*range(1, 6), *range(6, NUM_PHOTOS + 1)]
    build_color_cache(folder / "again", photos, init, lambda _: pytest.fail("nothing is missing"))


def test_workers_share_the_words_of_a_step(folder: Path) -> None:
    (whole, *_) = task_of(folder).batches(EPOCH, 0)
    parts = [next(iter(task_of(folder, rank, 2).batches(EPOCH, 0))) for rank in range(2)]
    assert [len(part.colors) for part in parts] == [5, 4]
    torch.testing.assert_close(torch.cat([part.states for part in parts]), whole.states)


def test_it_learns_the_colors_and_the_checkpoint_reads_them(folder: Path, tmp_path: Path) -> None:
    task = task_of(folder)
    optimizer = torch.optim.AdamW(task.groups())
    for number in range(20):
        for batch in task.batches(Epoch(number, "colors", 0, 20), 0):
            loss, terms = task.objective(batch, "colors")
            assert set(terms) == {"color"}
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    figures = task.validate()
    assert (*figures,) == PART_FIGURES["colors"]
    assert figures["color_accuracy"] > 85

    settings = {"optimization": {"photos_per_batch": 9}}
    about = {**task.about(), "steps": 75, "hours": 0.1, "metrics": {}, "settings": settings}
    task.save(tmp_path / "new", about)
    card = (tmp_path / "new" / "README.md").read_text()
    assert "## Sources" in card
    assert "171 color words" in " ".join(card.split())
    same = ("model.safetensors", "config.json", "tokenizer.json")
    assert filecmp.cmpfiles(folder / "checkpoint", tmp_path / "new", same, shallow=False)[0] == [
        *same
    ]

    reader = load_color_reader(tmp_path / "new")
    assert reader is not None
    first, second = colors_of(0)
    written = f"a {second} car right of the {first} dog"
    (right,), (wrong,), (own, beside) = reader.read(
        read_image(folder / "0.png"),
        [(BOXES[0], f"the {first} dog"), (BOXES[0], f"the {second} dog"), (BOXES[1], written)],
    )
    assert right.likely == wrong.likely == first
    assert right.surprisal < 0.5 < 1 < wrong.surprisal
    assert (own.likely, beside.likely) == (second, first)


def test_a_color_head_belongs_to_one_text_tower(folder: Path, tmp_path: Path) -> None:
    assert load_color_reader(folder / "checkpoint") is None
    task = task_of(folder)
    settings = {"optimization": {"photos_per_batch": 9}}
    about = {**task.about(), "steps": 0, "hours": 0, "metrics": {}, "settings": settings}
    task.save(tmp_path / "new", about)
    model, tokenizer = load_model(tmp_path / "new")
    # The color head reads crop network and text tower only.
    torch.nn.init.ones_(model.text.weigh.bias)
    torch.nn.init.ones_(model.log_scale)
    save_checkpoint(tmp_path / "new", model, tokenizer, {})
    assert load_color_reader(tmp_path / "new") is not None
    torch.nn.init.ones_(model.text.tower.norm.bias)
    save_checkpoint(tmp_path / "new", model, tokenizer, {})
    with pytest.raises(CheckpointError, match="reir train --stage colors"):
        load_color_reader(tmp_path / "new")


def test_training_photos_without_color_words_are_refused(folder: Path) -> None:
    photos = photos_of(folder)
    plain = [each if each.split == VAL else replace(each, expressions=()) for each in photos]
    for unusable in (plain, []):
        with pytest.raises(ConfigError, match="no sentence about a training photo names a color"):
            with_color_words(unusable)

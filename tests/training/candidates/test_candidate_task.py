"""The stage `candidates`: its examples, what it learns, and the checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from reir.checkpoint import (
    COLOR_HEAD,
    MASK_HEAD,
    RERANKER,
    load_encoder,
    load_model,
    read_config,
)
from reir.datasets.coco_classes import COCO_CLASSES
from reir.models.nano.candidate_head import PLACE_FEATURES
from reir.models.nano.encoder import ClareNanoEncoder
from reir.query.presence import load_background
from reir_testing.tiny import save_tiny_run, tiny_batch
from reir_training.candidates.task import CandidateTask, usual_candidate
from reir_training.config import NanoModelSettings, NanoTrainConfig
from reir_training.data.examples import VAL, TrainExpression, TrainPhoto
from reir_training.figures import PART_FIGURES
from reir_training.nano.cache import FrozenCache
from reir_training.nano.initialization import freeze
from reir_training.run.schedule import Epoch

NUM_PHOTOS = 40
HELD_OUT = 8
EPOCH = Epoch(0, "candidates", 0, 1)
DOG, CAT = COCO_CLASSES.index("dog"), COCO_CLASSES.index("cat")
KINDS = (DOG, CAT, DOG, CAT)


def boxes_of(row: int) -> np.ndarray:
    """Four boxes from left to right: a dog, a cat, a dog and a cat."""
    rng = np.random.default_rng(row)
    left = np.array([0.02, 0.27, 0.52, 0.77]) + rng.uniform(0, 0.05, 4)
    top = rng.uniform(0.1, 0.6, 4)
    return np.stack([left, top, left + 0.15, top + 0.2], axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and the candidates of photos: those four, and one that nothing describes."""
    root = tmp_path_factory.mktemp("candidates")
    batch = tiny_batch(NUM_PHOTOS, 5)
    batch.valid[:] = True
    batch.class_scores[:] = 0.01
    for row in range(NUM_PHOTOS):
        batch.boxes[row, :4] = torch.from_numpy(boxes_of(row))
        batch.boxes[row, 4] = torch.tensor([0.4, 0.85, 0.5, 0.95])
        for place, kind in enumerate(KINDS):
            batch.class_scores[row, place, kind] = 0.6
    save_tiny_run(root, batch, "# a model\n\n## Sources\n\nphotos\n")
    return root


def photos_of(folder: Path) -> list[TrainPhoto]:
    """Photos in which each of the four is described."""
    texts = ("the left dog", "the left cat", "the right dog", "the right cat")
    return [
        TrainPhoto(
            path=folder / f"{row}.png",
            split=VAL if row >= NUM_PHOTOS - HELD_OUT else "train",
            boxes=boxes_of(row),
            categories=np.array(KINDS),
            names=("dog", "cat", "dog", "cat"),
            expressions=tuple(
                TrainExpression(text, box, "short" if box == 3 else "long")
                for box, text in enumerate(texts)
            ),
        )
        for row in range(NUM_PHOTOS)
    ]


def task_of(
    folder: Path, rank: int = 0, world_size: int = 1, init: Path | None = None
) -> CandidateTask:
    config = NanoTrainConfig.model_validate(
        {
            "data": [{"format": "photos", "path": str(folder)}],
            "weights": str(folder),
            "optimization": {"photos_per_batch": 16, "precision": "fp32"},
            "candidates": {
                "class_dims": 8,
                "width": 16,
                "dropout": 0,
                "generated_per_photo": 2,
            },
        }
    )
    return CandidateTask(
        config,
        photos_of(folder),
        cache=folder / "cache",
        init=init or folder / "checkpoint",
        rank=rank,
        world_size=world_size,
    )


def test_each_expression_about_a_candidate_is_an_example(folder: Path) -> None:
    task = task_of(folder)
    examples = task.examples.examples
    trained = task.examples.rows(photos_of(folder), held_out=False)
    kinds = [examples[row].kind for row in trained]
    photos = NUM_PHOTOS - HELD_OUT
    assert (kinds.count("long"), kinds.count("short")) == (3 * photos, photos)
    assert 0 < kinds.count("generated") <= 2 * photos
    held_out = task.examples.rows(photos_of(folder), held_out=True)
    assert sorted({examples[row].kind for row in held_out}) == ["long", "short"]
    assert task.about()["examples"] == len(trained)
    first = examples[0]
    assert (first.text, first.right.tolist()) == ("the left dog", [True, *[False] * 4])
    assert first.category == DOG


def test_mirrored_photos_have_swapped_sentences(folder: Path) -> None:
    task = task_of(folder)
    rows = [0] * 40  # "the left dog"
    batch = task.examples.batch(rows, np.random.default_rng(0))
    (plain,) = task.examples.batch([0]).places
    (right_dog,) = task.examples.batch([2]).texts
    mirrored = ~torch.isclose(batch.places, plain).all(2).all(1)
    assert 10 < int(mirrored.sum()) < 30
    # "the left dog" of a photo is "the right dog" of its mirror image.
    torch.testing.assert_close(batch.texts[mirrored], right_dog.expand(int(mirrored.sum()), -1))
    torch.testing.assert_close(
        batch.places[mirrored][..., 0], -plain[:, 0].expand(int(mirrored.sum()), -1)
    )
    assert batch.right.tolist() == [[True, *[False] * 4]] * 40


def test_workers_share_the_expressions_of_a_step(folder: Path) -> None:
    (whole, *_) = task_of(folder).batches(EPOCH, 0)
    parts = [next(iter(task_of(folder, rank, 2).batches(EPOCH, 0))) for rank in range(2)]
    assert [len(part) for part in parts] == [8, 8]
    torch.testing.assert_close(torch.cat([part.classes for part in parts]), whole.classes)


def test_it_learns_kinds_and_sides_and_the_checkpoint_has_it(folder: Path, tmp_path: Path) -> None:
    task = task_of(folder)
    optimizer = torch.optim.AdamW(task.groups(), lr=1e-2)
    for number in range(25):
        for batch in task.batches(Epoch(number, "candidates", 0, 25), 0):
            loss, terms = task.objective(batch, "candidates")
            assert set(terms) == {"candidate", "class"}
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    found = task.validate()
    assert (*found,) == PART_FIGURES["candidates"]
    assert found["long_p50"] > 90
    assert found["short_p50"] > 85

    settings = {"optimization": {"photos_per_batch": 16}}
    about = {**task.about(), "steps": 250, "hours": 0.1, "metrics": found, "settings": settings}
    task.save(tmp_path / "new", about)
    card = " ".join((tmp_path / "new" / "README.md").read_text().split())
    assert "## Sources" in card
    assert f"{task.about()['examples']} written and generated expressions" in card
    old, new = load_encoder(folder / "checkpoint"), load_encoder(tmp_path / "new")
    assert isinstance(old, ClareNanoEncoder)
    assert isinstance(new, ClareNanoEncoder)
    assert (old.candidate_dims, new.candidate_dims) == (0, 8 + PLACE_FEATURES)
    assert new.dim == old.dim + new.candidate_dims
    assert new.digest != old.digest
    trained_model = read_config(folder / "checkpoint")["training"]
    assert read_config(tmp_path / "new")["training"] == {**trained_model, "candidate_head": about}
    head = new.parts[0].candidate_head
    assert head is not None
    classes = torch.full((4, 80), 0.01)
    classes[range(4), KINDS] = 0.6
    described = head.describe(torch.from_numpy(boxes_of(0)), classes).numpy()
    asked = new.encode_expressions(["the right cat"])[0, -new.candidate_dims :]
    assert (described @ asked).argmax() == 3
    background = load_background(tmp_path / "new", new.digest)
    assert background.vectors.shape[2] == new.dim
    # The parts of all candidates are centered, so that no sentence scores higher everywhere.
    rows = range(NUM_PHOTOS - HELD_OUT)
    usual = usual_candidate(head, FrozenCache(folder / "cache"), rows)
    torch.testing.assert_close(usual, torch.zeros_like(usual), atol=1e-3, rtol=0)
    assert head.usual.abs().max() > 0.1


def test_parts_that_read_no_vectors_are_kept(folder: Path, tmp_path: Path) -> None:
    init = tmp_path / "init"
    shutil.copytree(folder / "checkpoint", init)
    for part in (COLOR_HEAD, MASK_HEAD, RERANKER):
        part.save(init, torch.nn.Linear(1, 1), {}, "0" * 64, {})
    task = task_of(folder, init=init)
    settings = {"optimization": {"photos_per_batch": 16}}
    about = {**task.about(), "steps": 0, "hours": 0, "metrics": {}, "settings": settings}
    task.save(tmp_path / "new", about)
    assert COLOR_HEAD.is_in(tmp_path / "new")
    assert MASK_HEAD.is_in(tmp_path / "new")
    assert not RERANKER.is_in(tmp_path / "new")


def test_a_new_head_replaces_the_old_one(folder: Path, tmp_path: Path) -> None:
    settings = {"optimization": {"photos_per_batch": 16}}
    digests: list[str] = []
    for name, init in (("one", folder / "checkpoint"), ("two", tmp_path / "one")):
        task = task_of(folder, init=init)
        torch.nn.init.constant_(task.model.to_classes.bias, len(digests))
        about = {**task.about(), "steps": 0, "hours": 0, "metrics": {}, "settings": settings}
        task.save(tmp_path / name, about)
        digests.append(load_encoder(tmp_path / name).digest)
    assert digests[0] != digests[1]
    models = [load_model(tmp_path / name)[0] for name in ("one", "two")]
    assert models[0].config == models[1].config
    for old, new in zip(models[0].visual.parameters(), models[1].visual.parameters(), strict=True):
        assert torch.equal(old, new)
    # Whoever trains the model further does not train its head.
    freeze(models[0], NanoModelSettings())
    assert models[0].candidate_head is not None
    assert not any(each.requires_grad for each in models[0].candidate_head.parameters())

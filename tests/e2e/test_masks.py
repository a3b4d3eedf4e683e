"""Masks the whole way: trained on scenes, saved, indexed, searched for, drawn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from reir.checkpoint import save_checkpoint
from reir.encoders import load_encoder_spec
from reir.images.rle import decode
from reir.models.clare.encoder import model_input, tokenize
from reir.query.search import open_gallery
from reir.store import open_store
from reir_ingestion.pipeline import IndexOptions, index
from reir_testing.scenes import Scene, make_scenes, save_scenes
from reir_testing.tiny_clare import tiny_clare_config
from reir_training.clare.data import ClareBatch
from reir_training.clare.matching import simota
from reir_training.clare.objective import PaddedTargets
from reir_training.clare.task import ClareTask
from reir_training.config import ClareSchedule, ClareTrainConfig
from reir_training.run.schedule import plan

pytestmark = pytest.mark.slow

STEPS = 110
SIDE_PX = 64


@dataclass(frozen=True)
class Trained:
    """What a short training on few scenes gave.

    Attributes:
        checkpoint: its folder.
        photos: folder of the scenes.
        scenes: in the order of the files.
        overlap: mean mask IoU of matched queries before and after.
    """

    checkpoint: Path
    photos: Path
    scenes: tuple[Scene, ...]
    overlap: tuple[float, float]


def make_task(folder: Path) -> ClareTask:
    few = ("vision_layers", "text_layers", "encoder_layers")
    own = ("vocabulary", "masks", "paper_parity")
    tiny = vars(tiny_clare_config(max_tokens=24, decoder_layers=2, **dict.fromkeys(few, 1)))
    shape = {name: value for name, value in tiny.items() if name not in own}
    plain = {"short_sides": [SIDE_PX], "long_side": SIDE_PX, "crop_probability": 0.0}
    config = ClareTrainConfig.model_validate(
        {
            "data": [{"format": "photos", "path": folder}],
            "shape": {**shape, "masks": True},
            "augmentation": plain,
            "texts_per_photo": 6,
            "denoising": False,
            "optimization": {"photos_per_batch": 4, "precision": "fp32", "steps_per_epoch": STEPS},
        }
    )
    return ClareTask("clare-base", config, init=None, rank=0, world_size=1)


@torch.no_grad()
def overlap(task: ClareTask, batch: ClareBatch) -> float:
    """Mean IoU of the masks of the last layer's matched queries with those of their targets."""
    model, slots = task.model, PaddedTargets(batch)
    targets = slots.targets()
    output = model(*model_input(batch.pixels, batch.size_px, model.config))
    texts = model.text(tokenize(task.tokenizer, batch.texts, model.config))[:, slots.text_BG]
    assigned = simota(model.scores(output.objects, texts), output.boxes, targets)[-1]
    assert output.masks is not None
    assert batch.masks is not None
    said = model.masks(output.masks.maps, output.masks.states[-1], output.boxes[-1]) > 0
    true = slots.padded(batch.masks, 0)[torch.arange(len(said))[:, None], assigned.clamp(min=0)]
    both, either = (said & true).sum((-1, -2)), (said | true).sum((-1, -2))
    return float((both / either.clamp(min=1))[assigned >= 0].mean())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("scenes")
    scenes = make_scenes(12, seed=1, side_px=SIDE_PX)
    save_scenes(folder, {"train": scenes}, scope="photo")
    task = make_task(folder)
    (epoch,) = plan(ClareSchedule(grounding_epochs=1), "grounding")
    optimizer = torch.optim.AdamW(task.objective.parameters(), lr=2e-3)
    probe = next(task.batches(epoch, 0))
    before = overlap(task, probe)
    for batch in task.batches(epoch, 0):
        loss, _ = task.objective(batch, "grounding")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.objective.parameters(), 1.0)
        optimizer.step()
    checkpoint = folder / "checkpoint"
    save_checkpoint(checkpoint, task.model, task.tokenizer, {})
    return Trained(checkpoint, folder / "images", scenes, (before, overlap(task, probe)))


def test_masks_are_learned(trained: Trained) -> None:
    """About ten seconds of training, which the other tests here use too."""
    before, after = trained.overlap
    assert before < 0.2
    assert after > before + 0.3


def test_a_search_returns_masks_that_fit_the_scene(trained: Trained, tmp_path: Path) -> None:
    spec = f"clare-masks:{trained.checkpoint}"
    store = open_store(str(tmp_path / "store"))
    try:
        encoder = load_encoder_spec(spec)
        index(trained.photos, "scenes", store, encoder, options=IndexOptions(encoder_spec=spec))
        assert store.versions("scenes")[0].spec.has_masks
        with open_gallery("scenes", store=store) as gallery:
            result = gallery.search("the red circle", k=12)
    finally:
        store.close()
    assert len(result.hits) == 12
    by_name = {scene.file_name: scene for scene in trained.scenes}
    best = []
    for hit in result.hits:
        assert hit.mask is not None
        assert hit.mask.size == (SIDE_PX, SIDE_PX)
        mask, scene = decode(hit.mask), by_name[hit.uri.rpartition("/")[2]]
        shapes = [decode(scene.mask(shape)) for shape in scene.shapes]
        best.append(max((mask & true).sum() / (mask | true).sum() for true in shapes))
    assert np.mean(best) > 0.4
    page = result.draw()
    result.save_drawing(tmp_path / "hits.png")
    assert page.size[0] > 0
    assert (tmp_path / "hits.png").stat().st_size > 0


def test_the_same_checkpoint_without_masks_is_another_version(trained: Trained) -> None:
    store = open_store("memory:")
    for spec in (f"clare-masks:{trained.checkpoint}", f"clare:{trained.checkpoint}"):
        index(trained.photos, "scenes", store, load_encoder_spec(spec))
    assert [each.spec.has_masks for each in store.versions("scenes")] == [True, False]
    assert store.versions("scenes")[1].live
    with open_gallery("scenes", store=store, checkpoint=trained.checkpoint) as gallery:
        assert {hit.mask for hit in gallery.search("the red circle").hits} == {None}

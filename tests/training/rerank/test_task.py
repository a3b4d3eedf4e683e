"""The stage `rerank`: its batches, how workers divide them, and the checkpoint."""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from reir.checkpoint import (
    COLOR_HEAD,
    MASK_HEAD,
    QUERY_ZOOM,
    load_encoder,
    load_reranker,
    weights_digest,
)
from reir.errors import ConfigError
from reir.text import swap_left_right
from reir_testing.tiny import save_tiny_run, tiny_batch
from reir_training.config import NanoTrainConfig
from reir_training.data.examples import TrainExpression, TrainPhoto
from reir_training.figures import PART_FIGURES
from reir_training.nano.cache import FrozenCache
from reir_training.rerank.task import MIRROR, NONE, OWN, RerankBatch, RerankTask
from reir_training.run.schedule import Epoch, check_stage, plan

NUM_PHOTOS, NUM_CANDIDATES, RIVALS = 16, 5, 3
EPOCH = Epoch(0, "rerank", 0, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and the cached candidates of 16 photos; every other photo has one fewer."""
    root = tmp_path_factory.mktemp("rerank")
    batch = tiny_batch(NUM_PHOTOS, NUM_CANDIDATES)
    batch.valid[::2, -1] = False
    save_tiny_run(root, batch, "# a dual stream\n")
    return root


def photos_of(folder: Path) -> list[TrainPhoto]:
    """Two boxes per photo; the last two photos are held out."""
    cache = FrozenCache(folder / "cache")
    return [
        TrainPhoto(
            path=Path(f"{row}.jpg"),
            split="val" if row >= NUM_PHOTOS - 2 else "train",
            boxes=cache.boxes(row)[:2].astype(np.float32),
            categories=np.array([0, 1]),
            names=("dog", "cat"),
            expressions=(
                TrainExpression("the red dog left of the cat", 0, "long"),
                TrainExpression("a cat in the car", 1, "long"),
                TrainExpression("right cat", 1, "short"),
            ),
        )
        for row in range(NUM_PHOTOS)
    ]


def task_of(
    folder: Path,
    rank: int = 0,
    world_size: int = 1,
    *,
    photos: Sequence[TrainPhoto] | None = None,
    init: Path | None = None,
    **settings: float,
) -> RerankTask:
    config = NanoTrainConfig.model_validate(
        {
            "data": [{"format": "photos", "path": str(folder)}],
            "weights": str(folder),
            "optimization": {"photos_per_batch": 8, "precision": "fp32"},
            "rerank": {"width": 16, "rivals": RIVALS, "held_out": 0.3, **settings},
        }
    )
    return RerankTask(
        config,
        photos_of(folder) if photos is None else photos,
        cache=folder / "cache",
        init=init or folder / "checkpoint",
        rank=rank,
        world_size=world_size,
    )


@pytest.fixture(scope="module")
def task(folder: Path) -> RerankTask:
    return task_of(folder)


def test_a_batch_has_the_own_photo_its_mirror_image_and_hard_negatives(task: RerankTask) -> None:
    expressions = {a.text: a for a in task.data.expressions if a.photo == 1}
    rows = [i for i, a in enumerate(task.data.expressions) if a.photo == 1]
    batch = task._maker.batch(rows, np.random.default_rng(0))
    here = batch.slots >= 0
    for m, row in enumerate(rows):
        asking = task.data.expressions[row]
        assert here[m, OWN]
        assert here[m, MIRROR] == (swap_left_right(asking.text) != asking.text)
        assert here[m, 2:].sum() == (RIVALS if asking.kind == "long" else 0)
    assert {a.kind for a in expressions.values()} >= {"long", "short"}


def test_overlap_marks_the_described_instance_in_both_variants(task: RerankTask) -> None:
    for variant in task.data.variants:
        for row, expression in enumerate(task.data.expressions):
            best = int(variant.overlap[row].argmax())
            assert best == expression.box  # boxes are those of the first candidates
            assert variant.overlap[row, best] > 0.9
            assert expression.photo not in variant.rivals[row]
    plain, mirrored = task.data.variants
    np.testing.assert_allclose(plain.boxes[..., 0], 1 - mirrored.boxes[..., 2], atol=1e-5)


def test_variants_contain_the_output_of_the_encoder(task: RerankTask, folder: Path) -> None:
    encoder = load_encoder(folder / "checkpoint")
    texts = [a.text for a in task.data.expressions]
    # the same batches: on CPUs with AMX what bf16 gives depends on the batch
    table = list(dict.fromkeys([*texts, *map(swap_left_right, texts)]))
    vectors = encoder.encode_expressions(table)
    np.testing.assert_allclose(task.data.texts.vectors, vectors, atol=1e-5)
    assert [table[row] for row in task.data.variants[0].texts] == texts


def test_photos_of_val_are_not_used(task: RerankTask) -> None:
    assert max(a.photo for a in task.data.expressions) < NUM_PHOTOS - 2
    assert all(w.rivals.max() < NUM_PHOTOS - 2 for w in task.data.variants)
    assert not task.held_out[-2:].any()


def test_held_out_photos_are_not_trained_on(task: RerankTask) -> None:
    assert 0 < task.held_out.sum() < NUM_PHOTOS / 2
    shown = {task.data.expressions[row].photo for row in task._rows}
    assert shown.isdisjoint(np.flatnonzero(task.held_out).tolist())
    # Not even as hard negatives, or they would be no measure of the best epoch.
    for variant in task.data.variants:
        assert set(np.flatnonzero(task.held_out)).isdisjoint(variant.rivals[task._rows].flat)
    assert {*PART_FIGURES["rerank"], "dual_br1_50"} <= task.validate().keys()


def test_an_untrained_reranker_does_not_change_the_figures(folder: Path) -> None:
    figures = task_of(folder).validate()
    for name in ("br1_50", "br5_50", "br10_50", "rec_long"):
        assert figures[name] == figures[f"dual_{name}"]


def test_batches_repeat_and_workers_share_them(folder: Path, task: RerankTask) -> None:
    first = [b.inputs.queries for b in task.batches(EPOCH, 0)]
    again = [b.inputs.queries for b in task.batches(EPOCH, 1)]
    assert len(first) == task.steps("rerank") == len(task._rows) // 8
    torch.testing.assert_close(first[1], again[0])
    shares = [list(task_of(folder, rank, 2).batches(EPOCH, 0)) for rank in range(2)]
    assert {len(share[0].slots) for share in shares} == {4}


def test_loss_falls_and_every_weight_changes(folder: Path) -> None:
    task = task_of(folder, generated_per_photo=0)
    optimizer = torch.optim.AdamW(task.groups(), lr=3e-3)
    torch.manual_seed(0)
    losses = []
    for number in range(20):
        for batch in task.batches(Epoch(number, "rerank", 0, 20), 0):
            loss, parts = task.objective(batch, "rerank")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(parts["own"])
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    without = [n for n, p in task.objective.named_parameters() if p.grad is None]
    assert without == []


def test_checkpoint_is_a_copy_of_the_dual_stream_with_a_reranker(
    folder: Path, task: RerankTask, tmp_path: Path
) -> None:
    settings = {"optimization": {"photos_per_batch": 8}}
    about = {**task.about(), "steps": 3, "metrics": {"br1_50": 1.0}, "settings": settings}
    task.save(tmp_path, about)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert filecmp.cmp(tmp_path / name, folder / "checkpoint" / name, shallow=False)
    assert load_reranker(tmp_path, weights_digest(folder / "checkpoint")) is not None
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("# a dual stream\n")
    task._init = tmp_path
    task.save(tmp_path / "again", about)
    assert (tmp_path / "again" / "README.md").read_text() == card  # one section, not two


def test_other_parts_of_the_checkpoint_are_kept(folder: Path, tmp_path: Path) -> None:
    init = shutil.copytree(folder / "checkpoint", tmp_path / "init")
    for part in (MASK_HEAD, COLOR_HEAD, QUERY_ZOOM):
        part.save(init, torch.nn.Linear(1, 1), {}, "0" * 64, {})
    (init / "presence.json").write_text("{}")
    task = task_of(folder, init=init)
    settings = {"optimization": {"photos_per_batch": 8}}
    task.save(tmp_path / "new", {**task.about(), "steps": 3, "metrics": {}, "settings": settings})
    names = [path.name for path in init.iterdir() if path.name != "README.md"]
    assert filecmp.cmpfiles(init, tmp_path / "new", names, shallow=False) == (names, [], [])


def test_the_same_texts_about_other_photos_get_their_own_hard_negatives(folder: Path) -> None:
    photos = photos_of(folder)
    edited = [photos[0], replace(photos[1], expressions=photos[1].expressions[1:]), *photos[2:]]
    before, after = (
        task_of(folder, photos=each, generated_per_photo=0).data for each in (photos, edited)
    )
    assert len(after.texts.vectors) == len(before.texts.vectors)
    gone = len(photos[0].expressions)
    for old, new in zip(before.variants, after.variants, strict=True):
        np.testing.assert_array_equal(new.rivals, np.delete(old.rivals, gone, axis=0))


def test_photos_without_expressions_are_refused(folder: Path) -> None:
    bare = [replace(each, expressions=()) for each in photos_of(folder)]
    with pytest.raises(ConfigError, match="no expression of a training photo describes"):
        task_of(folder, photos=bare, generated_per_photo=0)


def test_stage_all_does_not_include_rerank() -> None:
    config = NanoTrainConfig.model_validate(
        {"data": [{"format": "photos", "path": "."}], "weights": "."}
    )
    settings = config.optimization
    assert {e.stage for e in plan(settings, "all")} == {"grounding", "clia"}
    assert [e.stage for e in plan(settings, "rerank")] == ["rerank"] * settings.rerank_epochs


def test_rerank_requires_clare_nano_and_init() -> None:
    check_stage("clare-nano", "rerank", Path("checkpoint"))
    check_stage("clare-base", "all", None)
    with pytest.raises(ConfigError, match="requires --preset clare-nano, got 'clare-base'"):
        check_stage("clare-base", "rerank", Path("checkpoint"))
    with pytest.raises(ConfigError, match="requires --init"):
        check_stage("clare-nano", "rerank", None)


def test_a_batch_moves_to_a_device(task: RerankTask) -> None:
    batch = next(iter(task.batches(EPOCH, 0)))
    moved = batch.to("cpu")
    assert isinstance(moved, RerankBatch)
    assert torch.equal(moved.slots, batch.slots)
    assert (batch.slots == NONE).any()

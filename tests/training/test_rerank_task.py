"""The stage `rerank`: who is asked what, what workers share, what a run leaves behind."""

from __future__ import annotations

import filecmp
from pathlib import Path

import numpy as np
import pytest
import torch

from reir.checkpoint import load_encoder, load_reranker, save_checkpoint, weights_digest
from reir.errors import ConfigError
from reir.testing.tiny import tiny_batch, tiny_model, tiny_tokenizer
from reir.text import swap_left_right
from reir_training.cache import FrozenCache
from reir_training.checks import check_stage
from reir_training.config import TrainConfig
from reir_training.examples import TrainPhoto, Written
from reir_training.plan import Epoch, plan
from reir_training.rerank_task import MIRROR, NONE, OWN, RerankBatch, RerankTask

NUM_PHOTOS, NUM_CANDIDATES, RIVALS = 16, 5, 3
EPOCH = Epoch(0, "rerank", 0, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and the cached candidates of 16 photos; every other photo has one less."""
    root = tmp_path_factory.mktemp("rerank")
    save_checkpoint(root / "checkpoint", tiny_model(), tiny_tokenizer(), {})
    (root / "checkpoint" / "README.md").write_text("# a dual stream\n")
    (root / "cache").mkdir()
    batch = tiny_batch(NUM_PHOTOS, NUM_CANDIDATES)
    batch.valid[::2, -1] = False
    for name, value in batch.tensors().items():
        np.save(root / "cache" / f"{name}.npy", value.numpy())
    return root


def photos_of(folder: Path) -> list[TrainPhoto]:
    """Two boxes a photo, the last two photos held out."""
    cache = FrozenCache(folder / "cache")
    return [
        TrainPhoto(
            path=Path(f"{row}.jpg"),
            split="val" if row >= NUM_PHOTOS - 2 else "train",
            boxes=cache.boxes(row)[:2].astype(np.float32),
            categories=np.array([0, 1]),
            names=("dog", "cat"),
            expressions=(
                Written("the red dog left of the cat", 0, "long"),
                Written("a cat in the car", 1, "long"),
                Written("right cat", 1, "short"),
            ),
        )
        for row in range(NUM_PHOTOS)
    ]


def task_of(folder: Path, rank: int = 0, world_size: int = 1, **settings: float) -> RerankTask:
    config = TrainConfig.model_validate(
        {
            "data": [{"format": "photos", "path": str(folder)}],
            "weights": str(folder),
            "optimisation": {"photos_per_batch": 8, "precision": "fp32"},
            "rerank": {"width": 16, "rivals": RIVALS, "held_out": 0.3, **settings},
        }
    )
    return RerankTask(
        config,
        photos_of(folder),
        cache=folder / "cache",
        init=folder / "checkpoint",
        rank=rank,
        world_size=world_size,
    )


@pytest.fixture(scope="module")
def task(folder: Path) -> RerankTask:
    return task_of(folder)


def test_groups_hold_the_own_photo_its_mirror_image_and_rivals(task: RerankTask) -> None:
    askings = {a.text: a for a in task.data.askings if a.photo == 1}
    rows = [i for i, a in enumerate(task.data.askings) if a.photo == 1]
    batch = task._maker.batch(rows, np.random.default_rng(0))
    here = batch.slots >= 0
    for m, row in enumerate(rows):
        asking = task.data.askings[row]
        assert here[m, OWN]
        assert here[m, MIRROR] == (swap_left_right(asking.text) != asking.text)
        assert here[m, 2:].sum() == (RIVALS if asking.kind == "long" else 0)
    assert {a.kind for a in askings.values()} >= {"long", "short"}


def test_the_described_instance_is_right_in_either_world(task: RerankTask) -> None:
    for world in task.data.worlds:
        for row, asking in enumerate(task.data.askings):
            best = int(world.overlap[row].argmax())
            assert best == asking.box  # boxes are those of the first candidates
            assert world.overlap[row, best] > 0.9
            assert asking.photo not in world.rivals[row]
    plain, mirrored = task.data.worlds
    np.testing.assert_allclose(plain.boxes[..., 0], 1 - mirrored.boxes[..., 2], atol=1e-5)


def test_worlds_hold_what_the_encoder_gives(task: RerankTask, folder: Path) -> None:
    encoder = load_encoder(folder / "checkpoint")
    texts = [a.text for a in task.data.askings]
    # the same batches: on CPUs with AMX what bf16 gives depends on the batch
    table = list(dict.fromkeys([*texts, *map(swap_left_right, texts)]))
    vectors = encoder.encode_expressions(table)
    np.testing.assert_allclose(task.data.texts.vectors, vectors, atol=1e-5)
    assert [table[row] for row in task.data.worlds[0].texts] == texts


def test_photos_of_val_are_neither_asked_nor_rivals(task: RerankTask) -> None:
    assert max(a.photo for a in task.data.askings) < NUM_PHOTOS - 2
    assert all(w.rivals.max() < NUM_PHOTOS - 2 for w in task.data.worlds)
    assert not task.held_out[-2:].any()


def test_held_out_photos_are_not_trained_on(task: RerankTask) -> None:
    assert 0 < task.held_out.sum() < NUM_PHOTOS / 2
    shown = {task.data.askings[row].photo for row in task._rows}
    assert shown.isdisjoint(np.flatnonzero(task.held_out).tolist())
    assert {"br1_50", "rec_long", "dual_br1_50"} <= task.validate().keys()


def test_an_untrained_reranker_changes_no_figure(folder: Path) -> None:
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


def test_loss_falls_and_every_weight_learns(folder: Path) -> None:
    task = task_of(folder, generated_per_photo=0)
    optimiser = torch.optim.AdamW(task.groups(), lr=3e-3)
    torch.manual_seed(0)
    losses = []
    for number in range(20):
        for batch in task.batches(Epoch(number, "rerank", 0, 20), 0):
            loss, parts = task.objective(batch, "rerank")
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(parts["own"])
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    without = [n for n, p in task.objective.named_parameters() if p.grad is None]
    assert without == []


def test_checkpoint_is_the_dual_streams_with_a_reranker(
    folder: Path, task: RerankTask, tmp_path: Path
) -> None:
    settings = {"optimisation": {"photos_per_batch": 8}}
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


def test_the_stage_stands_by_itself() -> None:
    config = TrainConfig.model_validate(
        {"data": [{"format": "photos", "path": "."}], "weights": "."}
    )
    settings = config.optimisation
    assert {e.stage for e in plan(settings, "all")} == {"grounding", "clia"}
    assert [e.stage for e in plan(settings, "rerank")] == ["rerank"] * settings.rerank_epochs


def test_needs_a_dual_stream_that_can_be_reranked() -> None:
    check_stage("clare-nano", "rerank", Path("checkpoint"))
    check_stage("clare-base", "all", None)
    with pytest.raises(ConfigError, match="is for clare-nano, not for 'clare-base'"):
        check_stage("clare-base", "rerank", Path("checkpoint"))
    with pytest.raises(ConfigError, match="needs --init"):
        check_stage("clare-nano", "rerank", None)


def test_batch_moves_as_a_whole(task: RerankTask) -> None:
    batch = next(iter(task.batches(EPOCH, 0)))
    moved = batch.to("cpu")
    assert isinstance(moved, RerankBatch)
    assert torch.equal(moved.slots, batch.slots)
    assert (batch.slots == NONE).any()

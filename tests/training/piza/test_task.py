"""The training task of PIZA, on a tiny random base and large scenes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from reir.errors import ConfigError
from reir.models.localizers import load_localizer_spec
from reir.models.piza.checkpoint import load_piza
from reir_testing.training.tiny import tiny_piza_settings
from reir_training.config import PizaTrainConfig
from reir_training.piza.data import PizaBatch
from reir_training.piza.task import PizaTask
from reir_training.run.schedule import Epoch, check_stage

EPOCH = Epoch(0, "grounding", 0, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("piza")


def make(folder: Path, cache: Path | None = None, **changes: Any) -> PizaTask:
    settings = tiny_piza_settings(folder) | changes
    return PizaTask(PizaTrainConfig.model_validate(settings), rank=0, world_size=1, cache=cache)


def first_batch(task: PizaTask) -> PizaBatch:
    return next(iter(task.batches(EPOCH, 0)))


@pytest.mark.parametrize("method", ["piza-adapter", "piza-lora", "piza-coop", "adapter", "full"])
def test_a_step_changes_exactly_what_the_method_trains(folder: Path, method: str) -> None:
    task = make(folder, method=method, prompt_tokens=2)
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    optimizer = torch.optim.AdamW(task.groups())
    task.objective.train()

    for batch in list(task.batches(EPOCH, 0))[:2]:
        loss, terms = task.objective(batch, "grounding")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    assert torch.isfinite(loss)
    assert float(loss.detach()) == pytest.approx(sum(terms.values()), rel=1e-4)
    trainable = {name for name, _ in task.model.trainable()}
    changed = {
        name for name, p in task.model.named_parameters() if not torch.equal(p, before[name])
    }
    assert changed <= trainable
    # A few weights have no gradient: those of a shape that the base computes, but does not use.
    assert len(changed) > 0.8 * len(trainable)
    assert not any(name.startswith("history") for name in changed)


def test_the_image_backbone_learns_slowly(folder: Path) -> None:
    task = make(folder, method="full")
    slow, fast = task.groups()
    names = {id(p): name for name, p in task.model.named_parameters()}
    assert slow["lr"] == pytest.approx(fast["lr"] / 10)
    assert all("backbone" in names[id(p)] for p in slow["params"])
    assert not any(".backbone." in names[id(p)] for p in fast["params"])
    assert len(slow["params"]) + len(fast["params"]) == len(list(task.model.trainable()))


def test_methods_without_zoom_learn_the_box_in_the_whole_photo(folder: Path) -> None:
    batch = first_batch(make(folder, method="adapter"))
    assert batch.histories.shape[1] == 1
    assert (batch.boxes[:, 2:] - batch.boxes[:, :2]).max() < 0.1
    batch = first_batch(make(folder, method="piza-adapter"))
    assert (batch.boxes[:, 2:] - batch.boxes[:, :2]).max() > 0.1


def test_padding_is_masked(folder: Path) -> None:
    task = make(folder)
    batch = first_batch(task)
    seen: dict[str, torch.Tensor] = {}

    def spy(_: Any, inputs: tuple[Any, ...]) -> None:
        seen["pixels"], seen["mask"] = inputs[:2]

    task.model.register_forward_pre_hook(spy)
    task.objective(batch, "grounding")
    for pixels, mask, (height, width) in zip(
        seen["pixels"], seen["mask"], batch.size_px.tolist(), strict=True
    ):
        assert mask.sum() == height * width
        assert not pixels[:, height:].any()
        assert not pixels[:, :, width:].any()
        assert pixels[:, :height, :width].std() > 0.1


def test_boxes_are_relative_to_the_picture_without_its_padding(folder: Path) -> None:
    task = make(folder)
    task.objective.eval()
    outputs: list[Any] = []
    task.model.register_forward_hook(lambda *call: outputs.append(call[-1]))
    batch, side = first_batch(task), 64
    alone = replace(
        batch, pixels=batch.pixels[..., :side, :side], size_px=torch.full_like(batch.size_px, side)
    )
    padded = replace(alone, pixels=functional.pad(alone.pixels, (0, side, 0, side)))

    # Without what its head adds, each proposal is where the model places it. Those of the padding
    # and of the edges have no place.
    head = task.model.base.model.encoder_output_bbox_embed.layers[-1]
    kept = {name: value.clone() for name, value in head.state_dict().items()}
    for parameter in head.parameters():
        parameter.data.zero_()
    for each in (alone, padded):
        task.objective(each, "grounding")
    places = [output.enc_outputs_coord_logits[0].sigmoid() for output in outputs]
    expected, found = (each[(each < 1).all(-1)] for each in places)
    torch.testing.assert_close(found, expected)
    assert found[:, :2].max() > 0.9
    head.load_state_dict(kept)

    # The box that the model itself finds is learned without an error.
    task.objective(padded, "grounding")
    best_B = outputs[-1].logits.sigmoid().sum(-1).argmax(1)
    center, size = outputs[-1].pred_boxes[torch.arange(len(best_B)), best_B].detach().split(2, -1)
    boxes = torch.cat([center - size / 2, center + size / 2], dim=-1)
    _, terms = task.objective(replace(padded, boxes=boxes), "grounding")
    assert terms["l1"] == pytest.approx(0, abs=1e-5)
    assert terms["giou"] == pytest.approx(0, abs=1e-5)


def test_a_history_encoder_is_trained_once_for_all_workers(folder: Path, tmp_path: Path) -> None:
    one, other = make(folder, tmp_path), make(folder, tmp_path)
    (file,) = tmp_path.glob("history-*.safetensors")
    assert one.model.history is not None
    assert other.model.history is not None
    for name, value in one.model.history.state_dict().items():
        assert torch.equal(value, other.model.history.state_dict()[name])
    # Another training of it has a file of its own.
    make(folder, tmp_path, history={"steps": 2, "batch": 4})
    assert len(list(tmp_path.glob("history-*.safetensors"))) == 2
    assert file.exists()


def test_a_checkpoint_has_the_adapters_and_finds_the_same(folder: Path, tmp_path: Path) -> None:
    task = make(folder)
    with torch.no_grad():
        for _, parameter in task.model.trainable():
            parameter.add_(0.02 * torch.randn_like(parameter))
    figures = task.validate()
    assert set(figures) == {"macc", "acc50", "acc75"}
    task.save(tmp_path / "checkpoint", {**task.about(), "metrics": figures})

    assert sum(file.stat().st_size for file in (tmp_path / "checkpoint").iterdir()) < 2e6
    batch, model = first_batch(task), load_piza(tmp_path / "checkpoint")
    expected, _ = task.objective.eval()(batch, "grounding")
    task.objective.model = model
    found, _ = task.objective(batch, "grounding")
    torch.testing.assert_close(found, expected)
    assert load_localizer_spec(f"piza:{tmp_path / 'checkpoint'}").digest


def test_validation_runs_on_the_device_of_the_weights(folder: Path) -> None:
    task = make(folder)
    seen: set[str] = set()

    def spy(_: Any, inputs: tuple[Any, ...]) -> None:
        seen.update(each.device.type for each in inputs if each is not None)

    task.model.register_forward_pre_hook(spy)
    task.objective.to("meta")
    # Tensors of this device have no values, so that the model cannot finish.
    with pytest.raises(RuntimeError, match="meta"):
        task.validate()
    assert seen == {"meta"}


def test_other_stages_and_starts_are_refused() -> None:
    check_stage("piza", "all", None)
    check_stage("piza", "grounding", None)
    with pytest.raises(ConfigError, match="single stage, grounding: remove --stage clia"):
        check_stage("piza", "clia", None)
    with pytest.raises(ConfigError, match="remove --init runs/a"):
        check_stage("piza", "all", Path("runs/a"))


def test_unknown_settings_and_figures_are_refused(folder: Path) -> None:
    settings = tiny_piza_settings(folder)
    for key, value, message in (
        ("method", "piza", "piza-adapter"),
        ("best_by", "br1_50", "macc, acc50, acc75"),
        ("history", {"step": 3}, "step"),
    ):
        with pytest.raises(ValueError, match=message):
            PizaTrainConfig.model_validate(settings | {key: value})
    with pytest.raises(ConfigError, match="inserted"):
        make(folder, method="adapter", inserted="summary")

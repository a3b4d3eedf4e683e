"""Checkpoints that contain adapters only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from reir.errors import CheckpointError
from reir.models.piza.checkpoint import CONFIG, WEIGHTS, load_piza, save_piza, weights_digest
from reir.models.piza.config import METHODS, Method, PizaConfig
from reir.models.piza.history import HistoryConfig
from reir.models.piza.model import PizaModel, add_adapters
from reir.models.piza.parameters import count_parameters
from reir_testing.pretrained import save_tiny_grounding_dino

HISTORY = HistoryConfig(width=16, num_heads=2, feedforward=32)


def trained(base: Any, method: Method) -> PizaModel:
    """Return a model all of whose trained weights, and history encoder, differ from new ones."""
    config = PizaConfig(method=method, rank=4, prompt_tokens=3, history=HISTORY)
    model = add_adapters(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or name.startswith("history."):
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture
def saved(base: Any, tmp_path: Path) -> Path:
    save_piza(tmp_path / "adapters", trained(base, "piza-adapter"), {})
    return tmp_path / "adapters"


@pytest.mark.parametrize("method", METHODS)
def test_loaded_model_equals_the_saved_one(
    base: Any, inputs: Any, tmp_path: Path, method: Method
) -> None:
    model = trained(base, method)
    digest = save_piza(tmp_path, model, {"steps": 12})
    loaded = load_piza(tmp_path)

    assert digest == weights_digest(tmp_path)
    assert loaded.config == model.config
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with torch.no_grad():
        expected, found = model(*inputs), loaded(*inputs)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.pred_boxes, expected.pred_boxes)
    if model.history is not None:
        ends = model.read_history(*inputs[4:]).end_logits
        assert torch.equal(loaded.read_history(*inputs[4:]).end_logits, ends)
    assert json.loads((tmp_path / CONFIG).read_text())["training"] == {"steps": 12}


@pytest.mark.parametrize("method", ["piza-adapter", "piza-lora", "piza-coop", "lora"])
def test_file_holds_the_counted_parameters_and_little_more(
    base: Any, tmp_path: Path, method: Method
) -> None:
    model = trained(base, method)
    save_piza(tmp_path, model, {})
    size = (tmp_path / WEIGHTS).stat().st_size
    names = len(load_file(tmp_path / WEIGHTS))
    # Four bytes each, and the name, shape and place of every tensor.
    assert 0 < size - 4 * count_parameters(model).total < 8 + 250 * names


def test_base_can_be_elsewhere(saved: Path, base_folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(base_folder, tmp_path / "moved")
    config = json.loads((saved / CONFIG).read_text())
    assert config["base"]["source"] == str(base_folder.resolve())
    config["base"]["source"] = str(tmp_path / "gone")
    (saved / CONFIG).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="gone' is neither a directory nor a hub model"):
        load_piza(saved)
    assert load_piza(saved, str(moved)).config.method == "piza-adapter"


def test_source_of_the_base_can_be_given_and_is_needed(base: Any, tmp_path: Path) -> None:
    model = trained(base, "lora")
    save_piza(tmp_path, model, {}, base_source="some/hub-name")
    assert json.loads((tmp_path / CONFIG).read_text())["base"]["source"] == "some/hub-name"
    model.base.name_or_path = ""
    save_piza(tmp_path, model, {})
    with pytest.raises(CheckpointError, match="does not say where the base of the adapters is"):
        load_piza(tmp_path)


def test_another_base_is_refused(saved: Path, base_folder: Path, tmp_path: Path) -> None:
    mm = base_folder.name.startswith("mm-")
    other = save_tiny_grounding_dino(tmp_path / "other", mm=mm, seed=5)
    with pytest.raises(CheckpointError, match=r"were trained on a base whose weights have digest"):
        load_piza(saved, str(other))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / WEIGHTS).unlink(), "piza.safetensors missing; give a directory"),
        (lambda folder: (folder / CONFIG).write_text("{"), "cannot load the adapters in"),
        (lambda folder: (folder / CONFIG).write_text("{}"), "cannot load the adapters in"),
        (lambda folder: (folder / CONFIG).write_text('{"format": 9}'), "has format 9, but this"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 99), "cannot load the adapters in"),
        (lambda folder: save_file({"a": torch.ones(2)}, folder / WEIGHTS), "missing or unknown"),
    ],
)
def test_damaged_checkpoint_is_refused(saved: Path, damage: Any, message: str) -> None:
    damage(saved)
    with pytest.raises(CheckpointError, match=message):
        load_piza(saved)


def test_weights_of_another_shape_are_refused(saved: Path) -> None:
    weights = load_file(saved / WEIGHTS)
    weights["step.mlp.0.bias"] = torch.zeros(3)
    save_file(weights, saved / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"step.mlp.0.bias has shape \(3,\), expected \(256"):
        load_piza(saved)

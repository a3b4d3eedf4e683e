"""Checkpoints of the weakly supervised model, as they are and damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from reir.checkpoint import TOKENIZER
from reir.errors import CheckpointError
from reir.models.localizers import load_localizer_spec
from reir.models.weak_rec.checkpoint import (
    CONFIG,
    WEIGHTS,
    load_weak_rec,
    save_weak_rec,
    weights_digest,
)
from reir.models.weak_rec.model import WeakRec
from reir_testing.tiny import tiny_batch
from reir_testing.weak.tiny import (
    COMBINATIONS,
    SENTENCES,
    make_random,
    noise_photos,
    tiny_weak_rec,
)


def trained(**changes: Any) -> WeakRec:
    """A model whose frozen weights are those of a checkpoint: in half precision."""
    model = tiny_weak_rec(**changes)
    make_random(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.copy_(parameter.half())
    return model


def scores(model: WeakRec) -> torch.Tensor:
    if model.config.anchors == "yolov3":
        inputs = model.source.load(noise_photos())
    else:
        inputs = tiny_batch(3, 6).tensors()
    with torch.no_grad():
        return model.score(model.anchors(inputs), model.language.load(SENTENCES[:3]))


@pytest.mark.parametrize(("anchors", "language"), COMBINATIONS)
def test_a_loaded_model_scores_the_same(tmp_path: Path, anchors: str, language: str) -> None:
    attention = language == "gru"
    model = trained(anchors=anchors, language=language, attention=attention, max_words=7)
    digest = save_weak_rec(tmp_path / "new" / "folder", model, {"steps": 3})
    again = load_weak_rec(tmp_path / "new" / "folder")
    assert again.config == model.config
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    torch.testing.assert_close(scores(again), scores(model), atol=1e-3, rtol=1e-4)
    assert digest == weights_digest(tmp_path / "new" / "folder")
    config = json.loads((tmp_path / "new" / "folder" / CONFIG).read_text())
    assert config["training"] == {"steps": 3}


def test_frozen_weights_take_half_of_the_space_and_trained_ones_are_exact(tmp_path: Path) -> None:
    model = tiny_weak_rec(anchors="yolov3", language="gru")
    save_weak_rec(tmp_path, model, {})
    stored = load_file(tmp_path / WEIGHTS)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    for name, value in stored.items():
        half = name in frozen
        assert (value.dtype == torch.float16) == half, name
        if not half:
            assert torch.equal(value, model.state_dict()[name])


@pytest.mark.parametrize("paper_parity", [False, True])
def test_paper_parity_reaches_all_parts_that_know_it(tmp_path: Path, paper_parity: bool) -> None:
    model = trained(anchors="yolov3", language="gru", attention=True, paper_parity=paper_parity)
    save_weak_rec(tmp_path, model, {})
    again: Any = load_weak_rec(tmp_path)
    assert again.source.yolo.paper_parity == paper_parity
    assert again.attention.anchors_to_anchors.paper_parity == paper_parity


def test_other_weights_have_another_digest(tmp_path: Path) -> None:
    model = tiny_weak_rec(anchors="yolov3", language="gru")
    first = save_weak_rec(tmp_path, model, {})
    make_random(model)
    assert save_weak_rec(tmp_path, model, {}) != first


# ---------------------------------------------------------------------------------------- damages


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    save_weak_rec(folder, tiny_weak_rec(anchors="yolov3", language="phrase"), {})
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A complete checkpoint, which a test may damage."""
    for file in whole.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def drop_a_tensor(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["project_texts.weight"]
    save_file(weights, folder / WEIGHTS)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), f"{CONFIG} missing"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS} missing"),
    "no tokenizer": (lambda f: (f / TOKENIZER).unlink(), TOKENIZER),
    "config cut": (lambda f: cut(f / CONFIG), "must come from one `reir train` run"),
    "config is no text": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\0"), "must come from one"),
    "config is a list": (lambda f: (f / CONFIG).write_text("[]"), "must come from one"),
    "weights cut": (lambda f: cut(f / WEIGHTS), "must come from one"),
    "weights empty": (lambda f: (f / WEIGHTS).write_bytes(b""), "must come from one"),
    "a tensor missing": (drop_a_tensor, "must come from one"),
    "tokenizer damaged": (lambda f: (f / TOKENIZER).write_text("{}"), TOKENIZER),
    "later format": (lambda f: change_config(f, lambda c: c.update(format=9)), "has format 9"),
    "no format": (lambda f: change_config(f, lambda c: c.pop("format")), "format"),
    "no shape": (lambda f: change_config(f, lambda c: c.pop("shape")), "shape"),
    "other size": (
        lambda f: change_config(f, lambda c: c["shape"]["model"].update(dim=24)),
        "must come from one",
    ),
    "unknown setting": (
        lambda f: change_config(f, lambda c: c["shape"]["model"].update(depth=3)),
        "must come from one",
    ),
    "other anchors": (
        lambda f: change_config(f, lambda c: c["shape"]["model"].update(anchors="candidates")),
        "candidates",
    ),
    "other language": (
        lambda f: change_config(f, lambda c: c["shape"]["model"].update(language="gru")),
        "words",
    ),
}


def test_the_checkpoint_that_is_damaged_below_is_whole(folder: Path) -> None:
    load_weak_rec(folder)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name(folder: Path, name: str) -> None:
    damage, said = DAMAGES[name]
    damage(folder)
    with pytest.raises(CheckpointError, match=said) as refused:
        load_weak_rec(folder)
    assert str(folder) in str(refused.value)


def test_a_folder_that_is_none_is_refused_by_the_localizer_too(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match="reir train --preset weak-rec"):
            load_localizer_spec(f"weak:{path}")

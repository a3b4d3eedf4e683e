"""Checkpoint directories: what is written is what is read, and damaged ones say what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from reir.checkpoint import (
    CONFIG,
    EMBEDDING,
    TOKENIZER,
    WEIGHTS,
    load_encoder,
    load_model,
    pack,
    read_config,
    save_checkpoint,
    unpack,
    weights_digest,
)
from reir.errors import CheckpointError
from reir.models.nano.model import ClareNano
from reir_testing.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def model() -> ClareNano:
    return tiny_model()


@pytest.fixture(scope="module")
def saved(model: ClareNano, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "deep" / "folder"
    save_checkpoint(folder, model, tiny_tokenizer(), {"steps": 7})
    return folder


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage; its weights are a link, to be replaced rather than written to."""
    folder = tmp_path / "damaged"
    shutil.copytree(saved, folder, ignore=shutil.ignore_patterns(WEIGHTS))
    (folder / WEIGHTS).symlink_to(saved / WEIGHTS)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


# -------------------------------------------------------------------------------------- the cycle


def test_a_directory_holds_three_files_and_its_digest(saved: Path, model: ClareNano) -> None:
    assert {p.name for p in saved.iterdir()} == {CONFIG, WEIGHTS, TOKENIZER}
    config = read_config(saved)
    assert config["digest"] == weights_digest(saved)
    assert config["training"] == {"steps": 7}
    assert config["model_config"]["dim"] == model.config.dim


def test_saving_what_was_loaded_changes_no_bit(saved: Path, tmp_path: Path) -> None:
    digest = save_checkpoint(tmp_path / "again", *load_model(saved), {"steps": 7})
    assert digest == weights_digest(saved)
    for name in (CONFIG, WEIGHTS, TOKENIZER):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes(), name


def test_weights_come_back_within_their_precision(saved: Path, model: ClareNano) -> None:
    loaded = load_model(saved)[0].state_dict()
    for name, value in model.state_dict().items():
        if name == EMBEDDING:
            step = value.abs().amax(dim=1, keepdim=True) / 127
            assert ((loaded[name] - value).abs() <= step * 0.501).all()
        else:
            torch.testing.assert_close(loaded[name], value.to(torch.float16).to(value.dtype))


def test_precision_of_the_saved_model_does_not_matter(tmp_path: Path, saved: Path) -> None:
    model, tokenizer = load_model(saved)
    digest = save_checkpoint(tmp_path / "half", model.half(), tokenizer, {})
    kept, original = load_file(tmp_path / "half" / WEIGHTS), load_file(saved / WEIGHTS)
    assert digest == weights_digest(tmp_path / "half")
    for name, value in original.items():
        if EMBEDDING not in name:
            assert torch.equal(kept[name], value), name


def test_memory_layout_does_not_matter(tmp_path: Path, saved: Path) -> None:
    model, tokenizer = load_model(saved)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert save_checkpoint(tmp_path / "nhwc", model, tokenizer, {}) == weights_digest(saved)


@pytest.mark.parametrize("seed", range(4))
def test_packing_twice_is_packing_once(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(5000, 8, generator=random) * 10 ** torch.linspace(-9, 3, 5000)[:, None]
    rows[0], rows[1] = 0.0, torch.linspace(-1, 1, 8)
    once = pack({EMBEDDING: rows})
    twice = pack(unpack(once))
    for name, value in once.items():
        assert torch.equal(twice[name], value), name
    assert torch.equal(unpack(once)[EMBEDDING][0], torch.zeros(8))


def test_an_encoder_answers_under_the_digest(saved: Path, model: ClareNano) -> None:
    encoder = load_encoder(saved, num_candidates=3)
    assert encoder.digest == weights_digest(saved)
    assert encoder.num_candidates == 3
    assert load_encoder(saved).num_candidates == model.config.num_candidates
    vectors = encoder.encode_expressions(["the red dog", "a blue car"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_a_tokenizer_that_pads_or_cuts_is_set_right(damaged: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.enable_padding(length=50)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(damaged / TOKENIZER))
    _, loaded = load_model(damaged)
    assert len(loaded.encode("the red dog in the car").ids) == 8


# ---------------------------------------------------------------------------------------- damages


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, TOKENIZER])
def test_a_missing_file_is_named(damaged: Path, name: str) -> None:
    (damaged / name).unlink()
    with pytest.raises(CheckpointError, match=rf"damaged is not a checkpoint: {name} missing"):
        load_model(damaged)


def test_a_missing_folder_names_all_three(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{CONFIG}, {WEIGHTS}, {TOKENIZER} missing"):
        load_encoder(tmp_path / "nowhere")


def test_an_unknown_model_is_refused_with_the_nearest(damaged: Path) -> None:
    edit_config(damaged, model="clare-nanno")
    with pytest.raises(CheckpointError, match=r"'clare-nanno'; known are clare-nano.*did you mean"):
        load_model(damaged)


@pytest.mark.parametrize(
    ("written", "remedy"), [(99, "update reir-platform"), (1, "train the model again")]
)
def test_another_format_is_refused_with_both_numbers(
    damaged: Path, written: int, remedy: str
) -> None:
    edit_config(damaged, format=written)
    with pytest.raises(
        CheckpointError, match=rf"format {written}, but this release reads format 3 .*{remedy}"
    ):
        load_model(damaged)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"3", b'"x"', b"{}", b"\xff\xfe\x00"], ids=repr
)
def test_a_broken_config_is_named(damaged: Path, content: bytes) -> None:
    (damaged / CONFIG).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{CONFIG} is not a checkpoint config"):
        load_model(damaged)


@pytest.mark.parametrize(
    "change",
    [{"model_config": {"breadth": 3}}, {"model_config": None}, {"model_config": {"dim": 64}}],
    ids=["unknown key", "no settings", "other shape"],
)
def test_settings_that_do_not_fit_the_weights_are_refused(
    damaged: Path, change: dict[str, Any]
) -> None:
    edit_config(damaged, **change)
    with pytest.raises(
        CheckpointError, match=rf"cannot load checkpoint .*damaged: .*{WEIGHTS} and {CONFIG}"
    ):
        load_model(damaged)


def test_a_config_without_model_settings_is_refused(damaged: Path) -> None:
    config = json.loads((damaged / CONFIG).read_text())
    del config["model_config"]
    (damaged / CONFIG).write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=rf"{CONFIG} is not a checkpoint config.*model_config"
    ):
        load_model(damaged)


@pytest.mark.parametrize("keep", [0, 4, 100, -1], ids=lambda n: f"first {n} bytes")
def test_cut_weights_are_refused(damaged: Path, keep: int) -> None:
    content = (damaged / WEIGHTS).read_bytes()
    (damaged / WEIGHTS).unlink()
    (damaged / WEIGHTS).write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match=rf"cannot load checkpoint .*damaged: .*{WEIGHTS}"):
        load_model(damaged)


@pytest.mark.parametrize("lost", [f"{EMBEDDING}.int8", f"{EMBEDDING}.scale", "bias"])
def test_a_lost_tensor_is_refused(damaged: Path, lost: str) -> None:
    tensors = load_file(damaged / WEIGHTS)
    del tensors[lost]
    (damaged / WEIGHTS).unlink()
    save_file(tensors, damaged / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"cannot load checkpoint .*damaged"):
        load_model(damaged)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"\xff"], ids=repr)
def test_a_broken_tokenizer_is_named(damaged: Path, content: bytes) -> None:
    (damaged / TOKENIZER).write_bytes(content)
    with pytest.raises(CheckpointError, match=TOKENIZER):
        load_model(damaged)

"""Public checkpoints: found by directory or hub name, digests, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, Owlv2ForObjectDetection

from reir.errors import CheckpointError
from reir.models.pretrained import PretrainedModel, fetch, load_pretrained, weights_digest
from reir_testing.pretrained import save_tiny_grounding_dino, save_tiny_owlv2, save_tiny_siglip

FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
NAME, REVISION = "acme/owl", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_owlv2(tmp_path_factory.mktemp("owlv2"))


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "copied")


@pytest.fixture
def hub(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with one model in it, and no connection."""
    cached = tmp_path / "hub" / "models--acme--owl"
    shutil.copytree(saved, cached / "snapshots" / REVISION)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(REVISION)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cached / "snapshots" / REVISION


def load(source: str | Path) -> PretrainedModel:
    return load_pretrained(str(source), Owlv2ForObjectDetection, ("owlv2",))


def load_any(folder: Path) -> PretrainedModel:
    config = json.loads((folder / "config.json").read_text())
    model_class = getattr(transformers, config["architectures"][0])
    return load_pretrained(str(folder), model_class, (config["model_type"],))


def test_a_directory_is_loaded_without_copying(saved: Path) -> None:
    found = load(saved)
    assert fetch(str(saved)) == saved
    assert found.digest == hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest()
    assert not found.model.training
    assert next(found.model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("name", [NAME, f"{NAME}@{REVISION}", f"{NAME}@main"])
def test_a_hub_name_is_loaded_from_the_cache_with_the_same_digest(
    name: str, hub: Path, saved: Path
) -> None:
    assert fetch(name) == hub
    assert load(name).digest == weights_digest(saved)


@pytest.mark.parametrize(
    "source", ["acme/other", f"{NAME}@older", "/no/such/folder", "no such name", "../owl"]
)
def test_sources_that_cannot_be_found_are_refused(source: str, hub: Path) -> None:
    with pytest.raises(
        CheckpointError, match="neither a directory nor a hub model that can be reached"
    ):
        fetch(source)


def test_a_tilde_in_a_directory_is_the_home_folder(
    saved: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(saved.parent))
    assert fetch(f"~/{saved.name}") == saved
    with pytest.raises(CheckpointError, match=r"'~nobody-of-that-name/owl' is neither a directory"):
        fetch("~nobody-of-that-name/owl")


def test_the_digest_of_sharded_weights_covers_all_files(saved: Path, copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"model-{1 + i % 2:05}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        part = {name: tensors[name] for name in names if files[name] == file}
        save_file(part, copied / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    joined = b"".join((copied / file).read_bytes() for file in sorted(set(files.values())))
    found, whole = load(copied), load(saved)
    assert found.digest == hashlib.sha256(joined).hexdigest()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], value), name


def test_other_weights_have_another_digest(saved: Path, tmp_path: Path) -> None:
    other = save_tiny_owlv2(tmp_path / "other", seed=1)
    assert weights_digest(other) != weights_digest(saved)


def test_a_model_of_another_type_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_siglip(tmp_path / "siglip")
    with pytest.raises(CheckpointError, match=r"type 'siglip', but what is needed is owlv2"):
        load(folder)


def test_weights_in_a_pickle_are_refused(saved: Path, copied: Path) -> None:
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot load .*copied: .*model\.safetensors"):
        load(copied)
    with pytest.raises(CheckpointError, match=r"copied has no model\.safetensors"):
        weights_digest(copied)


@pytest.mark.parametrize("lost", ["config.json", "preprocessor_config.json"])
def test_a_checkpoint_with_a_missing_file_is_refused(copied: Path, lost: str) -> None:
    (copied / lost).unlink()
    with pytest.raises(CheckpointError, match=r"cannot load .*copied"):
        load(copied)


@pytest.mark.parametrize("save", [save_tiny_owlv2, save_tiny_grounding_dino, save_tiny_siglip])
@pytest.mark.parametrize("lost", [["tokenizer.json"], ["tokenizer.json", "tokenizer_config.json"]])
def test_a_checkpoint_without_its_vocabulary_is_refused(
    save: Callable[[Path], Path], lost: list[str], tmp_path: Path
) -> None:
    folder = save(tmp_path / "saved")
    for name in lost:
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match=r"cannot load .*saved: .*the tokenizer files"):
        load_any(folder)


def test_a_hub_model_that_was_cached_without_its_tokenizer_is_refused(hub: Path) -> None:
    (hub / "tokenizer.json").unlink()
    (hub / "tokenizer_config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"cannot load acme/owl: its tokenizer has 2 tokens, .* reads 81"
    ):
        load(NAME)


def test_a_vocabulary_in_the_older_files_is_read(saved: Path, copied: Path) -> None:
    vocabulary = json.loads((copied / "tokenizer.json").read_text())["model"]["vocab"]
    (copied / "tokenizer.json").unlink()
    (copied / "vocab.json").write_text(json.dumps(vocabulary))
    (copied / "merges.txt").write_text("#version: 0.2\n")
    found, whole = (load(folder).tokens(["a red bus"])["input_ids"] for folder in (copied, saved))
    assert torch.equal(found, whole)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, content) for name in FILES for content in ("", "[]", "1")),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"added_tokens": [], "model": {"type": "WordLevel", "vocab": {}}}'),
    ],
)
def test_a_damaged_file_is_refused(copied: Path, name: str, content: str) -> None:
    (copied / name).write_text(content)
    with pytest.raises(CheckpointError, match=r"cannot load .*copied: \w+: "):
        load(copied)


def test_missing_weights_are_refused_instead_of_initialized(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    del tensors["class_head.logit_shift.weight"]
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 weights .*such as .*logit_shift\.weight"):
        load(copied)


@pytest.mark.parametrize("keep", [0, 100, -8])
def test_truncated_weights_are_refused(copied: Path, keep: int) -> None:
    content = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match=r"cannot load .*copied"):
        load(copied)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    folder = save_tiny_siglip(tmp_path / "siglip")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(CheckpointError, match="cannot load"):
        load_pretrained(str(folder), AutoModel, ("siglip",))
    assert not (tmp_path / "ran").exists()

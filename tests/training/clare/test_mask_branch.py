"""The initial weights of runs with and without the mask branch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reir.checkpoint import load_clare, save_checkpoint
from reir.errors import ConfigError
from reir_testing.tiny import tiny_tokenizer
from reir_testing.tiny_clare import tiny_clare, tiny_clare_config
from reir_training.clare.task import clare_shape, start_clare
from reir_training.config import ClareTrainConfig


def config(**shape: object) -> ClareTrainConfig:
    data = [{"format": "photos", "path": "photos"}]
    return ClareTrainConfig.model_validate({"data": data, "shape": shape})


def test_shape_turns_the_mask_branch_on() -> None:
    assert not config().masks
    assert not clare_shape("clare-base", config(), {}).masks
    assert config(masks=True).masks
    assert clare_shape("clare-base", config(masks=True), {}).masks
    with pytest.raises(ConfigError, match=r"shape: .*'mask'"):
        clare_shape("clare-base", config(mask=True), {})


def test_a_new_mask_branch_is_the_same_on_all_workers(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, tiny_clare(), tiny_tokenizer(), {})
    kept, _ = start_clare("clare-base", config(), [], tmp_path)
    assert not kept.config.masks
    grown, other = (start_clare("clare-base", config(masks=True), [], tmp_path)[0] for _ in "ab")
    assert grown.config == tiny_clare_config(masks=True)
    for name, value in kept.state_dict().items():
        assert torch.equal(grown.state_dict()[name], value), name
    for name, value in grown.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_an_existing_mask_branch_is_kept(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, tiny_clare(masks=True), tiny_tokenizer(), {})
    for wanted in (config(), config(masks=True)):
        model, _ = start_clare("clare-base", wanted, [], tmp_path)
        for name, value in load_clare(tmp_path)[0].state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name

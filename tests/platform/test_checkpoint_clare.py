"""Checkpoints of the published CLARE, beside those of `clare-nano`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from reir.checkpoint import SHIPPED, load_clare, load_encoder, load_model, save_checkpoint
from reir.encoders import load_encoder_spec
from reir.errors import CheckpointError
from reir.models.clare.encoder import ClareEncoder
from reir_testing.tiny_clare import tiny_clare


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    words = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, "red": 2, "cup": 3}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    save_checkpoint(tmp_path, tiny_clare(), words, {"steps": 7})
    return tmp_path


def test_weights_come_back_bit_for_bit(saved: Path) -> None:
    model, _ = load_clare(saved)
    written = tiny_clare()
    assert model.config == written.config
    expected = written.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_load_encoder_takes_either_kind(saved: Path) -> None:
    encoder = load_encoder(saved, num_candidates=4)
    assert isinstance(encoder, ClareEncoder)
    assert encoder.num_candidates == 4
    pixels = np.random.default_rng(0).integers(0, 255, (80, 96, 3)).astype(np.uint8)
    (found,) = encoder.encode_images([pixels])
    assert found.vectors.shape == (len(found), encoder.dim)
    assert encoder.encode_expressions(["red cup"]).shape == (1, encoder.dim)
    assert load_encoder(SHIPPED).digest != encoder.digest


def test_the_mask_branch_is_kept_and_used_when_it_is_asked_for(saved: Path) -> None:
    _, words = load_clare(saved)
    written = tiny_clare(masks=True)
    save_checkpoint(saved, written, words, {})
    model, _ = load_clare(saved)
    assert model.config.masks
    for name, value in model.state_dict().items():
        assert torch.equal(value, written.state_dict()[name]), name
    assert not load_encoder_spec(f"clare:{saved}").masks
    encoder = load_encoder_spec(f"clare-masks:{saved}")
    assert encoder.masks
    (found,) = encoder.encode_images([np.full((80, 96, 3), 90, np.uint8)])
    assert found.masks is not None
    assert {mask.size for mask in found.masks} == {(80, 96)}


def test_a_checkpoint_from_before_there_were_masks_loads_and_gives_none(saved: Path) -> None:
    path = saved / "config.json"
    config = json.loads(path.read_text())
    del config["model_config"]["masks"]
    path.write_text(json.dumps(config))
    assert not load_encoder(saved).masks
    with pytest.raises(CheckpointError, match=r"without masks.*--set shape.masks=true"):
        load_encoder(saved, masks=True)


def test_a_checkpoint_of_the_other_kind_is_named(saved: Path) -> None:
    with pytest.raises(
        CheckpointError, match="is a checkpoint of 'clare', but one of 'clare-nano'"
    ):
        load_model(saved)
    with pytest.raises(
        CheckpointError, match="is a checkpoint of 'clare-nano', but one of 'clare'"
    ):
        load_clare(SHIPPED)


def test_weights_of_another_shape_are_refused(saved: Path) -> None:
    config = saved / "config.json"
    config.write_text(config.read_text().replace('"num_queries": 20', '"num_queries": 24'))
    with pytest.raises(CheckpointError, match="cannot load checkpoint"):
        load_clare(saved)

"""The configuration of a training run: defaults, the shipped recipe, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reir.config import dump_config, load_config
from reir.errors import ConfigError
from reir_training.config import ClareTrainConfig, NanoTrainConfig

RECIPES = Path(__file__).resolve().parents[2] / "training" / "recipes"
RECIPE = RECIPES / "nano.yaml"
SMALL = {"data": [{"format": "coco", "path": "photos"}], "weights": "weights"}


def test_the_shipped_recipe_is_valid() -> None:
    config = load_config(NanoTrainConfig, RECIPE)
    assert {source.format for source in config.data} == {"photos", "coco"}
    assert config.optimization.grounding_epochs > 0
    assert config.optimization.clia_epochs > 0


@pytest.mark.parametrize("name", ["nano", "nano_contrast", "nano_rerank"])
def test_no_shipped_recipe_trains_on_the_test_photos(name: str) -> None:
    sources = load_config(NanoTrainConfig, RECIPES / f"{name}.yaml").data
    assert [source.test for source in sources if source.format == "photos"] == [250]


def test_a_saved_config_loads_as_the_same_config(tmp_path: Path) -> None:
    config = load_config(NanoTrainConfig, SMALL, ["optimization.seed=5", "loss.caption=0"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(NanoTrainConfig, tmp_path / "config.yaml") == config
    assert (config.optimization.seed, config.loss.caption) == (5, 0)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optimization.learning_rat=1", "learning_rate"),
        ("optimization.learning_rate=0", "optimization.learning_rate"),
        ("optimization.photos_per_batch=0", "optimization.photos_per_batch"),
        ("optimization.warmup_steps=0", "optimization.warmup_steps"),
        ("optimization.ema_decay=1", "optimization.ema_decay"),
        ("optimization.precision=fp16", "optimization.precision"),
        ("model.dropout=1", "model.dropout"),
        ("model.frozen_text_layers=7", "model.frozen_text_layers"),
        ("loss.clia=-1", "loss.clia"),
        ("zero_stage=4", "zero_stage"),
        ("data=[]", "data"),
        ("keep_checkpoints=0", "keep_checkpoints"),
    ],
)
def test_error_names_a_wrong_value(override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config(NanoTrainConfig, SMALL, [override])


@pytest.mark.parametrize("missing", ["data", "weights"])
def test_data_and_weights_have_no_default(missing: str) -> None:
    values: dict[str, Any] = {k: v for k, v in SMALL.items() if k != missing}
    with pytest.raises(ConfigError, match=rf"'{missing}' is required"):
        load_config(NanoTrainConfig, values)


@pytest.mark.parametrize("in_shape", [False, True])
def test_paper_parity_is_refused_in_shape(in_shape: bool) -> None:
    values = {"data": SMALL["data"], "paper_parity": True, "shape": {"paper_parity": in_shape}}
    with pytest.raises(ConfigError, match=r"shape.*move it out of shape"):
        load_config(ClareTrainConfig, values)

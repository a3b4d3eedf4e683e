"""The configuration of a training run: defaults, the shipped recipe, mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reir.config import dump_config, load_config
from reir.errors import ConfigError
from reir_training.config import ClareTrainConfig, TrainConfig

RECIPE = Path(__file__).resolve().parents[2] / "training" / "recipes" / "nano.yaml"
SMALL = {"data": [{"format": "coco", "path": "photos"}], "weights": "weights"}


def test_the_shipped_recipe_is_valid() -> None:
    config = load_config(TrainConfig, RECIPE)
    assert {source.format for source in config.data} == {"photos", "coco"}
    assert config.optimisation.grounding_epochs > 0
    assert config.optimisation.clia_epochs > 0


def test_written_and_read_again_it_is_the_same(tmp_path: Path) -> None:
    config = load_config(TrainConfig, SMALL, ["optimisation.seed=5", "loss.caption=0"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(TrainConfig, tmp_path / "config.yaml") == config
    assert (config.optimisation.seed, config.loss.caption) == (5, 0)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optimisation.learning_rat=1", "learning_rate"),
        ("optimisation.learning_rate=0", "optimisation.learning_rate"),
        ("optimisation.photos_per_batch=0", "optimisation.photos_per_batch"),
        ("optimisation.warmup_steps=0", "optimisation.warmup_steps"),
        ("optimisation.ema_decay=1", "optimisation.ema_decay"),
        ("optimisation.precision=fp16", "optimisation.precision"),
        ("model.dropout=1", "model.dropout"),
        ("model.frozen_text_layers=7", "model.frozen_text_layers"),
        ("loss.clia=-1", "loss.clia"),
        ("zero_stage=4", "zero_stage"),
        ("data=[]", "data"),
        ("keep_checkpoints=0", "keep_checkpoints"),
    ],
)
def test_a_wrong_value_is_named(override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config(TrainConfig, SMALL, [override])


@pytest.mark.parametrize("missing", ["data", "weights"])
def test_data_and_weights_have_no_default(missing: str) -> None:
    values: dict[str, Any] = {k: v for k, v in SMALL.items() if k != missing}
    with pytest.raises(ConfigError, match=rf"'{missing}' is required"):
        load_config(TrainConfig, values)


@pytest.mark.parametrize("in_shape", [False, True])
def test_paper_parity_is_refused_in_shape(in_shape: bool) -> None:
    values = {"data": SMALL["data"], "paper_parity": True, "shape": {"paper_parity": in_shape}}
    with pytest.raises(ConfigError, match=r"shape.*move it out of shape"):
        load_config(ClareTrainConfig, values)

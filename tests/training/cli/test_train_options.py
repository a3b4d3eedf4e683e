"""Options of `reir train` that do not fit one another."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from reir.errors import ConfigError
from reir_training.cli.train import train


def settings(folder: Path) -> Path:
    path = folder / "settings.yaml"
    data = [{"format": "sorec", "path": str(folder)}]
    path.write_text(yaml.safe_dump({"base": "no-such-folder", "data": data}))
    return path


def test_a_method_needs_the_preset_piza(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--method lora requires --preset piza, got 'clare-nano'"):
        train(settings(tmp_path), tmp_path / "out", method="lora")
    assert not (tmp_path / "out").exists()


def test_an_unknown_method_is_refused_with_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="method") as refused:
        train(settings(tmp_path), tmp_path / "out", preset="piza", method="piza-adaptor")
    assert "piza-adapter" in str(refused.value)
    assert not (tmp_path / "out").exists()

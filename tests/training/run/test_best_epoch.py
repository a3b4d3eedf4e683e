"""The figure that determines the best epoch, and the checkpoint of that epoch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from reir.config import load_config
from reir.errors import ConfigError
from reir_training.config import NanoTrainConfig, PizaTrainConfig
from reir_training.figures import FIGURES, PART_FIGURES
from reir_training.run.driver import run
from reir_training.run.engine import RunState
from reir_training.run.schedule import ADDED_PARTS, CROPS, best_figure, plan
from reir_training.run.storage import CHECKPOINT
from reir_training.run.worker import _RunOutput

SMALL = {"data": [{"format": "photos", "path": "photos"}], "weights": "weights"}


def config_of(*overrides: str) -> NanoTrainConfig:
    return load_config(NanoTrainConfig, SMALL, list(overrides))


@dataclass
class Measured:
    """A task whose epochs have known figures."""

    figures: list[dict[str, float]]
    saved: int = field(default=0)

    def steps(self, stage: str) -> int:  # noqa: ARG002
        return 1

    def validate(self) -> dict[str, float]:
        return self.figures[self.saved]

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        self.saved += 1
        folder.mkdir(parents=True)
        (folder / "about.json").write_text(json.dumps(about))

    def about(self) -> dict[str, Any]:
        return {}


def kept_epoch(folder: Path, stage: str, figures: list[dict[str, float]], *overrides: str) -> int:
    """Finish one epoch for each of `figures`, and return the one whose checkpoint is kept."""
    config = config_of(f"optimization.{stage}_epochs={len(figures)}", *overrides)
    task: Any = Measured(figures)
    job = {"stage": stage, "output": str(folder), "storage": None}
    epochs = plan(config.optimization, stage)
    output = _RunOutput(job, config, task, epochs, RunState(1, 1), active=True)
    for epoch in epochs:
        output.finish_epoch(epoch, {}, folder / f"epoch_{epoch.number}")
    output.close()
    about = json.loads((folder / CHECKPOINT / "about.json").read_text())
    return int(about["epoch"])


def test_the_best_epoch_of_a_part_is_kept(tmp_path: Path) -> None:
    masks = [{"mask_iou": value} for value in (70.0, 90.0, 80.0)]
    assert kept_epoch(tmp_path / "best", "masks", masks, "final=best") == 2
    assert kept_epoch(tmp_path / "last", "masks", masks) == 3


def test_another_figure_of_the_stage_can_be_chosen(tmp_path: Path) -> None:
    figures = [{"long_p50": 50.0, "short_p50": 60.0}, {"long_p50": 40.0, "short_p50": 70.0}]
    best = ("final=best", "best_by=short_p50")
    assert kept_epoch(tmp_path / "long", "candidates", figures, "final=best") == 1
    assert kept_epoch(tmp_path / "short", "candidates", figures, *best) == 2


def test_each_stage_has_a_default_figure() -> None:
    defaults = {stage: best_figure(config_of(), stage) for stage in ("all", *ADDED_PARTS)}
    assert defaults == {
        "all": "br1_50",
        "rerank": "br1_50",
        "masks": "mask_iou",
        "query-zoom": "policy_p50",
        "colors": "color_accuracy",
        "candidates": "long_p50",
        "crops": "br1_50",
    }
    # The stage "crops" trains the model itself.
    assert PART_FIGURES.keys() == ADDED_PARTS.keys() - {CROPS}
    piza = load_config(PizaTrainConfig, {"data": SMALL["data"], "base": "base"})
    assert best_figure(piza, "all") == "macc"


def test_the_saved_settings_of_an_earlier_release_can_be_used_again() -> None:
    # In its runs, `config.yaml` has the default of all stages.
    config = config_of("best_by=br1_50")
    for stage in ("all", *ADDED_PARTS):
        assert best_figure(config, stage) == best_figure(config_of(), stage)


def test_a_figure_of_another_stage_is_refused_before_the_run_starts(tmp_path: Path) -> None:
    config = config_of("best_by=mask_iou")
    assert best_figure(config, "masks") == "mask_iou"
    wanted = f"best_by=mask_iou is not a figure of --stage clia: use one of {', '.join(FIGURES)}"
    with pytest.raises(ConfigError, match=wanted):
        run(
            "clare-nano",
            config,
            output=tmp_path / "run",
            stage="clia",
            init=None,
            num_workers=1,
            use_gpu=False,
        )
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"must be one of br1_50, .*, got 'iou'"):
        config_of("best_by=iou")

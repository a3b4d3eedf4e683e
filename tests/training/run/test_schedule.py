"""Stages that add a part to a finished checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from reir.errors import ConfigError
from reir_training.config import NanoSchedule
from reir_training.run.schedule import ADDED_PARTS, check_stage, plan


@pytest.mark.parametrize(("stage", "part"), ADDED_PARTS.items())
def test_a_stage_that_adds_a_part_needs_a_checkpoint(stage: str, part: str) -> None:
    with pytest.raises(ConfigError, match=f"the checkpoint that gets the {part}"):
        check_stage("clare-nano", stage, None)


@pytest.mark.parametrize("stage", ADDED_PARTS)
def test_only_clare_nano_gets_parts(stage: str) -> None:
    with pytest.raises(ConfigError, match="requires --preset clare-nano, got 'clare-base'"):
        check_stage("clare-base", stage, Path("checkpoint"))


@pytest.mark.parametrize("stage", ADDED_PARTS)
def test_a_part_is_trained_by_its_own_stage_only(stage: str) -> None:
    settings = NanoSchedule()
    assert {each.stage for each in plan(settings, stage)} == {stage}
    assert stage not in {each.stage for each in plan(settings, "all")}

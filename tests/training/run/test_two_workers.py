"""Two workers with DeepSpeed give the results of one, and resumed runs those of whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reir_testing.training.workers import (
    CASES,
    StepCase,
    StepResult,
    ZeroStage,
    runs_and_resumed_runs,
    step_alone,
    steps_of_workers,
)

MOST = 1e-5


# ZeRO 3 shares everything that the other stages share, and the weights too.
most_shared = pytest.mark.parametrize(
    "zero_stages", [(3,), pytest.param((1, 2), marks=pytest.mark.slow)], ids=["3", "1 and 2"]
)


@most_shared
def test_loss_and_gradients_of_two_workers_are_those_of_one(
    tmp_path: Path, zero_stages: tuple[ZeroStage, ...]
) -> None:
    cases = [case for case in CASES if case.zero_stage in zero_stages]
    alone = {
        (case.model, case.task): step_alone(tmp_path, case)
        for case in cases
        if case.zero_stage == zero_stages[0]
    }
    for case, together in steps_of_workers(tmp_path, cases).items():
        apart = alone[case.model, case.task].difference(together)
        assert apart.largest <= MOST, case


def test_the_comparison_detects_a_different_step(tmp_path: Path) -> None:
    one, other = (step_alone(tmp_path, StepCase("clare", t, 1)) for t in ("grounding", "clia"))
    assert one.difference(one).largest == 0
    assert one.difference(other).loss > MOST
    assert one.difference(other).gradient > MOST


def test_differences_are_relative_to_the_largest() -> None:
    def result(loss: float, first: float, second: float) -> StepResult:
        gradients = {"a": torch.tensor([first, 1.0]), "b": torch.tensor([[second]])}
        return StepResult(torch.tensor(loss), gradients)

    apart = result(2.0, -8.0, 1.0).difference(result(2.5, -8.0, 3.0))
    assert (apart.loss, apart.gradient) == (0.25, 0.25)
    assert (apart.loss_absolute, apart.gradient_absolute) == (0.5, 2.0)


@pytest.mark.slow
@most_shared
def test_resumed_runs_of_two_workers_equal_uninterrupted_runs(
    tmp_path: Path, zero_stages: tuple[ZeroStage, ...]
) -> None:
    for zero_stage, (whole, resumed) in runs_and_resumed_runs(tmp_path, zero_stages).items():
        assert list(whole.losses) == [(epoch, step) for epoch in (1, 2) for step in (1, 2, 3)]
        assert resumed.losses == dict(list(whole.losses.items())[2:]), zero_stage
        assert resumed.figures == whole.figures
        for name, value in whole.averaged.items():
            assert torch.equal(resumed.averaged[name], value), (zero_stage, name)
            assert torch.equal(whole.validated[name], value), (zero_stage, name)

"""Killed trainings: the comparison, and that they end like an uninterrupted training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from reir.models.piza.checkpoint import WEIGHTS as PIZA_WEIGHTS
from reir_testing.training.kills import (
    VICTIMS,
    WEIGHTS,
    StepId,
    TrainCommand,
    compare,
    end,
    family,
    run_killed,
)
from reir_testing.training.tiny import tiny_clare_settings, tiny_piza_settings, write_scenes


def ended(folder: Path, losses: Sequence[tuple[StepId, float]], weight: float) -> TrainCommand:
    """Write the output of a training: this log, and a checkpoint with one weight."""
    path = folder / "run" / "checkpoint" / WEIGHTS
    path.parent.mkdir(parents=True)
    save_file({"a": torch.tensor([1.0, weight])}, path)
    lines = [{"event": "start", "time": 0}]
    lines += [
        {"event": "progress", "epoch": epoch, "step": step, "loss": loss}
        for (epoch, step), loss in losses
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "run" / "metrics.jsonl").write_text(text + '{"event": "prog')  # just being written
    return TrainCommand(folder, {})


def test_all_lines_of_a_log_are_compared(tmp_path: Path) -> None:
    curve = [((1, 1), 3.0), ((1, 2), 2.0), ((2, 1), 1.0)]
    whole = ended(tmp_path / "whole", curve, 1.0)
    same = ended(tmp_path / "same", [*curve[:2], *curve[1:]], 1.0)
    found = compare(whole, same)
    assert (found.missing, found.redone, found.loss, found.weight) == (0, 1, 0, 0)
    # the first time that step 2 ran it differed, and the last step never came
    other = ended(tmp_path / "other", [curve[0], ((1, 2), 2.5), curve[1]], 1.25)
    found = compare(whole, other)
    assert (found.missing, found.redone, found.loss, found.weight) == (1, 1, 0.5, 0.25)


def test_a_training_that_has_not_started_has_no_losses(tmp_path: Path) -> None:
    assert TrainCommand(tmp_path, {}).losses() == []


def test_descendants_of_a_process_are_found_and_killed() -> None:
    grandchild = "import time; time.sleep(60)"
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    parent = subprocess.Popen([sys.executable, "-c", child, grandchild])
    try:
        deadline = time.monotonic() + 20
        while len(found := family(os.getpid()).keys() & {parent.pid, *family(parent.pid)}) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert parent.pid in found
        processes = family(parent.pid)
        end(dict.fromkeys(processes, "another time"))  # ids that others have by now are spared
        assert family(parent.pid) == processes
        end(processes)
        assert parent.wait(20) == 0  # its child was killed, not itself
        end(processes)  # gone
    finally:
        parent.kill()
        parent.wait()


@pytest.mark.ray
@pytest.mark.slow
def test_killed_trainings_equal_an_uninterrupted_one(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes")
    settings = tiny_clare_settings(
        tmp_path / "scenes",
        grounding_epochs=1,
        clia_epochs=1,
        steps_per_epoch=6,
        save_every_steps=2,
        log_every_steps=1,
        ema_decay=0.9,
    )
    whole = TrainCommand(tmp_path / "whole", settings)
    whole.finish(whole.start())
    for victim, at in zip(VICTIMS, ((1, 4), (1, 5), (2, 3)), strict=True):
        killed = TrainCommand(tmp_path / victim, settings)
        assert run_killed(killed, victim, at) >= 1
        found = compare(whole, killed)
        assert (found.missing, found.loss, found.weight) == (0, 0, 0), victim


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_training_of_piza_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    settings = tiny_piza_settings(
        tmp_path / "piza", grounding_epochs=2, save_every_steps=2, log_every_steps=1
    )
    whole, killed = (
        TrainCommand(tmp_path / name, settings, preset="piza", weights=PIZA_WEIGHTS)
        for name in ("whole", "killed")
    )
    whole.finish(whole.start())
    # The worker is killed in the second epoch, which continues the stream of the first.
    assert run_killed(killed, "worker", (2, 1)) == 1
    found = compare(whole, killed)
    assert (found.missing, found.loss, found.weight) == (0, 0, 0)


@pytest.mark.ray
@pytest.mark.slow
def test_a_training_that_fails_is_reported(tmp_path: Path) -> None:
    training = TrainCommand(tmp_path, {"data": []})
    with pytest.raises(RuntimeError, match=r"exited with code 2(.|\n)*data"):
        run_killed(training, "trainer", (1, 1))

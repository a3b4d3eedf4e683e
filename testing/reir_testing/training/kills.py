"""Runs `reir train` in subprocesses, kills them (SIGKILL) at a chosen step and restarts them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from safetensors.torch import load_file

Victim = Literal["worker", "trainer", "cluster"]
VICTIMS: tuple[Victim, ...] = get_args(Victim)
WEIGHTS = "model.safetensors"
WORKER_TITLE = "ray::RayTrainWorker"
POLL_S = 0.05
# Generous, because starting Ray on a busy machine may take minutes.
LONGEST_RUN_S, LONGEST_END_S = 900.0, 180.0
StepId = tuple[int, int]
"""Epoch and step within it, both counted from 1."""


@dataclass(frozen=True)
class TrainCommand:
    """A `reir train` command, which has the same settings and output each time it is started.

    Attributes:
        folder: folder for the settings, the output and the messages of the command.
        settings: settings of the preset, as in `reir train --data`; must log every step.
        num_workers: number of Ray Train workers.
        preset: model to train.
        weights: file of the checkpoint with its weights.
        init: checkpoint to start from, if any.
    """

    folder: Path
    settings: Mapping[str, Any]
    num_workers: int = 1
    preset: str = "clare-base"
    weights: str = WEIGHTS
    init: Path | None = None

    def start(self) -> subprocess.Popen[bytes]:
        """Start the command."""
        self.folder.mkdir(parents=True, exist_ok=True)
        data = self.folder / "settings.yaml"
        data.write_text(yaml.safe_dump(dict(self.settings)))
        command = [str(Path(sys.executable).with_name("reir")), "train", "--preset", self.preset]
        command += ["--data", str(data), "--output", str(self.folder / "run")]
        command += ["--num-workers", str(self.num_workers)]
        command += ["--init", str(self.init)] if self.init else []
        # Appended, since the messages of all starts are needed to explain a failure.
        with (self.folder / "messages.txt").open("ab") as messages:
            return subprocess.Popen(command, stdout=messages, stderr=messages)

    def finish(self, child: subprocess.Popen[bytes], limit_s: float = LONGEST_RUN_S) -> None:
        """Wait for the command to exit.

        Raises:
            RuntimeError: it failed or took longer than the limit; contains its last messages.
        """
        try:
            code = child.wait(limit_s)
            what = f"exited with code {code}"
        except subprocess.TimeoutExpired:
            end({child.pid: _started(child.pid), **family(child.pid)})
            code = child.wait()
            what = f"was ended because it took more than {limit_s:g} s"
        if code:
            last = (self.folder / "messages.txt").read_text(errors="replace")[-2000:]
            raise RuntimeError(f"reir train {what}; its last messages:\n{last}")

    def losses(self) -> list[tuple[StepId, float]]:
        """Return the loss of every step in the order of the log, including repeated steps."""
        path = self.folder / "run" / "metrics.jsonl"
        if not path.exists():
            return []
        # What follows the last line break is a line that is still being written.
        whole_lines = path.read_text().split("\n")[:-1]
        lines = [line for line in map(json.loads, whole_lines) if line["event"] == "progress"]
        return [((line["epoch"], line["step"]), line["loss"]) for line in lines]


def run_killed(training: TrainCommand, victim: Victim, at: StepId) -> int:
    """Start a training, kill a part of it when it has logged a step, and let it finish.

    If a worker is killed, the command recovers by itself. Otherwise, it is started again.

    Args:
        training: command without output so far.
        victim: part to kill: one of the Ray Train workers, the process of the command, or all
            processes of its Ray cluster.
        at: step after which it is killed.

    Returns:
        The number of killed processes.

    Raises:
        RuntimeError: the training ended before that step, or failed.
    """
    child = training.start()
    deadline = time.monotonic() + LONGEST_RUN_S
    while at not in dict(training.losses()):
        if child.poll() is not None or time.monotonic() > deadline:
            training.finish(child)
            raise RuntimeError(f"training ended before step {at}; choose an earlier one")
        time.sleep(POLL_S)
    # Listed before the kill: orphans are no longer descendants of the command.
    cluster = family(child.pid)
    killed = _victims(victim, child.pid, cluster)
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    if victim != "worker":
        try:
            # Without a cluster, the command ends by itself.
            child.wait(LONGEST_END_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        end(cluster)
        child = training.start()
    training.finish(child)
    return len(killed)


def _victims(victim: Victim, trainer: int, cluster: Mapping[int, str]) -> list[int]:
    if victim == "trainer":
        return [trainer]
    if victim == "cluster":
        return list(cluster)
    return [pid for pid in cluster if _title(pid).startswith(WORKER_TITLE)][:1]


@dataclass(frozen=True)
class Comparison:
    """The difference between a killed run and an uninterrupted one.

    Attributes:
        missing: number of steps that are not in the log of the killed run.
        redone: number of repeated steps in its log.
        loss: largest difference of the losses, over all lines of its log.
        weight: largest difference of the weights of the final checkpoints.
    """

    missing: int
    redone: int
    loss: float
    weight: float


def compare(whole: TrainCommand, killed: TrainCommand) -> Comparison:
    """Compare two finished trainings."""
    expected, lines = dict(whole.losses()), killed.losses()
    first, second = (
        load_file(each.folder / "run" / "checkpoint" / each.weights) for each in (whole, killed)
    )
    assert first.keys() == second.keys()
    return Comparison(
        missing=len(expected.keys() - dict(lines).keys()),
        redone=len(lines) - len(dict(lines)),
        loss=max(abs(loss - expected[step]) for step, loss in lines),
        weight=max(
            float((mine.float() - second[name].float()).abs().max()) for name, mine in first.items()
        ),
    )


# -------------------------------------------------------------------------------------- processes


def family(pid: int) -> dict[int, str]:
    """Return the ids and start times of all descendants of a process.

    An id may be reused by a new process, so only both together identify a process.
    """
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        fields = _status(int(folder.name))
        if fields:
            children.setdefault(int(fields[1]), []).append(int(folder.name))
    found, left = {}, [pid]
    while left:
        for child in children.get(left.pop(), []):
            found[child] = _started(child)
            left.append(child)
    return found


def end(processes: Mapping[int, str]) -> None:
    """Kill those of these processes that are still running."""
    for pid, started in processes.items():
        if started and _started(pid) == started:
            os.kill(pid, signal.SIGKILL)


def _status(pid: int) -> list[str]:
    """Return the fields of `/proc/<pid>/stat` from the third on; empty if there is no process."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _started(pid: int) -> str:
    """Return the start time of a process in clock ticks; empty if there is no process."""
    # A zombie (Z) has ended, although its parent has not collected its exit status yet.
    fields = _status(pid)
    return fields[19] if fields and fields[0] != "Z" else ""


def _title(pid: int) -> str:
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""

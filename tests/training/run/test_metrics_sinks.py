"""Sinks for the records of a run; TensorBoard's event files are read back."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from reir.sinks import JsonLines, Sink
from reir_training.run.tensorboard import TensorBoard, scalars, validation_figures

START = {"event": "start", "time": 1.0}
PROGRESS = {
    "event": "progress",
    "epoch": 2,
    "epochs": 3,
    "stage": "clia",
    "step": 10,
    "steps": 40,
    "photos": 80,
    "step_seconds": 0.5,
    "photos_per_s": 16.0,
    "learning_rate": 2e-4,
    "loss": 3.5,
    "parts": {"clia": 1.25},
}
EPOCH = {"event": "epoch", "epoch": 2, "best_epoch": 1, "losses": {"clia": 1.0}, "br1_50": 12.5}


def events(folder: Path) -> Iterator[Any]:
    """Read the events of all files in the TFRecord format (length, checksum, data, checksum)."""
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events(folder):
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_json_lines_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for record in (START, PROGRESS):
        sink: Sink = JsonLines(path)
        sink.write(record)
        assert json.loads(path.read_text().splitlines()[-1]) == record  # before it is closed
        sink.close()
    assert len(path.read_text().splitlines()) == 2


def test_tensorboard_has_steps_of_the_whole_run_and_epochs(tmp_path: Path) -> None:
    sink: Sink = TensorBoard(tmp_path, done=0)
    for record in (START, PROGRESS, EPOCH):
        sink.write(record)
    sink.close()
    assert shown(tmp_path) == {
        "train/loss": [(50, 3.5)],
        "train/learning_rate": [(50, pytest.approx(2e-4))],
        "train/step_seconds": [(50, 0.5)],
        "train/photos_per_s": [(50, 16.0)],
        "train_loss/clia": [(50, 1.25)],
        "held_out/br1_50": [(2, 12.5)],
    }


def test_tensorboard_drops_repeated_steps(tmp_path: Path) -> None:
    TensorBoard(tmp_path, done=30).close()
    assert [e.step for e in events(tmp_path) if e.HasField("session_log")] == [31]


def test_only_epochs_have_validation_figures() -> None:
    assert validation_figures(EPOCH) == {"br1_50": 12.5}
    assert list(scalars(START)) == []

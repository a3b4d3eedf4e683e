"""Sinks for the records of a run; TensorBoard's event files are read back."""

from __future__ import annotations

import io
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress
from tensorboardX.proto.event_pb2 import Event

from reir.config import load_config
from reir.sinks import JsonLines, Sink, records_of
from reir_training.config import NanoTrainConfig
from reir_training.run.driver import _log_start, _MetricsFollower
from reir_training.run.storage import METRICS
from reir_training.run.tensorboard import TensorBoard, scalars, validation_figures
from reir_training.run.worker import _training_metadata

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


@pytest.mark.parametrize("torn", ['{"event": "prog', "\0\0\0", json.dumps(EPOCH)])
def test_an_incomplete_last_line_does_not_take_the_next_record_with_it(
    tmp_path: Path, torn: str
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(START) + "\n" + torn)
    for record in (PROGRESS, EPOCH):
        sink: Sink = JsonLines(path)
        sink.write(record)
        sink.close()
    # A line that lacks only its end is a record, too.
    whole = [EPOCH] if torn == json.dumps(EPOCH) else []
    lines = path.read_text().splitlines()
    assert lines == [json.dumps(START), torn, json.dumps(PROGRESS), json.dumps(EPOCH)]
    assert list(records_of(lines)) == [START, *whole, PROGRESS, EPOCH]


def test_json_lines_can_be_written_to_what_is_no_file() -> None:
    reading, writing = os.pipe()
    sink = JsonLines(Path(f"/dev/fd/{writing}"))
    sink.write(START)
    sink.close()
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert [json.loads(line) for line in pipe] == [START]


def test_a_run_goes_on_after_an_incomplete_line(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    path.write_text(json.dumps(START) + "\n" + json.dumps(PROGRESS)[:-9])
    _log_start(path)
    console = Console(file=io.StringIO(), width=100)
    with Progress(console=console) as bars, _MetricsFollower(path, bars), path.open("a") as file:
        # Of a worker that had no space left, and of its successor.
        file.write('{"event": "epo\n' + json.dumps(PROGRESS) + "\n")
        file.flush()
    assert [(bar.completed, bar.total) for bar in bars.tasks] == [(50, 120)]
    task: Any = SimpleNamespace(about=lambda: {"photos": 7})
    job = {"output": str(tmp_path), "stage": "all"}
    sources = [{"format": "photos", "path": "."}]
    config = load_config(NanoTrainConfig, {"data": sources, "weights": "."})
    about = _training_metadata(config, job, task, 2, {"br1_50": 12.5})
    assert (about["photos"], about["epoch"], about["steps"]) == (7, 2, 10)
    assert about["hours"] > 24  # since the first start


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

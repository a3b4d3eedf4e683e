"""Records of a run: their totals, Prometheus metrics, and JSON lines."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from reir.cli import main
from reir.errors import ConfigError
from reir.index_report import STAGES
from reir.sinks import JsonLines
from reir.store.memory import MemoryStore
from reir_ingestion.command_runner import CommandRunner
from reir_ingestion.metrics import PrometheusSink
from reir_ingestion.pipeline import IndexOptions, index
from reir_ingestion.report import BatchTimes
from reir_testing import FakeEncoder
from reir_testing.ingestion import RecordBuffer

UNITS = (
    "_total",
    "_seconds",
    "_ratio",
    "_items",
    "_images",
    "_bucket",
    "_sum",
    "_count",
    "_created",
)


def scraped(port: int) -> dict[tuple[str, str], float]:
    """(name, label values) -> value."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, ",".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def mixed(photos: Path) -> Path:
    (photos / "bad.jpg").write_bytes(b"x")
    (photos / "copy.png").write_bytes((photos / "000.png").read_bytes())
    return photos


def test_the_records_of_batches_add_up_to_the_report(store: MemoryStore, mixed: Path) -> None:
    sink = RecordBuffer()
    options = IndexOptions(batch_size=5)
    report = index(mixed, "g", store, FakeEncoder(), options=options, sinks=[sink])
    batches = sink.of("batch")
    assert sum(each["images"] for each in batches) == report.read == 22
    assert sum(each["instances"] for each in batches) == report.instances
    assert sum(each["bytes"] for each in batches) == report.read_bytes
    assert report.read_bytes == sum(path.stat().st_size for path in mixed.iterdir())
    assert sum(each["duplicates"] for each in batches) == report.duplicates == 1
    assert sum(each["outcomes"].get("new", 0) for each in batches) == report.new == 21
    assert sum(each["failures"].get("not_an_image", 0) for each in batches) == 1
    assert all(each["store_seconds"] > 0 for each in batches)
    assert all(each["store_seconds"] <= each["freshness_seconds"] < 60 for each in batches)
    for stage in STAGES:
        spent_s = sum(each["stage_seconds"][stage] for each in sink.records)
        assert spent_s == pytest.approx(report.stage_seconds[stage], abs=1e-6)
    assert sink.records[0]["event"] == "start"
    assert sink.records[-1]["event"] == "end"
    assert sink.records[-1]["report"] == json.loads(json.dumps(report.to_dict()))
    (listed,) = sink.of("listed")
    assert listed["total"] == 22

    again = RecordBuffer()
    index(mixed, "g", store, FakeEncoder(), options=options, sinks=[again])
    assert again.of("batch") == []
    assert sum(each["images"] for each in again.of("unchanged")) == 22


def test_the_last_record_says_why_a_run_stopped(store: MemoryStore, photos: Path) -> None:
    class InterruptedEncoder(FakeEncoder):
        def encode_images(self, _: Any) -> Any:
            raise KeyboardInterrupt

    sink = RecordBuffer()
    with pytest.raises(KeyboardInterrupt):
        index(photos, "g", store, InterruptedEncoder(), sinks=[sink])
    assert sink.records[-1]["event"] == "stopped"
    assert sink.records[-1]["error"].startswith("KeyboardInterrupt")


def test_metrics_equal_the_report(store: MemoryStore, mixed: Path) -> None:
    metrics = PrometheusSink()
    port = metrics.serve(0)
    try:
        report = index(mixed, "g", store, FakeEncoder(), sinks=[metrics])
        found = scraped(port)
        index(mixed, "g", store, FakeEncoder(), sinks=[metrics])
        later = scraped(port)
    finally:
        metrics.close()
    name = "reir_index_{}".format
    assert found[name("images_total"), "new"] == 21
    assert found[name("images_total"), "failed"] == 1
    assert found[name("failures_total"), "not_an_image"] == 1
    assert found[name("duplicates_total"), ""] == 1
    assert found[name("instances_total"), ""] == report.instances
    assert found[name("read_bytes_total"), ""] == report.read_bytes
    assert found[name("source_images"), ""] == 22
    assert found[name("store_latency_seconds_count"), ""] == 2
    assert found[name("freshness_seconds_count"), ""] == 2
    assert 0 <= found[name("encoder_busy_ratio"), ""] <= 1
    for stage in STAGES:
        busy_s = found[name("stage_busy_seconds_total"), stage]
        assert busy_s == pytest.approx(report.stage_seconds[stage], abs=1e-6)
    assert {label for metric, label in found if metric == name("queue_items")} == {
        "decoded",
        "encoded",
    }
    assert later[name("images_total"), "unchanged"] == 22
    assert all(metric.endswith(UNITS) for metric, _ in found)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_a_port_in_use_is_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot serve metrics on 127.0.0.1:{port}"):
            PrometheusSink().serve(port)


def test_times_stay_positive_when_the_clock_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("reir_ingestion.report.time.time", lambda: now[0])
    metrics = PrometheusSink()
    record = {"stage_seconds": dict.fromkeys(STAGES, 0.1), "queues": {}, "event": "listed"}
    metrics.write({**record, "time": now[0], "total": 5})
    now[0] = 500.0
    assert BatchTimes([1000.0], 0.1).freshness_s == 0.0
    metrics.write({**record, "time": now[0], "total": 5})
    now[0] = 500.05
    metrics.write({**record, "time": now[0], "total": 5})
    (family,) = [f for f in metrics.registry.collect() if f.name == "reir_index_encoder_busy_ratio"]
    assert [sample.value for sample in family.samples] == [1.0]


def test_the_command_writes_events_and_report_and_prints_the_metrics_address(
    mixed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("REIR_STORE", str(tmp_path / "store"))
    monkeypatch.setattr("reir.checkpoint.load_encoder", lambda _: FakeEncoder())
    events, report = tmp_path / "events.jsonl", tmp_path / "report.json"
    command = ["index", str(mixed), "--gallery", "g", "--json", "--metrics-port", "0"]
    assert main.run([*command, "--events", str(events), "--report", str(report)]) == 0
    shown = capsys.readouterr()
    assert "Metrics: http://127.0.0.1:" in shown.err
    assert json.loads(report.read_text()) == json.loads(shown.out)
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    assert sum(line["images"] for line in lines if line["event"] == "batch") == 22
    assert main.run([*command, "--events", str(events)]) == 0
    assert len(events.read_text().splitlines()) > len(lines)  # appended to those of the first run


def test_a_report_that_cannot_be_written_is_noticed_before_the_run(
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("REIR_STORE", str(tmp_path / "store"))
    monkeypatch.setattr("reir.checkpoint.load_encoder", lambda _: pytest.fail("not needed"))
    report = tmp_path / "none" / "report.json"
    assert main.run(["index", str(photos), "--gallery", "g", "--report", str(report)]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert f"--report {report}" in shown
    assert f"there is no folder {report.parent}; create it" in shown
    assert not (tmp_path / "store").exists()


def test_the_report_is_shown_even_if_it_cannot_be_written(
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("REIR_STORE", str(tmp_path / "store"))
    monkeypatch.setattr("reir.checkpoint.load_encoder", lambda _: FakeEncoder())
    folder = tmp_path / "reports"
    folder.mkdir()
    monkeypatch.setattr(CommandRunner, "index", removing(folder, CommandRunner.index))
    report = folder / "report.json"
    assert main.run(["index", str(photos), "--gallery", "g", "--report", str(report)]) == 1
    shown = capsys.readouterr()
    assert "gallery g" in shown.out
    assert str(report) in "".join(shown.err.split())


def removing(folder: Path, function: Any) -> Any:
    """The function, after which the folder is gone."""

    def call(*args: Any) -> Any:
        found = function(*args)
        folder.rmdir()
        return found

    return call


def test_json_lines_are_complete_when_written(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "events.jsonl")
    sink.write({"event": "start"})
    assert json.loads((tmp_path / "events.jsonl").read_text()) == {"event": "start"}
    sink.close()

"""Traces of indexing, as a real collector receives them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from reir.cli import main
from reir_testing import FakeEncoder
from reir_testing.ingestion import write_scenes
from reir_testing.otlp import Collector, trace_collector

STAGES = ["read", "decode", "encode", "store"]


@pytest.fixture
def collector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setattr("reir.checkpoint.load_encoder", lambda _: FakeEncoder())
    home = {"REIR_HOME": str(tmp_path), "REIR_STORE": str(tmp_path / "store")}
    # `patch.dict` also removes the variables that the command sets.
    with trace_collector() as made, patch.dict(os.environ, home):
        yield made


def test_each_batch_is_a_trace_with_its_stages(collector: Collector, tmp_path: Path) -> None:
    write_scenes(tmp_path / "photos", 12)
    (tmp_path / "config.yaml").write_text(f"tracing: {{endpoint: '{collector.endpoint}'}}")
    events = tmp_path / "events.jsonl"
    command = ["index", str(tmp_path / "photos"), "--gallery", "pets", "--batch-size", "8"]
    assert main.run([*command, "--events", str(events)]) == 0
    batches = [each for each in collector.spans if not each.parent_id]
    assert [each.name for each in batches] == ["batch"] * 2
    assert sorted(each.attributes["reir.images"] for each in batches) == [4, 8]
    for batch in batches:
        assert (batch.service, batch.attributes["reir.gallery"]) == ("reir-index", "pets")
        stages = collector.children(batch)
        assert sorted(each.name for each in stages) == sorted(STAGES)
        read, encode, store = (
            next(each for each in stages if each.name == name)
            for name in ("read", "encode", "store")
        )
        assert batch.start_ns == read.start_ns < encode.start_ns < store.start_ns
        assert batch.end_ns == store.end_ns
    assert len({each.trace_id for each in collector.spans}) == 2
    records = [json.loads(line) for line in events.read_text().splitlines()]
    times = [each["stage_times"] for each in records if each["event"] == "batch"]
    assert [sorted(each) for each in times] == [sorted(STAGES)] * 2


def test_a_sample_ratio_of_zero_exports_nothing(collector: Collector, tmp_path: Path) -> None:
    write_scenes(tmp_path / "photos", 2)
    (tmp_path / "config.yaml").write_text(
        f"tracing: {{endpoint: '{collector.endpoint}', sample_ratio: 0}}"
    )
    assert main.run(["index", str(tmp_path / "photos"), "--gallery", "pets"]) == 0
    assert collector.spans == []


def test_the_variable_counts_more_than_the_file(collector: Collector, tmp_path: Path) -> None:
    write_scenes(tmp_path / "photos", 2)
    (tmp_path / "config.yaml").write_text("tracing: {endpoint: 'http://127.0.0.1:1'}")
    os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = collector.endpoint
    assert main.run(["index", str(tmp_path / "photos"), "--gallery", "pets"]) == 0
    assert [each.name for each in collector.spans if not each.parent_id] == ["batch"]

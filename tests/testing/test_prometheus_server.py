"""The Prometheus of tests: it scrapes, evaluates rules, and hands alerts to Alertmanager."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, Gauge, start_http_server

from reir_testing import prometheus_server as module
from reir_testing.prometheus_server import (
    KEEP_ALERTS,
    ProgramMissing,
    prometheus_server,
    require_program,
)

RULES = {
    "groups": [
        {
            "name": "example",
            "rules": [
                {"record": "height:double", "expr": "2 * height_meters"},
                {"alert": "TooHigh", "expr": "height_meters > 5"},
            ],
        }
    ]
}


@pytest.fixture(autouse=True)
def _programs() -> None:
    try:
        for name in module.PROGRAMS:
            require_program(name)
    except ProgramMissing as missing:
        pytest.skip(str(missing))


def test_it_scrapes_evaluates_rules_and_notifies(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    height = Gauge("height_meters", "Height.", registry=registry)
    height.set(4)
    exporter, thread = start_http_server(0, "127.0.0.1", registry)
    rules = tmp_path / "rules.yml"
    rules.write_text(yaml.safe_dump(RULES))
    scrape = {
        "job_name": "tower",
        "static_configs": [{"targets": [f"127.0.0.1:{exporter.server_port}"]}],
    }
    started_s = time.time()
    try:
        with prometheus_server(
            tmp_path / "server", [scrape], rules=[rules], alertmanager=KEEP_ALERTS
        ) as prometheus:
            (doubled,) = prometheus.wait_for(lambda server: server.query("height:double"))
            assert doubled.value == 8
            assert doubled.labels["job"] == "tower"
            assert [each["health"] for each in prometheus.targets()] == ["up"]
            assert prometheus.alerts() == []
            height.set(6)
            notified = prometheus.wait_for(lambda server: server.notified())
            assert notified[0]["labels"]["alertname"] == "TooHigh"
            assert prometheus.alerts()[0]["state"] == "firing"
            (series,) = prometheus.query_range("height_meters", started_s, time.time(), 0.5)
            assert {value for _, value in series.points} == {4, 6}
            with pytest.raises(ValueError, match="parse error"):
                prometheus.query("height_meters +")
    finally:
        exporter.shutdown()
        exporter.server_close()
        thread.join()
    assert not Path("/proc", str(prometheus.pid)).exists()


def test_a_wrong_configuration_is_told_with_the_log(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="unknown_key"),
        prometheus_server(tmp_path, [{"job_name": "x", "unknown_key": 1}]),
    ):
        pass


def test_a_missing_program_is_told_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ProgramMissing, match="apt-get install prometheus"):
        require_program("prometheus")

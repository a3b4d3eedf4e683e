"""The panels of the dashboards have data on a small running system, scraped by Prometheus."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge, start_http_server

from reir_k8s.monitoring.dashboards.panels import Graph, Number, Page
from reir_testing.monitoring.live_panels import MIN_STEP_S, LivePanel, evaluate_dashboard
from reir_testing.monitoring.live_system import RATE_INTERVAL_S, live_system
from reir_testing.prometheus_server import ProgramMissing, prometheus_server, require_program
from reir_testing.repository import ROOT

DASHBOARDS = ROOT / "k8s" / "monitoring" / "dashboards"
ON_RAY = "Rows that operators of Ray Data put out"
"""The only panel of these dashboards that needs a Ray cluster besides that of the server."""


@pytest.fixture(autouse=True)
def _prometheus_is_installed() -> None:
    try:
        require_program("prometheus")
    except ProgramMissing as missing:
        pytest.skip(str(missing))


@pytest.mark.slow
@pytest.mark.ray
def test_panels_of_serving_indexing_and_quality_have_data(tmp_path: Path) -> None:
    with live_system(tmp_path, num_photos=40, with_ray=False) as system:
        now_s = time.time()
        panels = [
            panel
            for name in ("overview", "serving", "ingestion", "quality")
            for panel in evaluate_dashboard(
                DASHBOARDS / f"{name}.json",
                system.prometheus,
                system.started_s,
                now_s,
                RATE_INTERVAL_S,
            )
        ]
        down = {t["labels"]["job"] for t in system.prometheus.targets() if t["health"] != "up"}
    assert [each.title for each in panels if not each.has_data] == [ON_RAY]
    assert down == {"reir-index", "ray-batch"}  # the run has ended; there was no cluster
    by_title = {each.title: each for each in panels if each.dashboard == "serving"}
    (problems,) = by_title["Problems"].series
    assert {"overloaded", "invalid-request", "gallery-not-found"} <= problems.keys()
    (failed,) = by_title["Share of requests that fail"].series
    assert next(iter(failed.values())).value > 0, "the first rejected requests must count"


@pytest.fixture
def live(tmp_path: Path) -> Iterator[list[LivePanel]]:
    """Panels evaluated on a single gauge, `height_meters`, with the label `job`."""
    registry = CollectorRegistry()
    Gauge("height_meters", "Height.", registry=registry).set(4)
    exporter, thread = start_http_server(0, "127.0.0.1", registry)
    scrape = {
        "job_name": "tower",
        "static_configs": [{"targets": [f"127.0.0.1:{exporter.server_port}"]}],
    }
    here, missing = 'height_meters{job=~"$job"}', 'height_meters{job="none"}'
    page = Page(
        name="towers",
        title="Towers",
        description="How high are they?",
        rows={
            "Now": [Number("Height", "Of a tower.", {"{{job}}": here})],
            "Over time": [
                Graph("Growth", "Of a tower.", {"{{job}}": f"rate({here}[$__rate_interval])"}),
                Graph("Both", "One of them is missing.", {"a": here, "b": missing}),
                Graph("No number", "Division by zero.", {"c": f"0 * {here} / 0"}),
            ],
        },
    )
    file = tmp_path / "towers.json"
    file.write_text(page.to_json())
    started_s = time.time()
    with prometheus_server(tmp_path / "server", [scrape], scrape_interval_s=0.5) as prometheus:
        prometheus.wait_for(lambda server: server.query("rate(height_meters[20s])"))
        # A step later, so that one of the steps comes after the second scrape.
        yield evaluate_dashboard(file, prometheus, started_s, time.time() + MIN_STEP_S, 20.0)
    exporter.shutdown()
    exporter.server_close()
    thread.join()


def test_a_panel_has_data_if_each_of_its_queries_has_a_number(live: list[LivePanel]) -> None:
    assert [(each.row, each.title, each.has_data) for each in live] == [
        ("Now", "Height", True),
        ("Over time", "Growth", True),
        ("Over time", "Both", False),
        ("Over time", "No number", False),
    ]
    (height,) = live[0].series
    assert {legend: series.value for legend, series in height.items()} == {"tower": 4}
    assert len(height["tower"].points) == 1
    assert live[0].dashboard == "towers"
    assert json.dumps(live[0].model)

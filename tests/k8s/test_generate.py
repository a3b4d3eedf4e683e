"""The generated files of the repository are up to date, and consist of what the code declares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reir_k8s.generate import ROOT, differing_files, generated_files, write_files
from reir_k8s.monitoring.dashboards.pages import PAGES
from reir_k8s.monitoring.dashboards.panels import Page, Panel
from reir_k8s.monitoring.declared_metrics import OWN, all_metrics, names_in, series_names
from reir_k8s.monitoring.rules.files import rule_groups

PANELS = [
    pytest.param(panel, id=f"{page.name}: {heading}: {panel.title}")
    for page in PAGES
    for heading, panels in page.rows.items()
    for panel in panels
]
GROUPS = rule_groups().values()
RECORDED = {rule.record for group in GROUPS for rule in group.recordings}


def test_the_committed_files_are_up_to_date() -> None:
    assert differing_files() == [], "run `python -m reir_k8s.generate` and commit what it writes"


def test_files_are_written_once_and_superfluous_ones_deleted(tmp_path: Path) -> None:
    files = set(generated_files())
    assert set(write_files(tmp_path)) == files
    assert write_files(tmp_path) == []
    (tmp_path / "docs" / "metrics.md").write_text("changed")
    (tmp_path / "docs" / "hand-written.md").write_text("")
    superfluous = Path("k8s/monitoring/dashboards/old.json")
    (tmp_path / superfluous).write_text("{}")
    assert differing_files(tmp_path) == [Path("docs/metrics.md"), superfluous]
    write_files(tmp_path)
    assert not (tmp_path / superfluous).exists()
    assert (tmp_path / "docs" / "hand-written.md").exists()
    assert differing_files(tmp_path) == []


def test_each_metric_is_declared_once_with_a_unit_and_a_sentence() -> None:
    metrics = list(all_metrics())
    names = [each.name for each in metrics]
    assert sorted(names) == sorted(set(names))
    for metric in metrics:
        assert metric.help.endswith("."), metric.name
    for metric in (each for group in OWN.values() for each in group):
        assert (metric.kind == "counter") == metric.name.endswith("_total"), metric.name
        assert bool(metric.buckets) == (metric.kind == "histogram"), metric.name


@pytest.mark.parametrize("panel", PANELS)
def test_panels_use_declared_metrics(panel: Panel) -> None:
    for expression in panel.queries.values():
        names = names_in(expression)
        assert names, expression
        assert names <= series_names() | RECORDED


def test_rules_use_declared_metrics() -> None:
    for group in GROUPS:
        for expression in [each.expr for each in group.recordings] + [
            each.expr for each in group.alerts
        ]:
            assert names_in(expression) <= series_names() | RECORDED, expression


def test_names_are_found_in_expressions() -> None:
    expression = (
        'sum by (le, job) (rate(a_bucket{b="c{d}", e=~"f|g"}[5m])) / on (h) i:j:k > 1.5e3 '
        "or vector(0) unless m offset 5m and time() - n"
    )
    assert names_in(expression) == {"a_bucket", "i:j:k", "m", "n"}


@pytest.mark.parametrize("panel", PANELS)
def test_panels_explain_themselves(panel: Panel) -> None:
    assert panel.title[0].isupper()
    assert len(panel.description.split()) > 3
    assert panel.description.endswith(".")
    if panel.runbook is not None:
        assert (ROOT / "docs" / "runbooks" / f"{panel.runbook}.md").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_grafana_can_import_the_dashboard(page: Page) -> None:
    model: dict[str, Any] = json.loads(page.to_json())
    assert model["uid"] == f"reir-{page.name}"
    panels = [each for each in model["panels"] if each["type"] != "row"]
    assert len({each["id"] for each in model["panels"]}) == len(model["panels"])
    assert len(panels) == sum(map(len, page.rows.values()))
    variables = {each["name"] for each in model["templating"]["list"]}
    assert {"datasource", "job", "runbooks"} <= variables
    text = json.dumps(panels).replace("$__rate_interval", "")
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        assert panel["datasource"]["uid"] == "${datasource}"
        assert [each["refId"] for each in panel["targets"]] == list("AB")[: len(panel["targets"])]
    for name in variables - {"datasource", "runbooks"}:
        assert f"${name}" in text, f"no panel uses the variable {name}"

"""Evaluates the panels of dashboards on a running Prometheus, as Grafana does."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reir_testing.prometheus_server import RunningPrometheus, Series

NUM_POINTS, MIN_STEP_S = 200, 1.0
"""Points on the time axis of a panel, and the shortest time between two of them."""


@dataclass(frozen=True, kw_only=True)
class LivePanel:
    """A panel and what Prometheus answers to its queries.

    Attributes:
        dashboard: name of the dashboard's file, without ".json".
        row: heading above it.
        model: the panel in Grafana's format.
        start_s, end_s: Unix times between which its queries were evaluated.
        series: legend -> the values of one query over time, in the order of the queries.
    """

    dashboard: str
    row: str
    model: Mapping[str, Any]
    start_s: float
    end_s: float
    series: Sequence[Mapping[str, Series]]

    @property
    def title(self) -> str:
        """Its title."""
        return str(self.model["title"])

    @property
    def has_data(self) -> bool:
        """Whether each query has at least one value that is a number."""
        return all(
            any(math.isfinite(value) for each in found.values() for _, value in each.points)
            for found in self.series
        )


def evaluate_dashboard(
    file: Path, prometheus: RunningPrometheus, start_s: float, end_s: float, rate_interval_s: float
) -> list[LivePanel]:
    """Evaluate the queries of all panels, with "All" for each variable.

    Args:
        file: dashboard in Grafana's format.
        prometheus: has the data.
        start_s, end_s: Unix times of the first and the last value.
        rate_interval_s: value of `$__rate_interval`, four times the time between two scrapes.

    Raises:
        ValueError: Prometheus refuses a query.
    """
    model = json.loads(file.read_text(encoding="utf-8"))
    variables = {
        each["name"]: each.get("allValue") or each.get("query", "")
        for each in model["templating"]["list"]
    }
    variables["__rate_interval"] = f"{round(1e3 * rate_interval_s)}ms"
    step_s = max((end_s - start_s) / NUM_POINTS, MIN_STEP_S)
    found, row = [], ""
    for panel in model["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
            continue
        series = []
        for target in panel["targets"]:
            expression = _substituted(target["expr"], variables)
            answer = (
                prometheus.query(expression, end_s)
                if target.get("instant")
                else prometheus.query_range(expression, start_s, end_s, step_s)
            )
            series.append({_legend(target["legendFormat"], each): each for each in answer})
        found.append(
            LivePanel(
                dashboard=file.stem,
                row=row,
                model=panel,
                start_s=start_s,
                end_s=end_s,
                series=series,
            )
        )
    return found


def _substituted(text: str, variables: Mapping[str, str]) -> str:
    for name in sorted(variables, key=len, reverse=True):
        text = text.replace(f"${name}", variables[name])
    return text


def _legend(template: str, series: Series) -> str:
    for label, value in series.labels.items():
        template = template.replace(f"{{{{{label}}}}}", value)
    return template

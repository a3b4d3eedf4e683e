"""Builds panels and dashboards of Grafana in one style."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TypeVar

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    GraphThresholdsStyleMode,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    Threshold,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.dashboard import Panel as GrafanaPanel

DATASOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
RATE = "[$__rate_interval]"
"""Range of `rate` and `increase`; Grafana makes it at least four scrapes long."""
RUNBOOKS = "docs/runbooks/"
"""Folder of the run-books in this repository; the variable `runbooks` of a dashboard holds it, so
that its address on a server can take its place."""
TAG = "reir"

JOB = 'job=~"$job"'
GALLERY = 'job=~"$job", gallery=~"$gallery"'
"""Selectors with the variables of the dashboards."""

P = TypeVar("P", timeseries.Panel, stat.Panel)


def or_none(label: str) -> str:
    """Return an alternative for an expression without a result: one series, of value 0."""
    # `on ()` compares no labels, so the zero appears only if nothing else does. An empty pattern
    # matches the empty source label, so the label is always set.
    return f' or on () label_replace(vector(0), "{label}", "none", "", "")'


@dataclass(frozen=True)
class Limit:
    """From which value on a panel shows a problem.

    Attributes:
        value: the limit.
        is_minimum: whether the values below it are the problem, and not those from it on.
    """

    value: float
    is_minimum: bool = False

    def thresholds(self) -> dashboard.ThresholdsConfig:
        """Return green and red areas on both sides of the limit."""
        below, above = ("red", "green") if self.is_minimum else ("green", "red")
        steps = [Threshold(value=None, color=below), Threshold(value=self.value, color=above)]
        return dashboard.ThresholdsConfig().steps(steps)


NONE = Limit(1)
"""For the number of things that should not exist."""
ALL = Limit(1, is_minimum=True)
"""For what is 1 if all is well, and otherwise 0."""


@dataclass(frozen=True)
class Panel(ABC):
    """What a panel shows.

    Attributes:
        title: what is shown.
        description: how to read it.
        queries: legend -> expression. A legend may contain labels in double braces, and then
            stands for one line for each of their values.
        unit: name of the unit in Grafana.
        limit: from which value on it shows a problem.
        runbook: name of the run-book that helps then, without ".md".
        is_instant: whether only the present counts. Otherwise a series that has ended is shown too.
    """

    title: str
    description: str
    queries: Mapping[str, str]
    _: KW_ONLY
    unit: str = "short"
    limit: Limit | None = None
    runbook: str | None = None
    is_instant: bool = False

    @abstractmethod
    def build(self) -> Builder[GrafanaPanel]:
        """Return the panel as the Grafana SDK takes it."""

    def _common(self, panel: P) -> P:
        panel = panel.title(self.title).description(self.description).unit(self.unit)
        panel = panel.datasource(DATASOURCE)
        for number, (legend, expression) in enumerate(self.queries.items()):
            query = prometheus.Dataquery().expr(expression).legend_format(legend)
            query = query.instant() if self.is_instant else query.range()
            panel = panel.with_target(query.ref_id(chr(ord("A") + number)))
        if self.runbook is not None:
            link = dashboard.DashboardLink(f"Run-book: {self.runbook}").type(DashboardLinkType.LINK)
            panel = panel.links([link.url(f"${{runbooks}}{self.runbook}.md").target_blank(True)])
        return panel


class Graph(Panel):
    """Lines over time; the limit is a dashed line."""

    def build(self) -> Builder[GrafanaPanel]:
        """Return the panel as the Grafana SDK takes it."""
        panel = timeseries.Panel().fill_opacity(10).axis_soft_min(0)
        panel = panel.show_points(VisibilityMode.NEVER)
        panel = panel.tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
        if self.limit is not None:
            style = common.GraphThresholdsStyleConfig().mode(GraphThresholdsStyleMode.DASHED)
            panel = panel.thresholds(self.limit.thresholds()).thresholds_style(style)
        return self._common(panel.span(8).height(8))


@dataclass(frozen=True)
class Number(Panel):
    """The value of each series; red on the wrong side of the limit."""

    _: KW_ONLY
    is_instant: bool = True

    def build(self) -> Builder[GrafanaPanel]:
        """Return the panel as the Grafana SDK takes it."""
        plain = dashboard.ThresholdsConfig().steps([Threshold(value=None, color="text")])
        limits = plain if self.limit is None else self.limit.thresholds()
        return self._common(stat.Panel().thresholds(limits).span(6).height(4))


@dataclass(frozen=True, kw_only=True)
class Page:
    """A dashboard.

    Attributes:
        name: name of its file, and the end of its address.
        title: in Grafana's list.
        description: which questions it answers.
        variables: name of a label -> the metric that has it; `job` is always a variable.
        rows: heading -> panels.
    """

    name: str
    title: str
    description: str
    variables: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, Sequence[Panel]]

    def to_json(self) -> str:
        """Return the dashboard as Grafana imports it."""
        built = (
            dashboard.Dashboard(self.title)
            # Fixed, so that an import replaces the dashboard and links to it stay valid.
            .uid(f"reir-{self.name}")
            .description(self.description)
            .tags([TAG])
            .timezone("browser")
            .time("now-3h", "now")
            .refresh("1m")
            .tooltip(DashboardCursorSync.CROSSHAIR)
            .link(_other_dashboards())
            .with_variable(
                dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
            )
            .with_variable(_label_variable("job", "up"))
        )
        for label, metric in self.variables.items():
            built = built.with_variable(_label_variable(label, metric))
        runbooks = dashboard.TextBoxVariable("runbooks").label("Address of the run-books")
        built = built.with_variable(runbooks.default_value(RUNBOOKS))
        for heading, panels in self.rows.items():
            built = built.with_row(dashboard.Row(heading))
            for panel in panels:
                built = built.with_panel(panel.build())
        model = built.build()
        for identity, each in enumerate(model.panels or [], 1):
            each.id_val = identity  # otherwise Grafana chooses others at each import
        return json.dumps(model, cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def _label_variable(label: str, metric: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(label)
        .label(label.capitalize())
        .query(f"label_values({metric}, {label})")
        .datasource(DATASOURCE)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        # In place of a list of all values, which leaves out series without the label.
        .all_value(".*")
        .current(VariableOption(selected=True, text="All", value="$__all"))
    )


def _other_dashboards() -> dashboard.DashboardLink:
    link = dashboard.DashboardLink("REIR").type(DashboardLinkType.DASHBOARDS).tags([TAG])
    return link.keep_time(True).include_vars(True)

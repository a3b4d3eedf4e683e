"""All metrics that the platform and the programs under it export, and the page that lists them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from reir.operations.monitor import metrics as of_monitor
from reir.prometheus_metric import PrometheusMetric
from reir_ingestion import metrics as of_indexing
from reir_k8s.monitoring.foreign_metrics import SOURCES
from reir_serving.middleware import metrics as of_serving
from reir_training.run import prometheus as of_training

OWN: Mapping[str, tuple[PrometheusMetric, ...]] = {
    "`reir serve`: `/metrics` of the server's own port": of_serving.METRICS,
    "`reir index` and `reir reindex`: the port of `--metrics-port`": of_indexing.METRICS,
    "`reir train`: the metrics port of each Ray node": tuple(
        replace(each, name=of_training.EXPORT_PREFIX + each.name) for each in of_training.METRICS
    ),
    "`reir monitor`: the port of `--port`": of_monitor.METRICS,
}
"""Where metrics come from -> the metrics."""

_SERIES_OF_HISTOGRAM = ("_bucket", "_sum", "_count")

# Parts of an expression that hold no names of series: after the strings, selectors, ranges and
# lists of labels.
_STRING = re.compile(r'"[^"]*"')
_NO_NAMES = re.compile(
    r"\{[^}]*\}|\[[^\]]*\]|\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)"
)
_KEYWORDS = frozenset({"and", "or", "unless", "bool", "offset"})

INTRODUCTION = """\
# Metrics

`python -m reir_k8s.generate` writes this page from the declarations in the code. Names are those
that Prometheus stores. A histogram has the series `_bucket`, `_sum` and `_count`. Times are in
seconds, sizes in bytes, and shares between 0 and 1, unless the description says otherwise.
[Monitoring](monitoring.md) says how to collect them.
"""


def all_metrics() -> Iterator[PrometheusMetric]:
    """Yield the metrics of the platform and of the programs under it."""
    for group in (*OWN.values(), *SOURCES.values()):
        yield from group


def series_names() -> frozenset[str]:
    """Return the names that a query may use: of metrics, and of the series of histograms."""
    names = set()
    for metric in all_metrics():
        if metric.kind == "histogram":
            names |= {metric.name + end for end in _SERIES_OF_HISTOGRAM}
        else:
            names.add(metric.name)
    return frozenset(names)


def names_in(expression: str) -> set[str]:
    """Return the names of the series that an expression of PromQL reads."""
    rest = _NO_NAMES.sub(" ", _STRING.sub("", expression))
    return set(re.findall(r"(?<![\w:.$])[A-Za-z_:][\w:]*\b(?!\s*\()", rest)) - _KEYWORDS


def metrics_page() -> str:
    """Return the text of docs/metrics.md."""
    lines = [INTRODUCTION]
    for title, metrics in OWN.items():
        lines += [f"## {title}", "", *_table(metrics), ""]
    lines += ["## Ray, HAProxy and Prometheus", "", "The part of them that the dashboards use."]
    for title, metrics in SOURCES.items():
        lines += ["", f"### {title}", "", *_table(metrics)]
    return "\n".join(lines) + "\n"


def _table(metrics: Iterable[PrometheusMetric]) -> Iterator[str]:
    yield "| metric | type | labels | meaning |"
    yield "|---|---|---|---|"
    for metric in metrics:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        yield f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |"

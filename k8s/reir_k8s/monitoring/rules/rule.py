"""Recording and alert rules as data, and the durations and limits that they use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

Severity = Literal["critical", "warning"]
"""`critical`: users are affected now, wake somebody up; `warning`: look at it during the day."""

_UNITS_MS = {"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1_000, "ms": 1}


@dataclass(frozen=True, kw_only=True)
class Durations:
    """All durations in the rules, in seconds: a rule has none of its own.

    `scaled` returns a table for tests with real servers, which cannot wait for hours.

    Attributes:
        rate: range over which requests, errors and latencies are averaged.
        page, ticket: short and long range of the burn rates of the error budget.
        killed: range in which killed replicas are counted.
        baseline: range whose median the present values of the canaries are compared with.
        trend, ahead: range from which the growth of the store is extrapolated, and how far.
        at_once: `for` of conditions that do not occur in normal operation.
        down: `for` of targets that a restart interrupts.
        settled: `for` of values that vary.
        deep: `for` of values that the deep checks of the monitor measure; more than one interval.
        missing: `for` of what an operator still has to set up.
        check_late: age of the last run of a check of the monitor.
    """

    rate: float = 300.0
    page: tuple[float, float] = (300.0, 3_600.0)
    ticket: tuple[float, float] = (1_800.0, 21_600.0)
    killed: float = 600.0
    baseline: float = 7 * 86_400.0
    trend: float = 21_600.0
    ahead: float = 86_400.0
    at_once: float = 60.0
    down: float = 120.0
    settled: float = 600.0
    deep: float = 1_200.0
    missing: float = 86_400.0
    check_late: float = 3_600.0

    def scaled(self, factor: float) -> Durations:
        """Return a table in which every duration is multiplied by `factor`."""
        return replace(
            self, **{each.name: _scaled(getattr(self, each.name), factor) for each in fields(self)}
        )


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Values above or below which an alert fires.

    Attributes:
        error_budget: share of requests that may fail, the complement of the objective of 99.5%.
        page_burn, ticket_burn: how many times faster than allowed the budget is used up.
        failed_requests: smallest number of failures in the long range for which an alert fires.
        latency_s: 95th percentile of the time of a search.
        rejected: share of requests that are rejected because the server is busy.
        storeless: share of requests that fail because the store cannot be reached.
        crash_loop: killed replicas within the range `killed`.
        recall: recall@10 of searches, compared with an exact scan.
        canary_drop: how far BR@1 of the canaries may fall below its median.
        absent_drop: the same for the share of absent canaries that are recognized.
        presence_drift: difference between the mean presence of recent answers and earlier ones.
        failed_photos: share of photos that could not be indexed.
        index_age_s, backup_age_s: age of the last indexing run, and of the last backup.
        free: share of the disk of the store that is free.
        free_trend: the same, above which the growth of the store is of no concern.
    """

    error_budget: float = 0.005
    # At these rates, a budget for 30 days lasts about two days and five days.
    page_burn: float = 14.4
    ticket_burn: float = 6.0
    # With little traffic, a single failure is already a large share of the requests.
    failed_requests: int = 10
    latency_s: float = 1.0
    rejected: float = 0.01
    storeless: float = 0.01
    crash_loop: int = 5
    recall: float = 0.95
    canary_drop: float = 0.1
    absent_drop: float = 0.2
    presence_drift: float = 0.15
    failed_photos: float = 0.05
    index_age_s: float = 2 * 86_400.0
    backup_age_s: float = 2 * 86_400.0
    free: float = 0.1
    free_trend: float = 0.5


@dataclass(frozen=True)
class Recording:
    """A recording rule: stores the value of an expression as a series of its own."""

    record: str
    expr: str

    def to_dict(self) -> dict[str, Any]:
        """Return the rule in Prometheus's format."""
        return {"record": self.record, "expr": self.expr}


@dataclass(frozen=True, kw_only=True)
class Alert:
    """An alert rule.

    Attributes:
        name: of the alert.
        expr: the alert fires if this has a value.
        hold_s: for how long, in seconds.
        severity: see `Severity`.
        summary, description: what is wrong, and the values; templates of Prometheus.
        runbook: name of its file in docs/runbooks/, without ".md".
    """

    name: str
    expr: str
    hold_s: float = 0.0
    severity: Severity
    summary: str
    description: str
    runbook: str

    def to_dict(self, runbooks: str) -> dict[str, Any]:
        """Return the rule in Prometheus's format.

        Args:
            runbooks: what `runbook_url` begins with.
        """
        hold = {"for": duration(self.hold_s)} if self.hold_s else {}
        return {
            "alert": self.name,
            "expr": self.expr,
            **hold,
            "labels": {"severity": self.severity},
            "annotations": {
                "summary": self.summary,
                "description": self.description,
                "runbook_url": f"{runbooks}{self.runbook}.md",
            },
        }


@dataclass(frozen=True)
class RuleGroup:
    """The rules of one subject; Prometheus evaluates them in this order."""

    name: str
    recordings: Sequence[Recording]
    alerts: Sequence[Alert]


def duration(seconds: float) -> str:
    """Return a duration as Prometheus writes it, such as "5m" or "1500ms"."""
    milliseconds = round(1e3 * seconds)
    # Prometheus takes no fractions, hence the largest unit that divides evenly.
    unit = next(unit for unit, size in _UNITS_MS.items() if milliseconds % size == 0)
    return f"{milliseconds // _UNITS_MS[unit]}{unit}"


def _scaled(value: Any, factor: float) -> Any:
    return tuple(factor * each for each in value) if isinstance(value, tuple) else factor * value

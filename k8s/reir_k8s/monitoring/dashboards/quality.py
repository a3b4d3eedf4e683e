"""Quality of the answers, as `reir monitor` measures it."""

from __future__ import annotations

from reir_k8s.monitoring.dashboards.panels import (
    GALLERY,
    JOB,
    NONE,
    Graph,
    Limit,
    Number,
    Page,
)
from reir_k8s.monitoring.rules.rule import Limits

_LIMITS = Limits()

_NOW = (
    Number(
        "Recall of searches",
        "Recall@10 of recent searches, compared with an exact scan of the vectors.",
        {"{{gallery}}": f"min by (gallery) (reir_monitor_recall_ratio{{{GALLERY}}})"},
        unit="percentunit",
        limit=Limit(_LIMITS.recall, is_minimum=True),
        runbook="recall-low",
    ),
    Number(
        "Canaries answered right",
        "BR@1: share of the canaries with a known answer that is the first hit.",
        {"{{gallery}}": f'min by (gallery) (reir_monitor_canary_br_ratio{{{GALLERY}, k="1"}})'},
        unit="percentunit",
        runbook="canary-answers-worse",
    ),
    Number(
        "Absent canaries recognized",
        "Share of the canaries without an answer that are recognized as absent.",
        {"{{gallery}}": f"min by (gallery) (reir_monitor_canary_absent_ratio{{{GALLERY}}})"},
        unit="percentunit",
        runbook="canary-answers-worse",
    ),
    Number(
        "Checks of the monitor that fail",
        "1 for each check that ended with an error; its values are then those of its last success.",
        {"{{check}}": f"max by (check) (reir_monitor_check_failed{{{JOB}}})"},
        limit=NONE,
        runbook="monitor-check",
    ),
)
_TIME = (
    Graph(
        "Recall of searches",
        "A drop after an indexing run or a change of the index's parameters points to the index; "
        "it does not depend on the model.",
        {"{{gallery}}": f"min by (gallery) (reir_monitor_recall_ratio{{{GALLERY}}})"},
        unit="percentunit",
        limit=Limit(_LIMITS.recall, is_minimum=True),
        runbook="recall-low",
    ),
    Graph(
        "Canaries answered right",
        "BR@1 and BR@10: share of the known answers in the first 1 and 10 hits. A drop with an "
        "unchanged recall points to the model or to the photos.",
        {
            "{{gallery}}, first {{k}}": "min by (gallery, k) "
            f"(reir_monitor_canary_br_ratio{{{GALLERY}}})"
        },
        unit="percentunit",
        runbook="canary-answers-worse",
    ),
    Graph(
        "Absent canaries recognized",
        "A drop means that users get hits for what is not there.",
        {"{{gallery}}": f"min by (gallery) (reir_monitor_canary_absent_ratio{{{GALLERY}}})"},
        unit="percentunit",
        runbook="canary-answers-worse",
    ),
    Graph(
        "Mean presence of answers",
        "Of the last searches, and of those before. A difference means that users search for "
        "other things, or that answers have changed.",
        {
            "{{gallery}}, {{window}}": "avg by (gallery, window) "
            f"(reir_monitor_presence_mean_ratio{{{GALLERY}}})"
        },
        unit="percentunit",
        runbook="presence-drift",
    ),
    Graph(
        "Drift of presence",
        "Difference between the last searches and those before.",
        {
            "{{gallery}}": "abs(avg by (gallery) "
            f'(reir_monitor_presence_mean_ratio{{{GALLERY}, window="recent"}})'
            " - avg by (gallery) "
            f'(reir_monitor_presence_mean_ratio{{{GALLERY}, window="before"}}))'
        },
        unit="percentunit",
        limit=Limit(_LIMITS.presence_drift),
        runbook="presence-drift",
    ),
    Graph(
        "Verdicts of users",
        "Share of the hits with feedback that users call right, within a day.",
        {
            "right": f'sum(increase(reir_serve_feedback_total{{{JOB}, verdict="right"}}[1d]))'
            f' / sum(increase(reir_serve_feedback_total{{{JOB}, verdict=~"right|wrong"}}[1d]))'
        },
        unit="percentunit",
        runbook="canary-answers-worse",
    ),
)
_BASIS = (
    Graph(
        "Canaries by kind",
        "Canaries that were asked: with a known answer, known to be absent, and without a known "
        "answer.",
        {"{{gallery}}, {{kind}}": f"max by (gallery, kind) (reir_monitor_canaries{{{GALLERY}}})"},
        runbook="canary-answers-missing",
    ),
    Graph(
        "Time of a search in the monitor",
        "95% of the searches for canaries take less time, without HTTP.",
        {"{{gallery}}": f"max by (gallery) (reir_monitor_search_latency_seconds{{{GALLERY}}})"},
        unit="s",
        runbook="searches-slow",
    ),
    Graph(
        "Time since a check of the monitor",
        "Values are as old as this.",
        {"{{check}}": f"time() - max by (check) (reir_monitor_check_timestamp_seconds{{{JOB}}})"},
        unit="s",
        runbook="monitor-check",
    ),
    Graph(
        "Duration of a check of the monitor",
        "A check that takes longer than its interval delays the others.",
        {"{{check}}": f"max by (check) (reir_monitor_check_duration_seconds{{{JOB}}})"},
        unit="s",
        runbook="monitor-check",
    ),
)

QUALITY = Page(
    name="quality",
    title="REIR: quality",
    description="Are the answers as good as before, and if not, is it the index or the model?",
    variables={"gallery": "reir_monitor_instances"},
    rows={"Now": _NOW, "Over time": _TIME, "What the figures rest on": _BASIS},
)

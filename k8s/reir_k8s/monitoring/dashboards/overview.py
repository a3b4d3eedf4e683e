"""The first page to look at: what is wrong, since when, and where."""

from __future__ import annotations

from reir_k8s.monitoring.dashboards.panels import (
    ALL,
    GALLERY,
    JOB,
    NONE,
    RATE,
    Graph,
    Limit,
    Number,
    Page,
    or_none,
)
from reir_k8s.monitoring.rules.rule import Limits

_LIMITS = Limits()

_STATE = (
    Number(
        "Alerts that fire",
        "Number of alerts that fire now. The graph of alerts below shows which, and since when.",
        # Without an alert there is no series to count, and the panel would say that it has no data.
        {"alerts": 'count(ALERTS{alertstate="firing"}) or vector(0)'},
        limit=NONE,
    ),
    Number(
        "Targets that cannot be scraped",
        "Servers, monitors and nodes that do not answer Prometheus, by job. An indexing run that "
        "has ended no longer answers, which is no fault.",
        {"{{job}}": f"count by (job) (up{{{JOB}}} == 0)" + or_none("job")},
        limit=NONE,
        runbook="server-down",
    ),
    Number(
        "Store answers",
        "1 if the store answers the monitor, 0 if it does not.",
        {"store": f"min(reir_monitor_store_up{{{JOB}}})"},
        limit=ALL,
        runbook="store-down",
    ),
    Number(
        "Replicas",
        "Number of replicas that answer requests.",
        {"replicas": f"sum(reir_serve_replicas{{{JOB}}})"},
        limit=ALL,
        runbook="server-down",
    ),
)
_ALERTS = (
    Graph(
        "Alerts over time",
        "Number of alerts that fire, by name: what is wrong, and since when.",
        {
            "{{alertname}}": 'count by (alertname) (ALERTS{alertstate="firing"})'
            + or_none("alertname")
        },
    ),
    Graph(
        "Requests by status",
        "Requests a second, by status of the answer: 2xx are answered, 4xx are faults of the "
        "client, 5xx are faults of the server.",
        {"{{status}}": f"sum by (status) (rate(reir_serve_requests_total{{{JOB}}}{RATE}))"},
        unit="reqps",
    ),
    Graph(
        "Share of requests that fail",
        "Requests of users that end with 5xx, over 5 minutes. The line is the share at which the "
        "error budget is used up at the highest rate that is tolerated.",
        # The series that the alert reads, so that both agree; it sums over all jobs.
        {"failed": "reir:serve_failed:ratio_rate5m"},
        unit="percentunit",
        limit=Limit(_LIMITS.page_burn * _LIMITS.error_budget),
        runbook="error-budget",
    ),
    Graph(
        "Time of a search",
        "Half of the searches, and 95% of them, are answered within this time.",
        {
            name: f"histogram_quantile({share}, sum by (le) "
            f'(rate(reir_serve_latency_seconds_bucket{{{JOB}, route="/v1/search"}}{RATE})))'
            for name, share in (("half", 0.5), ("95%", 0.95))
        },
        unit="s",
        limit=Limit(_LIMITS.latency_s),
        runbook="searches-slow",
    ),
    Graph(
        "Free disk of the store",
        "Share of the disk of an embedded store that is free.",
        {
            "{{instance}}": f"reir_monitor_store_free_bytes{{{JOB}}}"
            f" / reir_monitor_store_disk_bytes{{{JOB}}}"
        },
        unit="percentunit",
        limit=Limit(_LIMITS.free, is_minimum=True),
        runbook="disk-full",
    ),
    Graph(
        "Store latency",
        "Time that the store takes to list its galleries.",
        {"{{instance}}": f"reir_monitor_store_latency_seconds{{{JOB}}}"},
        unit="s",
        runbook="store-down",
    ),
)
_GALLERIES = (
    Number(
        "Photos that can be searched",
        "Photos of the live version of each gallery.",
        {"{{gallery}}": f'sum by (gallery) (reir_monitor_photos{{{GALLERY}, status="indexed"}})'},
    ),
    Number(
        "Recall of searches",
        "Recall@10 of recent searches, compared with an exact scan.",
        {"{{gallery}}": f"min by (gallery) (reir_monitor_recall_ratio{{{GALLERY}}})"},
        unit="percentunit",
        limit=Limit(_LIMITS.recall, is_minimum=True),
        runbook="recall-low",
    ),
    Number(
        "Time since the last indexing run",
        "Time since `reir index` or `reir reindex` last ended. Newer photos are not found.",
        {
            "{{gallery}}": "time() - max by (gallery) "
            f"(reir_monitor_index_timestamp_seconds{{{GALLERY}}})"
        },
        unit="s",
        limit=Limit(_LIMITS.index_age_s),
        runbook="index-stale",
    ),
    Number(
        "Time since the last backup",
        "Time since the last backup of each gallery ended.",
        {
            "{{gallery}}": "time() - max by (gallery) "
            f"(reir_monitor_backup_timestamp_seconds{{{GALLERY}}})"
        },
        unit="s",
        limit=Limit(_LIMITS.backup_age_s),
        runbook="backup-old",
    ),
)
_JOBS = (
    Number(
        "Scheduler runs",
        "1 if a scheduler runs the schedules of the machine, 0 if there are schedules but no "
        "scheduler.",
        {"{{instance}}": f"reir_monitor_scheduler_up{{{JOB}}}"},
        limit=ALL,
        runbook="scheduler-down",
    ),
    Number(
        "Schedules whose last run failed",
        "1 for each schedule whose last run failed, was stopped, or exceeded its time limit.",
        {"{{schedule}}": f"max by (schedule) (reir_monitor_schedule_failed{{{JOB}}})"},
        limit=NONE,
        runbook="schedule-failed",
    ),
    Number(
        "Time until a schedule is late",
        "Time until each schedule should have succeeded again; below 0 it is late.",
        {
            "{{schedule}}": "min by (schedule) "
            f"(reir_monitor_schedule_due_timestamp_seconds{{{JOB}}}) - time()"
        },
        unit="s",
        limit=Limit(0, is_minimum=True),
        runbook="schedule-late",
    ),
    Number(
        "Checks of the monitor that fail",
        "1 for each check of the monitor that ended with an error; its values are then those of "
        "its last success.",
        {"{{check}}": f"max by (check) (reir_monitor_check_failed{{{JOB}}})"},
        limit=NONE,
        runbook="monitor-check",
    ),
)

OVERVIEW = Page(
    name="overview",
    title="REIR: overview",
    description="Is something wrong, since when, and where? The other dashboards say why.",
    variables={"gallery": "reir_monitor_instances"},
    rows={
        "State": _STATE,
        "What users notice": _ALERTS,
        "Galleries": _GALLERIES,
        "Schedules and monitor": _JOBS,
    },
)

"""`reir serve`: requests, where their time goes, and the replicas."""

from __future__ import annotations

from reir_k8s.monitoring.dashboards.panels import (
    ALL,
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


def _quantile(share: float, metric: str, label: str) -> str:
    return (
        f"histogram_quantile({share}, sum by (le, {label}) (rate({metric}_bucket{{{JOB}}}{RATE})))"
    )


_STATE = (
    Number(
        "Replicas",
        "Number of replicas that answer requests.",
        {"replicas": f"sum(reir_serve_replicas{{{JOB}}})"},
        limit=ALL,
        runbook="server-down",
    ),
    Number(
        "Share of requests that fail",
        "Requests of users that end with 5xx, over 5 minutes.",
        {"failed": "reir:serve_failed:ratio_rate5m"},
        unit="percentunit",
        limit=Limit(_LIMITS.page_burn * _LIMITS.error_budget),
        runbook="error-budget",
    ),
    Number(
        "Requests in progress",
        "Requests that have not been answered yet.",
        {"requests": f"sum(reir_serve_in_flight_requests{{{JOB}}})"},
        runbook="server-overloaded",
    ),
    Number(
        "Speed at which the error budget is used up",
        "1 means that the budget lasts exactly for its period; over one hour.",
        {"over 1 hour": "reir:serve_budget_burn:ratio_rate1h"},
        limit=Limit(_LIMITS.ticket_burn),
        runbook="error-budget",
    ),
)
_REQUESTS = (
    Graph(
        "Requests by route",
        "Requests a second, of users and of health checks.",
        {"{{route}}": f"sum by (route) (rate(reir_serve_requests_total{{{JOB}}}{RATE}))"},
        unit="reqps",
    ),
    Graph(
        "Requests by status",
        "Requests a second. Requests that were rejected before their route was known are included.",
        {"{{status}}": f"sum by (status) (rate(reir_serve_requests_total{{{JOB}}}{RATE}))"},
        unit="reqps",
        runbook="error-budget",
    ),
    Graph(
        "Problems",
        "Requests a second that ended with a problem, by kind (docs/api.md lists them). Only kinds "
        "that have occurred are shown.",
        {
            # Counters of all problems exist from the start, at zero; `> 0` hides unused ones.
            "{{problem}}": "sum by (problem) "
            f"(rate(reir_serve_problems_total{{{JOB}}}{RATE})) > 0" + or_none("problem")
        },
        unit="reqps",
        runbook="error-budget",
    ),
    Graph(
        "Share of requests that are rejected",
        "Requests that are rejected at once, because as many as allowed are in progress and "
        "waiting.",
        {"rejected": "reir:serve_rejected:ratio_rate5m"},
        unit="percentunit",
        limit=Limit(_LIMITS.rejected),
        runbook="server-overloaded",
    ),
)
_TIME = (
    Graph(
        "Time of a request by route",
        "95% of the requests are answered within this time.",
        {"{{route}}": _quantile(0.95, "reir_serve_latency_seconds", "route")},
        unit="s",
        limit=Limit(_LIMITS.latency_s),
        runbook="searches-slow",
    ),
    Graph(
        "Time of a stage of a search",
        "95% of the searches spend less time in this stage.",
        {"{{stage}}": _quantile(0.95, "reir_serve_stage_seconds", "stage")},
        unit="s",
        runbook="searches-slow",
    ),
    Graph(
        "Answers without a stage",
        "Answers a second for which this stage was skipped, because it would have taken longer "
        "than the time budget, or because it failed.",
        {"{{stage}}": f"sum by (stage) (rate(reir_serve_degraded_total{{{JOB}}}{RATE}))"},
        unit="reqps",
        runbook="searches-slow",
    ),
    Graph(
        "Calls that wait for a worker",
        "A queue that grows means that this worker is the bottleneck.",
        {"{{worker}}": f"sum by (worker) (reir_serve_worker_waiting{{{JOB}}})"},
        runbook="server-overloaded",
    ),
    Graph(
        "Calls in a batch of a worker",
        "Mean size. Batches grow with the load, which saves time for each call.",
        {
            "{{worker}}": f"sum by (worker) (rate(reir_serve_worker_batch_sum{{{JOB}}}{RATE}))"
            f" / sum by (worker) (rate(reir_serve_worker_batch_count{{{JOB}}}{RATE}))"
        },
    ),
    Graph(
        "Queries in a search",
        "Mean number of queries that one call of the backend answers.",
        {
            "queries": f"sum(rate(reir_serve_batch_queries_sum{{{JOB}}}{RATE}))"
            f" / sum(rate(reir_serve_batch_queries_count{{{JOB}}}{RATE}))"
        },
    ),
)
_HAPROXY = (
    Graph(
        "Replicas that HAProxy uses",
        "Replicas that pass HAProxy's health checks. Without any, users get status 503.",
        # Ray Serve names a backend after its protocol and its application.
        {"replicas": f'sum(haproxy_backend_active_servers{{{JOB}, proxy="http-reir"}})'},
        limit=ALL,
        runbook="server-down",
    ),
    Graph(
        "Answers of HAProxy by class",
        "Answers a second that clients got, including those of HAProxy itself while no replica "
        "answers.",
        {
            "{{code}}": "sum by (code) (rate("
            f'haproxy_backend_http_responses_total{{{JOB}, proxy="http-reir"}}{RATE}))'
        },
        unit="reqps",
        runbook="server-down",
    ),
    Graph(
        "Requests that were sent once more",
        "Requests a second that HAProxy sent to another replica, because the first one did not "
        "take them.",
        {
            "requests": "sum(rate("
            f'haproxy_backend_retry_warnings_total{{{JOB}, proxy="http-reir"}}{RATE}))'
        },
        unit="reqps",
        runbook="replica-killed",
    ),
)
_USERS = (
    Graph(
        "Photos that users add and delete",
        "Photos a second, over `POST` and `DELETE /v1/galleries/GALLERY/images`.",
        {"{{action}}": f"sum by (action) (rate(reir_serve_writes_total{{{JOB}}}{RATE}))"},
        unit="wps",
    ),
    Graph(
        "Feedback",
        "Verdicts of users a second: the hit is right or wrong, the object is in a box instead, or "
        "it is absent.",
        {"{{verdict}}": f"sum by (verdict) (rate(reir_serve_feedback_total{{{JOB}}}{RATE}))"},
        unit="ops",
    ),
    Graph(
        "Lost events of the search log",
        "Events that could not be written within an hour. Searches are answered all the same.",
        {"events": f"sum(increase(reir_serve_search_log_dropped_total{{{JOB}}}[1h]))"},
        limit=Limit(1),
        runbook="search-log-dropped",
    ),
)
_RAY = (
    Graph(
        "Replicas that were killed",
        "Replicas that ended within 10 minutes without having been stopped.",
        {"replicas": f"sum(increase(reir_serve_replicas_killed_total{{{JOB}}}[10m]))"},
        limit=NONE,
        runbook="replica-killed",
    ),
    Graph(
        "Replicas by deployment",
        "Replicas of Ray Serve that passed their last health check, and how many there should be.",
        {
            "{{deployment}}, healthy": "sum by (deployment) "
            f"(ray_serve_deployment_replica_healthy{{{JOB}}})",
            "{{deployment}}, wanted": "max by (deployment) "
            f"(ray_serve_autoscaling_target_replicas{{{JOB}}})",
        },
        runbook="replica-killed",
    ),
    Graph(
        "Starts of replicas",
        "Starts within 10 minutes; more than a new version or more load explains are restarts.",
        {
            "{{deployment}}": "sum by (deployment) "
            f"(increase(ray_serve_deployment_replica_starts_total{{{JOB}}}[10m]))"
        },
        runbook="replica-killed",
    ),
    Graph(
        "Calls that wait for a replica",
        "Calls of a deployment that no replica has taken yet.",
        {"{{deployment}}": f"sum by (deployment) (ray_serve_deployment_queued_queries{{{JOB}}})"},
        runbook="server-overloaded",
    ),
    Graph(
        "Use of the CPUs",
        "Of all nodes of the Ray cluster.",
        {"{{instance}}": f"avg by (instance) (ray_node_cpu_utilization{{{JOB}}})"},
        unit="percent",
    ),
    Graph(
        "Use of the memory",
        "Of all nodes of the Ray cluster. Ray kills processes of a node whose memory is full.",
        {
            "{{instance}}": f"sum by (instance) (ray_node_mem_used{{{JOB}}})"
            f" / sum by (instance) (ray_node_mem_total{{{JOB}}})"
        },
        unit="percentunit",
        limit=Limit(0.95),
        runbook="replica-killed",
    ),
    Graph(
        "Use of Ray's disk",
        "Of all nodes of the Ray cluster.",
        {"{{instance}}": f"avg by (instance) (ray_node_disk_utilization_percentage{{{JOB}}})"},
        unit="percent",
        limit=Limit(95),
        runbook="disk-full",
    ),
)

SERVING = Page(
    name="serving",
    title="REIR: serving",
    description="Which requests fail or are slow, in which stage, and in which replicas?",
    rows={
        "State": _STATE,
        "Requests": _REQUESTS,
        "Where the time goes": _TIME,
        "HAProxy, where Prometheus scrapes it": _HAPROXY,
        "What users do": _USERS,
        "Replicas and nodes": _RAY,
    },
)

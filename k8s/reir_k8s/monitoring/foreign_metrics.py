"""Metrics of Ray, HAProxy and Prometheus that dashboards and rules use.

The platform does not declare them, so they are declared here once more, as far as they are used.
Names, types and labels are those that Ray 2.60 and HAProxy 2.8 export; `benchmarks/dashboards.py`
checks that they exist.
"""

from __future__ import annotations

from collections.abc import Mapping

from reir.prometheus_metric import PrometheusMetric

RAY_SERVE = (
    PrometheusMetric(
        "ray_serve_deployment_replica_healthy",
        "gauge",
        "Whether a replica passed its last health check: 1 or 0.",
        ("application", "deployment", "replica"),
    ),
    PrometheusMetric(
        "ray_serve_autoscaling_target_replicas",
        "gauge",
        "Number of replicas that Ray Serve wants to run.",
        ("application", "deployment"),
    ),
    PrometheusMetric(
        "ray_serve_deployment_queued_queries",
        "gauge",
        "Calls of a deployment that no replica has taken yet.",
        ("application", "deployment"),
    ),
    PrometheusMetric(
        "ray_serve_deployment_replica_starts_total",
        "counter",
        "Starts of replicas, including restarts after a failure.",
        ("application", "deployment", "replica"),
    ),
)
RAY_NODE = (
    PrometheusMetric(
        "ray_node_cpu_utilization", "gauge", "Use of all CPUs of a node, in percent.", ("instance",)
    ),
    PrometheusMetric(
        "ray_node_gpus_utilization",
        "gauge",
        "Use of each GPU of a node, in percent; missing on nodes without GPUs.",
        ("instance", "GpuIndex"),
    ),
    PrometheusMetric(
        "ray_node_mem_used", "gauge", "Memory of a node in use, in bytes.", ("instance",)
    ),
    PrometheusMetric("ray_node_mem_total", "gauge", "Memory of a node, in bytes.", ("instance",)),
    PrometheusMetric(
        "ray_node_disk_utilization_percentage",
        "gauge",
        "Use of the disk with Ray's files, in percent.",
        ("instance",),
    ),
)
RAY_DATA = (
    PrometheusMetric(
        "ray_data_output_rows",
        "gauge",
        "Rows that an operator has put out since the run began.",
        ("dataset", "operator"),
    ),
)
RAY_TRAIN = (
    PrometheusMetric(
        "ray_train_controller_state",
        "gauge",
        "State of the controller of a run: 1 for the one that it is in.",
        ("ray_train_run_name", "ray_train_controller_state"),
    ),
)
HAPROXY = (
    PrometheusMetric(
        "haproxy_backend_active_servers",
        "gauge",
        "Replicas that HAProxy sends requests to.",
        ("proxy",),
    ),
    PrometheusMetric(
        "haproxy_backend_http_responses_total",
        "counter",
        "Answers by class of their status: 2xx to 5xx.",
        ("proxy", "code"),
    ),
    PrometheusMetric(
        "haproxy_backend_retry_warnings_total",
        "counter",
        "Requests that were sent to a replica once more.",
        ("proxy",),
    ),
)
PROMETHEUS = (
    PrometheusMetric(
        "up", "gauge", "Whether Prometheus could scrape a target: 1 or 0.", ("job", "instance")
    ),
    PrometheusMetric(
        "ALERTS", "gauge", "Alerts that are pending or firing.", ("alertname", "alertstate")
    ),
)

SOURCES: Mapping[str, tuple[PrometheusMetric, ...]] = {
    "Ray Serve": RAY_SERVE,
    "Ray Data": RAY_DATA,
    "Ray Train": RAY_TRAIN,
    "Ray nodes": RAY_NODE,
    "HAProxy": HAPROXY,
    "Prometheus": PROMETHEUS,
}
"""Program -> its metrics."""

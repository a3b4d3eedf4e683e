"""`reir index` and `reir reindex`: progress, failures and the slowest stage of each run."""

from __future__ import annotations

from reir_k8s.monitoring.dashboards.panels import (
    GALLERY,
    JOB,
    NONE,
    RATE,
    Graph,
    Limit,
    Number,
    Page,
)
from reir_k8s.monitoring.rules.rule import Limits

_LIMITS = Limits()

_GALLERIES = (
    Number(
        "Time since the last run",
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
        "Instances",
        "Instances of the live version.",
        {"{{gallery}}": f"max by (gallery) (reir_monitor_instances{{{GALLERY}}})"},
    ),
    Number(
        "Re-indexing jobs that stopped",
        "1 if the last job has not ended, but no process works on it.",
        {"{{gallery}}": f"max by (gallery) (reir_monitor_reindex_stopped{{{GALLERY}}})"},
        limit=NONE,
        runbook="reindex-stopped",
    ),
    Number(
        "State of the last re-indexing job",
        "The state is behind the name of the gallery: a rejected or stopped job needs a person.",
        {
            "{{gallery}}: {{state}}": "max by (gallery, state) "
            f"(reir_monitor_reindex_state{{{GALLERY}}})"
        },
        runbook="reindex-rejected",
    ),
    Graph(
        "Photos by status",
        "Photos of the live version.",
        {"{{gallery}}, {{status}}": f"sum by (gallery, status) (reir_monitor_photos{{{GALLERY}}})"},
    ),
    Graph(
        "Photos that could not be indexed",
        "By reason; `reir failures GALLERY` lists the files.",
        {
            "{{gallery}}, {{reason}}": "sum by (gallery, reason) "
            f"(reir_monitor_failed_photos{{{GALLERY}}})"
        },
        runbook="index-failures",
    ),
    Graph(
        "Share of photos that could not be indexed",
        "Of all photos of the live version.",
        {
            "{{gallery}}": "sum by (gallery) "
            f'(reir_monitor_photos{{{GALLERY}, status="failed"}})'
            f" / sum by (gallery) (reir_monitor_photos{{{GALLERY}}})"
        },
        unit="percentunit",
        limit=Limit(_LIMITS.failed_photos),
        runbook="index-failures",
    ),
    Graph(
        "Versions",
        "Versions of each gallery, including the live one. Each takes as much disk as the live "
        "one.",
        {"{{gallery}}": f"max by (gallery) (reir_monitor_versions{{{GALLERY}}})"},
        runbook="disk-full",
    ),
    Graph(
        "Size of the store",
        "Size of the files of an embedded store.",
        {"{{instance}}": f"reir_monitor_store_size_bytes{{{JOB}}}"},
        unit="bytes",
        runbook="disk-full",
    ),
    Graph(
        "Time since a re-indexing job changed its state",
        "A job that stays in one state for longer than usual is slow or has stopped.",
        {
            "{{gallery}}": "time() - max by (gallery) "
            f"(reir_monitor_reindex_timestamp_seconds{{{GALLERY}}})"
        },
        unit="s",
        runbook="reindex-stopped",
    ),
)
# Metrics of a run end with its process. Numbers that are not instant show its last values.
_RUN = (
    Number(
        "Progress of the run",
        "Share of the photos of the source that are done.",
        {
            "{{instance}}": f"sum by (instance) (reir_index_images_total{{{JOB}}})"
            f" / sum by (instance) (reir_index_source_images{{{JOB}}})"
        },
        unit="percentunit",
        is_instant=False,
    ),
    Number(
        "Photos in the source",
        "Number of photos that the run has listed.",
        {"{{instance}}": f"sum by (instance) (reir_index_source_images{{{JOB}}})"},
        is_instant=False,
    ),
    Number(
        "Failed photos of the run",
        "Photos that could not be indexed since the run began.",
        {"{{instance}}": f'sum by (instance) (reir_index_images_total{{{JOB}, outcome="failed"}})'},
        limit=NONE,
        runbook="index-failures",
        is_instant=False,
    ),
    Number(
        "Duplicates",
        "Photos whose content another photo of the gallery already has.",
        {"{{instance}}": f"sum by (instance) (reir_index_duplicates_total{{{JOB}}})"},
        is_instant=False,
    ),
    Graph(
        "Photos by outcome",
        "Photos a second. None for several minutes means that the run has stalled.",
        {"{{outcome}}": f"sum by (outcome) (rate(reir_index_images_total{{{JOB}}}{RATE}))"},
        unit="ops",
    ),
    Graph(
        "Failures by reason",
        "Photos a second that could not be indexed. `unreachable` and `unreadable` point to the "
        "storage, other reasons to the files.",
        {"{{reason}}": f"sum by (reason) (rate(reir_index_failures_total{{{JOB}}}{RATE}))"},
        unit="ops",
        runbook="index-failures",
    ),
    Graph(
        "Busy time by stage",
        "Threads that each stage keeps busy. The largest one is the bottleneck.",
        {"{{stage}}": f"sum by (stage) (rate(reir_index_stage_busy_seconds_total{{{JOB}}}{RATE}))"},
    ),
    Graph(
        "Results that wait for the next stage",
        "A full queue points to the stage behind it, an empty one to the stage before it.",
        {"{{queue}}": f"sum by (queue) (reir_index_queue_items{{{JOB}}})"},
    ),
    Graph(
        "Use of the encoders",
        "Share of time that the encoders are busy. If it is low, reading or the store is the "
        "bottleneck.",
        {"{{instance}}": f"avg by (instance) (reir_index_encoder_busy_ratio{{{JOB}}})"},
        unit="percentunit",
    ),
    Graph(
        "Data read",
        "Size of the photo files that are read.",
        {"{{instance}}": f"sum by (instance) (rate(reir_index_read_bytes_total{{{JOB}}}{RATE}))"},
        unit="Bps",
    ),
    Graph(
        "Instances written",
        "Instances a second that reach the store.",
        {"{{instance}}": f"sum by (instance) (rate(reir_index_instances_total{{{JOB}}}{RATE}))"},
        unit="wps",
    ),
    Graph(
        "Time to write a batch, and until a photo is searchable",
        "95% take less time. The second one counts from the listing of the file.",
        {
            name: f"histogram_quantile(0.95, sum by (le) (rate({metric}_bucket{{{JOB}}}{RATE})))"
            for name, metric in (
                ("write a batch", "reir_index_store_latency_seconds"),
                ("until searchable", "reir_index_freshness_seconds"),
            )
        },
        unit="s",
        runbook="store-down",
    ),
    Graph(
        "Rows that operators of Ray Data put out",
        "Rows a second of a run on Ray (`--runner ray`), by operator. The first operator that puts "
        "out fewer than the others before it is the bottleneck.",
        # Ray declares a gauge, but its value only grows, so that `rate` applies to it.
        {"{{operator}}": f"sum by (operator) (rate(ray_data_output_rows{{{JOB}}}{RATE}))"},
        unit="ops",
    ),
)

INGESTION = Page(
    name="ingestion",
    title="REIR: indexing",
    description="Do indexing runs make progress, what fails, and what slows them down?",
    variables={"gallery": "reir_monitor_instances"},
    rows={"Galleries": _GALLERIES, "Runs with --metrics-port": _RUN},
)

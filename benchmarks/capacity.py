"""Machines and money for galleries of several sizes, computed from what other benchmarks measured.

    python benchmarks/capacity.py

Reads `benchmarks/results`, measures nothing, and writes the table of docs/operations/capacity.md,
which explains each line. The plan for the store is that of `scale_plan.py`; the lines for indexing
and serving come from `indexing.json` and `overload.json`. Prices and load are assumptions, set by
options.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from typing import Any

from _pages import replace_section
from _report import RESULTS, ROOT, write_report
from scale_plan import add_options, measured, plan

PAGE = ROOT / "docs" / "operations" / "capacity.md"
BEGIN, END = "<!-- capacity -->", "<!-- end of capacity -->"
PHOTOS = (10_000, 100_000, 1_000_000, 10_000_000, 100_000_000, 1_000_000_000)
MEASURED_INSTANCES = 1_000_000
"""Size of the largest gallery that was measured; what is larger is extrapolated."""

HOURS_A_MONTH = 730


def figures_of(name: str) -> tuple[Mapping[str, Any], int]:
    """Return the figures of a result, and the cores of the machine that made it."""
    report = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return report["figures"], report["machine"]["cores"]


def capacity(photos: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return what a gallery of so many photos needs."""
    found, missing = measured()
    if missing:
        raise SystemExit(f"{', '.join(missing)} not in benchmarks/results")
    instances = photos * options.per_photo
    chosen = argparse.Namespace(**{**vars(options), "instances": instances})
    lines = plan(found, chosen)
    embedded = instances <= lines["scale.exact_limit"]
    indexing, _ = figures_of("indexing")
    overload, cores = figures_of("overload")
    busy_s = {key: indexing[f"p4.busy_seconds_{key}"] for key in ("read", "decode", "store")}
    rate_a_week = photos / (7 * 24 * 3600)
    query_s = cores / overload["p10.saturation.good_per_s"]
    if embedded:  # the replicas search themselves
        query_s += lines["scale.exact_ms_per_million"] * instances / 1e9
    serving_cores = options.qps * query_s / options.busy
    nodes = 0 if embedded else lines["scale.nodes_float"]
    store_cost = nodes * options.replicas * options.node_price * HOURS_A_MONTH
    disk_cost = 0 if embedded else lines["scale.disk_gib"] * options.disk_price
    serving_cost = math.ceil(serving_cores) * options.core_price * HOURS_A_MONTH
    return {
        "instances": instances,
        "basis": "measured" if instances <= MEASURED_INSTANCES else "extrapolated",
        "store": "embedded" if embedded else "Milvus",
        "search_cpu_ms": round(
            lines["scale.exact_ms_per_million"] * instances / 1e6
            if embedded
            else lines["scale.cpu_ms_a_query"]
        ),
        "shards": 0 if embedded else lines["scale.shards"],
        "memory_gib": 0 if embedded else lines["scale.memory_gib_float"],
        "disk_gib": 0 if embedded else lines["scale.disk_gib"],
        "query_nodes": nodes * options.replicas,
        "serving_cores": math.ceil(serving_cores),
        "index_core_hours": lines["scale.index_core_hours"],
        "index_cost": lines["scale.index_cost"],
        "encoder_rate_for_a_week": round(rate_a_week, 1),
        "io_cores_for_a_week": math.ceil(
            rate_a_week * sum(busy_s.values()) / indexing["p4.images"] / options.busy
        ),
        "monthly_cost": round(store_cost + disk_cost + serving_cost),
    }


ROWS: Mapping[str, str] = {
    "instances": "instances",
    "basis": "store figures are",
    "store": "store",
    "search_cpu_ms": "CPU time of one search in the store, ms",
    "shards": "graphs of the server",
    "memory_gib": "memory of the server, GiB",
    "disk_gib": "disk of the server, GiB",
    "query_nodes": "query nodes, with replicas",
    "serving_cores": "cores of `reir serve`",
    "index_core_hours": "core hours of the first indexing",
    "index_cost": "cost of the first indexing, $",
    "encoder_rate_for_a_week": "photos/s to index all within a week",
    "io_cores_for_a_week": "cores beside the encoders, for that rate",
    "monthly_cost": "store and serving, $ a month",
}


def table(columns: Mapping[int, Mapping[str, Any]]) -> str:
    """Return the figures of all sizes as Markdown."""
    lines = [
        "| photos | " + " | ".join(f"{photos:,}" for photos in columns) + " |",
        "|---|" + "--:|" * len(columns),
    ]
    for key, label in ROWS.items():
        cells = [_said(each[key]) for each in columns.values()]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _said(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "-" if not value else f"{value:,.0f}" if value == int(value) else f"{value:,}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.set_defaults(shard=1e7)
    parser.add_argument("--replicas", type=int, default=2, help="Copies of each vector in memory.")
    parser.add_argument("--disk-price", type=float, default=0.10, help="USD per GiB and month.")
    options = parser.parse_args()
    columns = {photos: capacity(photos, options) for photos in PHOTOS}
    print(table(columns))
    flat = {
        f"capacity.{photos}.{key}": value
        for photos, each in columns.items()
        for key, value in each.items()
    }
    write_report("capacity", flat)  # before the page, whose change would make the tree dirty
    PAGE.write_text(replace_section(PAGE.read_text(), BEGIN, END, table(columns)))


if __name__ == "__main__":
    main()

"""A plan for many instances, computed from what the other benchmarks measured.

    python benchmarks/scale_plan.py [--instances 1e9]

Reads `benchmarks/results`, measures nothing, and writes both tables of docs/scale.md, which gives
the formula of each line. Prices and the load are assumptions, set by options.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from _pages import replace_section
from _report import RESULTS, ROOT, write_report

GIB = 2**30
DIM = 256
FLOAT_BYTES = 4 * DIM
SIZES = {"10k": 1e4, "30k": 3e4, "100k": 1e5, "1m": 1e6}
SOURCES = (
    "vector_search",
    "vector_search_million",
    "vector_search_server",
    "quantization",
    "indexing",
)


def measured() -> tuple[dict[str, Any], list[str]]:
    """Return the figures of all sources with the cores that each had, and the missing sources."""
    figures: dict[str, Any] = {}
    missing = []
    for name in SOURCES:
        path = RESULTS / f"{name}.json"
        if not path.exists():
            missing.append(path.name)
            continue
        report = json.loads(path.read_text(encoding="utf-8"))
        figures |= report["figures"] | {f"{name}.cores": report["machine"]["cores"]}
    return figures, missing


def by_size(figures: Mapping[str, Any], prefix: str, key: str) -> tuple[list[float], list[float]]:
    """Return sizes and values of `<prefix><size>.<key>`, smallest size first."""
    found = {
        count: float(figures[f"{prefix}{size}.{key}"])
        for size, count in SIZES.items()
        if f"{prefix}{size}.{key}" in figures
    }
    return list(found), list(found.values())


def slope(points: tuple[list[float], list[float]]) -> float:
    """Return the least-squares growth of a value with the number of instances."""
    return float(np.polyfit(*points, 1)[0])


def per_decade(points: tuple[list[float], list[float]]) -> tuple[float, float]:
    """Return a value as (start, growth per factor of ten), which fits searches of a graph."""
    growth, start = np.polyfit(np.log10(points[0]), points[1], 1)
    return float(start), float(growth)


def plan(figures: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Return the lines of the plan, with the names of docs/scale.md."""
    count = options.instances
    photos = count / options.per_photo
    graph_bytes = slope(by_size(figures, "p1.server_", "anon_mib")) * 2**20
    disk_bytes = slope(by_size(figures, "p1.server_", "disk_mib")) * 2**20
    code_bytes = figures["p1.quantised.int8.bytes"]
    int8_bytes = graph_bytes - FLOAT_BYTES + code_bytes
    taken = by_size(figures, "p1.server_", "ours.cpu_ms")
    start, growth = per_decade(taken)
    # The smallest gallery costs hardly more than the request itself.
    request_ms = taken[1][0]
    shards = math.ceil(count / options.shard)
    walk_ms = start + growth * math.log10(options.shard) - request_ms
    query_ms = request_ms + shards * walk_ms
    cores = options.qps * query_ms / 1e3 / options.busy
    usable_bytes = options.node_gib * GIB * options.fill
    # Whichever is scarcer, memory or cores, decides about the number of nodes.
    nodes = {
        name: max(math.ceil(count * each / usable_bytes), math.ceil(cores / options.node_cores))
        for name, each in (("float", graph_bytes), ("int8", int8_bytes))
    }
    core_hours = photos / figures["p4.images_per_s_ours"] * figures["indexing.cores"] / 3600
    scan_ms = slope(by_size(figures, "p1.", "ours.cpu_ms"))
    return {
        "scale.instances": count,
        "scale.photos": round(photos),
        "scale.exact_ms_per_million": round(scan_ms * 1e6, 1),
        "scale.exact_limit": round(options.exact_ms / scan_ms),
        "scale.bytes_float": round(graph_bytes),
        "scale.bytes_int8": round(int8_bytes),
        "scale.memory_gib_float": round(count * graph_bytes / GIB),
        "scale.memory_gib_int8": round(count * int8_bytes / GIB),
        "scale.disk_gib": round(count * disk_bytes / GIB),
        "scale.shards": shards,
        "scale.cpu_ms_a_query": round(query_ms, 1),
        "scale.cores": math.ceil(cores),
        "scale.nodes_float": nodes["float"],
        "scale.nodes_int8": nodes["int8"],
        "scale.monthly_cost_float": round(nodes["float"] * options.node_price * 730),
        "scale.monthly_cost_int8": round(nodes["int8"] * options.node_price * 730),
        "scale.index_core_hours": round(core_hours),
        "scale.index_cost": round(core_hours * options.core_price),
        "scale.gpu_rate_for_a_week": round(photos / (7 * 24 * 3600), 1),
    }


COLUMNS = {
    "one search in the embedded store, ms": "p1.{}.ours.p50_ms",
    "processor time of that search, ms": "p1.{}.ours.cpu_ms",
    "one search in plain Milvus Lite, FLAT index, ms": "p1.{}.lite_flat.p50_ms",
    "one search in plain Milvus Lite, HNSW index, ms": "p1.{}.lite_hnsw.p50_ms",
    "one search on a Milvus server, ms": "p1.server_{}.ours.p50_ms",
    "processor time of that search on the server, ms": "p1.server_{}.ours.cpu_ms",
    "first search of a process in the embedded store, ms": "p1.{}.ours.first_search_ms",
    "memory that each searching process has for itself, MiB": "p1.{}.ours.own_mib",
    "memory that all searching processes share, MiB": "p1.{}.ours.mapped_mib",
    "embedded store on disk, MiB": "p1.{}.ours.disk_mib",
    "memory of the server, MiB": "p1.server_{}.anon_mib",
    "data of the server on disk, MiB": "p1.server_{}.disk_mib",
}


def measured_table(figures: Mapping[str, Any]) -> str:
    """Return the measured figures at each size, as Markdown."""
    head = ["instances", *(f"{count:,.0f}" for count in SIZES.values())]
    lines = [head, ["---", *("--:" for _ in SIZES)]]
    for label, key in COLUMNS.items():
        lines.append([label, *(str(figures.get(key.format(size), "")) for size in SIZES)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plan_table(figures: Mapping[str, Any]) -> str:
    """Return the lines of the plan, as Markdown."""
    lines = [
        f"| `{key.removeprefix('scale.')}` | {_said(value)} |" for key, value in figures.items()
    ]
    return "\n".join(["| line | value |", "|---|--:|", *lines])


def _said(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,}"


def write_page(tables: Mapping[str, str]) -> None:
    """Put the tables between their markers in docs/scale.md."""
    path = ROOT / "docs" / "scale.md"
    text = path.read_text(encoding="utf-8")
    for name, table in tables.items():
        text = replace_section(text, f"<!-- {name} -->", f"<!-- end of {name} -->", table)
    path.write_text(text, encoding="utf-8")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `plan` reads, except for the number of instances."""
    parser.add_argument("--per-photo", type=float, default=30)
    parser.add_argument("--shard", type=float, default=1e6, help="Instances of one graph.")
    parser.add_argument(
        "--exact-ms", type=float, default=100, help="Time limit of an exact search."
    )
    parser.add_argument("--qps", type=float, default=100, help="Queries per second.")
    parser.add_argument("--busy", type=float, default=0.5, help="Planned load of a core.")
    parser.add_argument("--node-gib", type=float, default=256)
    parser.add_argument("--node-cores", type=float, default=32)
    parser.add_argument("--fill", type=float, default=0.7, help="Usable share of memory.")
    parser.add_argument("--node-price", type=float, default=2.0, help="USD per hour.")
    parser.add_argument("--core-price", type=float, default=0.04, help="USD per hour.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--instances", type=float, default=1e9)
    options = parser.parse_args()
    found, missing = measured()
    write_page({"measured": measured_table(found)})
    if missing:
        write_page({"plan": f"Not computed: {', '.join(missing)} not measured yet."})
        raise SystemExit(f"no plan: {', '.join(missing)} not in benchmarks/results")
    figures = plan(found, options)
    for key, value in figures.items():
        print(f"{key:32} {_said(value)}")
    write_report("scale_plan", figures)
    write_page({"plan": plan_table(figures)})


if __name__ == "__main__":
    main()

"""More requests than the service can answer: admitted ones stay fast, the rest are refused early.

    python benchmarks/overload.py

Saturation is the rate that 12 clients get that send a request as soon as they have their answer.
Then requests arrive at 1, 2, 4 and 8 times that rate, however long the answers take (`_load.lua`).
The loads take turns, and their figures are medians over the rounds, because the speed of a shared
machine changes.

    p10.goodput_4x     answers per second at 4 times saturation, relative to the best load
    p10.p95_ratio_4x   95th percentile of answered requests at 4 times saturation, relative to 1x
    p10.unexplained    over all loads: broken connections, 5xx other than 503, and refusals without
                       `Retry-After`
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from _indexing import parser_of
from _load import Answers, closed_load, open_load
from _report import write_report
from _served import add_arguments, bodies, fill_gallery, served

from reir_testing.serving import free_port

CLIENTS = 12
LOADS = {"saturation": 0, "x1": 1, "x2": 2, "x4": 4, "x8": 8}
"""Loads of one round, in this order, as multiples of the rate at saturation."""


def main() -> None:
    """Measure, print and save the figures."""
    parser = parser_of(__doc__)
    add_arguments(parser)
    parser.add_argument("--seconds", type=float, default=12.0, help="Duration of a load.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rerank", action="store_true", help="Use the re-ranker.")
    arguments = parser.parse_args()
    queries = bodies(arguments.queries, rerank=arguments.rerank)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = fill_gallery(arguments, folder)
        with served(store, folder, free_port()) as server:
            url = f"{server.url}/v1/search"
            saturation = closed_load(url, CLIENTS, 5, queries).good_per_s
            loads = {name: list[Answers]() for name in LOADS}
            for _ in range(arguments.rounds):
                for name, times in LOADS.items():
                    if times:
                        rate = times * saturation
                        answers = open_load(url, rate, arguments.seconds, queries)
                    else:
                        answers = closed_load(url, CLIENTS, arguments.seconds, queries)
                        # Measured anew in each round, because the machine's speed changes.
                        saturation = answers.good_per_s
                    loads[name].append(answers)
    figures = {"rounds": arguments.rounds, **_figures(loads)}
    for key, value in figures.items():
        print(f"{key:32} {value}")
    print(f"figures in {write_report('overload', figures).name}")


def _figures(loads: dict[str, list[Answers]]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, rounds in loads.items():
        statuses = sum((Counter(each.statuses) for each in rounds), Counter[str]())
        figures |= {
            f"p10.{name}.offered_per_s": median(each.requests / each.seconds for each in rounds),
            f"p10.{name}.good_per_s": median(each.good_per_s for each in rounds),
            f"p10.{name}.p50_ms": median(each.p50_ms for each in rounds),
            f"p10.{name}.p95_ms": median(each.p95_ms for each in rounds),
            f"p10.{name}.statuses": dict(statuses),
            f"p10.{name}.unexplained": sum(each.unexplained for each in rounds),
        }
    # Relative to the best load, which may be another than saturation.
    peak = max(figures[f"p10.{name}.good_per_s"] for name in loads)
    figures["p10.goodput_4x"] = figures["p10.x4.good_per_s"] / peak
    figures["p10.p95_ratio_4x"] = figures["p10.x4.p95_ms"] / figures["p10.x1.p95_ms"]
    figures["p10.unexplained"] = sum(figures[f"p10.{name}.unexplained"] for name in loads)
    return {
        key: round(value, 3) if isinstance(value, float) else value
        for key, value in figures.items()
    }


if __name__ == "__main__":
    main()

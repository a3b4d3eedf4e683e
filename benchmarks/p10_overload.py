"""P10: more requests than the service can answer: those admitted stay fast, the rest hear so.

    python benchmarks/p10_overload.py

Saturation is what 12 clients get that ask again as soon as they have their answer. Then requests
come at 1, 2, 4 and 8 times that rate, whatever the answers take (`_load.lua`). Loads take turns;
their figures are medians over the rounds, since the speed of a shared machine changes meanwhile.

    p10.goodput_4x     answered a second at 4 times saturation, over the most at any load
    p10.p95_ratio_4x   95th percentile of the answered at 4 times saturation, over that at 1 time
    p10.unexplained    of all loads: broken connections, 5xx other than 503, refusals that do not
                       say when to try again
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

from reir_serving.environment import free_port

CLIENTS = 12
LOADS = {"saturation": 0, "x1": 1, "x2": 2, "x4": 4, "x8": 8}
"""Of one round, in this order: times the rate of saturation."""


def main() -> None:
    """Measure, print and keep the figures."""
    parser = parser_of(__doc__)
    add_arguments(parser)
    parser.add_argument("--seconds", type=float, default=12.0, help="of one load")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rerank", action="store_true", help="with the re-ranker")
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
                        saturation = answers.good_per_s
                    loads[name].append(answers)
    figures = {"rounds": arguments.rounds, **_figures(loads)}
    for key, value in figures.items():
        print(f"{key:32} {value}")
    print(f"figures in {write_report('p10_overload', figures).name}")


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

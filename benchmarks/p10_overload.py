"""P10: more requests than the service can answer: those admitted stay fast, the rest hear so.

    python benchmarks/p10_overload.py

Saturation is what 12 clients get that ask again as soon as they have their answer. Then requests
come at 1, 2, 4 and 8 times that rate, whatever the answers take (`_load.lua`).

    p10.goodput_4x     answered a second at 4 times saturation, over the most at any load
    p10.p95_ratio_4x   95th percentile of the answered at 4 times saturation, over that at 1 time
    p10.unexplained    of all loads: broken connections, 5xx other than 503, refusals that do not
                       say when to try again
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from _indexing import parser_of
from _load import Answers, closed_load, open_load
from _report import write_report
from _served import add_arguments, bodies, fill_gallery, served

from reir_serving.environment import free_port

TIMES = (1, 2, 4, 8)
CLIENTS = 12


def main() -> None:
    """Measure, print and keep the figures."""
    parser = parser_of(__doc__)
    add_arguments(parser)
    parser.add_argument("--seconds", type=float, default=30.0, help="of one load")
    parser.add_argument("--rerank", action="store_true", help="with the re-ranker")
    arguments = parser.parse_args()
    queries = bodies(arguments.queries, rerank=arguments.rerank)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = fill_gallery(arguments, folder)
        with served(store, folder, free_port()) as server:
            url = f"{server.url}/v1/search"
            closed_load(url, CLIENTS, 5, queries)  # warm
            most = closed_load(url, CLIENTS, arguments.seconds, queries)
            loads = {
                times: open_load(url, times * most.good_per_s, arguments.seconds, queries)
                for times in TIMES
            }
    figures = _figures(most, loads)
    for key, value in figures.items():
        print(f"{key:32} {value}")
    print(f"figures in {write_report('p10_overload', figures).name}")


def _figures(most: Answers, loads: dict[int, Answers]) -> dict[str, Any]:
    figures: dict[str, Any] = {"p10.saturation_per_s": round(most.good_per_s, 1)}
    for times, answers in loads.items():
        offered = answers.requests / answers.seconds
        figures |= {
            f"p10.x{times}.offered_per_s": round(offered, 1),
            f"p10.x{times}.good_per_s": round(answers.good_per_s, 1),
            f"p10.x{times}.p50_ms": answers.p50_ms,
            f"p10.x{times}.p95_ms": answers.p95_ms,
            f"p10.x{times}.statuses": dict(answers.statuses),
            f"p10.x{times}.unexplained": answers.unexplained,
        }
    peak = max(most.good_per_s, *(each.good_per_s for each in loads.values()))
    figures["p10.goodput_4x"] = round(loads[4].good_per_s / peak, 3)
    figures["p10.p95_ratio_4x"] = round(loads[4].p95_ms / loads[1].p95_ms, 2)
    figures["p10.unexplained"] = most.unexplained + sum(each.unexplained for each in loads.values())
    return figures


if __name__ == "__main__":
    main()

"""Replicas come and go as the load rises and falls; a plot shows both.

    python benchmarks/serve_scale.py

The rate of requests climbs in steps from a fifth of what one replica can answer to four times that,
and down again. The benchmark counts the answering replicas every second, and records the answers
per second and their 95th percentile for every step. On two cores three replicas answer little more
than one; the benchmark shows that they come, that they go, and that no request is lost.

    serve.scale_most       largest number of replicas
    serve.scale_up_s       from the first step that exceeds one replica to the third replica
    serve.scale_down_s     from the last step to one replica
    serve.scale_failed     requests that got neither 2xx nor `Retry-After`
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from _indexing import parser_of
from _load import Answers, closed_load, open_load
from _report import ROOT, write_report
from _served import Server, add_arguments, bodies, fill_gallery, served
from PIL import Image, ImageDraw

from reir_testing.serving import free_port

STEPS = (0.2, 0.5, 1.0, 2.0, 4.0, 4.0, 2.0, 0.5, 0.2)
MOST = 3
SIZE_PX, MARGIN_PX = (900, 420), 56
PLOT = ROOT / "docs" / "serve-scale.png"
INK, BLUE, RED, GREY = "#222222", "#1f5fa8", "#c0392b", "#cccccc"


@dataclass(frozen=True)
class Step:
    """One rate of requests, and its answers."""

    start_s: float
    end_s: float
    offered_per_s: float
    answers: Answers


def main() -> None:
    """Measure, print, draw and save the figures."""
    parser = parser_of(__doc__)
    add_arguments(parser)
    parser.add_argument("--seconds", type=float, default=20.0, help="Duration of a step.")
    arguments = parser.parse_args()
    queries = bodies(arguments.queries)
    ingress = {
        "min_replicas": 1,
        "max_replicas": MOST,
        "target_ongoing_requests": 2,
        "upscale_delay_s": 3,
        "downscale_delay_s": 15,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = fill_gallery(arguments, folder)
        with served(store, folder, free_port(), {"ingress": ingress}) as server:
            url = f"{server.url}/v1/search"
            alone = closed_load(url, 2, 5, queries).good_per_s
            counts, stop = list[tuple[float, int]](), threading.Event()
            started_s = time.monotonic()
            counter = threading.Thread(target=_count, args=(server, started_s, counts, stop))
            counter.start()
            steps = []
            for share in STEPS:
                start_s = time.monotonic() - started_s
                answers = open_load(url, share * alone, arguments.seconds, queries)
                end_s = time.monotonic() - started_s
                steps.append(Step(start_s, end_s, share * alone, answers))
            while counts[-1][1] > 1 and counts[-1][0] < steps[-1].end_s + 120:
                time.sleep(1)
            stop.set()
            counter.join()
    figures = _figures(alone, steps, counts)
    for key, value in figures.items():
        print(f"{key:28} {value}")
    draw(steps, counts).save(PLOT, optimize=True)
    print(f"figures in {write_report('serve_scale', figures).name}, plot in docs/{PLOT.name}")


def _count(
    server: Server, started_s: float, counts: list[tuple[float, int]], stop: threading.Event
) -> None:
    while not stop.wait(1.0):
        counts.append((time.monotonic() - started_s, len(server.replicas())))


def _figures(
    alone: float, steps: Sequence[Step], counts: Sequence[tuple[float, int]]
) -> dict[str, Any]:
    # The first step that one replica cannot answer.
    heavy_s = next(step.start_s for step in steps if step.offered_per_s > alone)
    first_most_s = next((s for s, count in counts if count == MOST), None)
    last_most_s = max((s for s, count in counts if count > 1), default=0.0)
    last_heavy_s = max(step.end_s for step in steps if step.offered_per_s > alone)
    return {
        "serve.scale_alone_per_s": round(alone, 1),
        "serve.scale_most": max(count for _, count in counts),
        "serve.scale_last": counts[-1][1],
        "serve.scale_up_s": None if first_most_s is None else round(first_most_s - heavy_s, 1),
        "serve.scale_down_s": round(last_most_s - last_heavy_s, 1),
        "serve.scale_failed": sum(step.answers.unexplained for step in steps),
        "serve.scale_refused": sum(step.answers.statuses.get("503", 0) for step in steps),
        "serve.scale_steps": [
            {
                "offered_per_s": round(step.offered_per_s, 1),
                "good_per_s": round(step.answers.good_per_s, 1),
                "p95_ms": step.answers.p95_ms,
            }
            for step in steps
        ],
        "serve.scale_replicas": [[round(s), count] for s, count in counts],
    }


def draw(steps: Sequence[Step], counts: Sequence[tuple[float, int]]) -> Image.Image:
    """Return a plot of offered and answered requests per second and of replicas over time."""
    width, height = SIZE_PX
    image = Image.new("RGB", SIZE_PX, "white")
    pen = ImageDraw.Draw(image)
    end_s = max(counts[-1][0], steps[-1].end_s)
    most_per_s = max(step.offered_per_s for step in steps) * 1.1

    def place(second: float, share: float) -> tuple[float, float]:
        across = MARGIN_PX + (width - 2 * MARGIN_PX) * second / end_s
        return across, height - MARGIN_PX - (height - 2 * MARGIN_PX) * share

    pen.rectangle((*place(0, 1), *place(end_s, 0)), outline=GREY)
    for count in range(MOST + 1):
        share = count / (MOST + 1)
        pen.text((place(end_s, 0)[0] + 8, place(0, share)[1] - 6), str(count), RED)
        per_s = most_per_s * share
        pen.text((10, place(0, share)[1] - 6), f"{per_s:.0f}", INK)
    for step in steps:
        for per_s, color in ((step.offered_per_s, GREY), (step.answers.good_per_s, BLUE)):
            share = per_s / most_per_s
            pen.line((place(step.start_s, share), place(step.end_s, share)), color, 4)
    line = [(s, count / (MOST + 1)) for s, count in counts]
    for (s, share), (next_s, next_share) in pairwise(line):
        pen.line((place(s, share), place(next_s, share)), RED, 2)
        pen.line((place(next_s, share), place(next_s, next_share)), RED, 2)
    pen.text((MARGIN_PX, 16), "requests a second: asked (grey), answered (blue)", INK)
    pen.text((MARGIN_PX + 420, 16), "replicas that answer (red, right scale)", RED)
    for second in range(0, int(end_s) + 1, 30):
        pen.text((place(second, 0)[0] - 6, height - MARGIN_PX + 10), f"{second} s", INK)
    return image


if __name__ == "__main__":
    main()

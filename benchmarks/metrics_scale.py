"""Time and memory of exact REIR ranks at REIRCOCO's size, compared with a full sort.

    python benchmarks/metrics_scale.py

The full sort runs on a slice of the queries, and its results on the slice must equal ours.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
from _report import write_report

from reir.images.boxes import elementwise_iou
from reir.metrics import Gallery, Queries, ReirRanks, reir_ranks

DIM = 256
PER_PHOTO = 30
KS = (1, 5, 10)
IOU_THRESHOLD = 0.5


def make_case(num_queries: int, num_instances: int, seed: int = 0) -> tuple[Queries, Gallery]:
    """Return random unit vectors, 30 per photo; each expression is near its own instance."""
    rng = np.random.default_rng(seed)
    vectors = _unit(rng.standard_normal((num_instances, DIM), dtype=np.float32))
    corner = rng.uniform(0, 300, (num_instances, 2))
    boxes_px = np.concatenate([corner, corner + rng.uniform(20, 200, (num_instances, 2))], axis=1)
    gallery = Gallery(vectors, np.arange(num_instances) // PER_PHOTO, boxes_px)
    target = rng.choice(num_instances, num_queries, replace=False)
    noise = _unit(rng.standard_normal((num_queries, DIM), dtype=np.float32))
    # Enough noise that only some queries succeed, so that a mistake in the ranks would show.
    near = vectors[target] + np.float32(3.6) * noise
    return Queries(near, gallery.images[target], boxes_px[target]), gallery


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def full_sort(queries: Queries, gallery: Gallery) -> dict[int, np.ndarray]:
    """Return definition B at each K in the obvious way: sort all scores of every query."""
    order = np.argsort(-(queries.vectors @ gallery.vectors.T), axis=1)
    found = {}
    for k in KS:
        first = order[:, :k]
        iou = elementwise_iou(gallery.boxes_px[first], queries.boxes_px[:, None])
        right_photo = gallery.images[first] == queries.images[:, None]
        found[k] = (right_photo & (iou >= IOU_THRESHOLD)).any(axis=1)
    return found


def peak_rss_gib() -> float:
    """Return the peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(num_queries: int, num_instances: int, slice_size: int) -> dict[str, float | int]:
    """Run both ways and return the figures."""
    before_gib = peak_rss_gib()
    queries, gallery = make_case(num_queries, num_instances)
    started = time.perf_counter()
    ranks = reir_ranks(queries, gallery)
    seconds = time.perf_counter() - started
    growth_gib = peak_rss_gib() - before_gib

    part = queries[:slice_size]
    started = time.perf_counter()
    expected = full_sort(part, gallery)
    sort_seconds = time.perf_counter() - started
    check_equal(ranks, expected, slice_size)
    sort_all_seconds = sort_seconds * num_queries / len(part)
    return {
        "metrics.queries": num_queries,
        "metrics.instances": num_instances,
        "metrics.dim": DIM,
        "metrics.seconds": round(seconds, 2),
        "metrics.peak_rss_gib": round(growth_gib, 3),
        "metrics.full_sort_slice_queries": len(part),
        "metrics.full_sort_seconds_extrapolated": round(sort_all_seconds, 2),
        # Scores in float32, and their order in int64.
        "metrics.full_sort_matrix_gib": round(num_queries * num_instances * 12 / 2**30, 2),
        "metrics.speedup_vs_full_sort": round(sort_all_seconds / seconds, 2),
        "metrics.br1_50": round(100 * float(ranks.hits_b(1, IOU_THRESHOLD).mean()), 2),
        "metrics.br10_50": round(100 * float(ranks.hits_b(10, IOU_THRESHOLD).mean()), 2),
    }


def check_equal(ranks: ReirRanks, expected: dict[int, np.ndarray], slice_size: int) -> None:
    for k, found in expected.items():
        ours = ranks.hits_b(k, IOU_THRESHOLD)[:slice_size]
        if not np.array_equal(ours, found):
            raise SystemExit(f"BR@{k} differs from the full sort on {int((ours != found).sum())}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=5_000)
    parser.add_argument("--instances", type=int, default=150_000)
    parser.add_argument("--slice", type=int, default=200, help="Queries of the full sort.")
    arguments = parser.parse_args()
    figures = measure(arguments.queries, arguments.instances, arguments.slice)
    for key, value in figures.items():
        print(f"{key:40} {value}")
    write_report("metrics_scale", figures)


if __name__ == "__main__":
    main()

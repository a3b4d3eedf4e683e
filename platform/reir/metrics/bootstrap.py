"""Percentile bootstrap intervals of means, for all metrics of an evaluation at once."""

# Shapes: M queries, S metrics, G clusters, R resamples

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_DRAWS_AT_ONCE = 2_000_000  # cluster indices in memory at a time


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap_intervals(
    values: npt.ArrayLike,
    *,
    clusters: npt.ArrayLike | None = None,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Interval]:
    """Return percentile intervals of the mean of each metric over the queries.

    Each resample draws as many clusters as there are, with replacement. Without `clusters`, every
    query is a cluster of its own. All metrics use the same resamples. The result is deterministic.

    Args:
        values: (M, S) values of each query, for example 1 for a success.
        clusters: (M,) integers; queries of one cluster (one photo) are drawn together.
        num_resamples: number of resamples R, at least 1.
        confidence: share of the resampled means inside the interval, in (0, 1).
        seed: random seed of the resamples.

    Returns:
        S intervals in the order of the columns.

    Raises:
        ValueError: there are no queries, shapes differ, or a setting is out of range.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or not len(table):
        raise ValueError(f"values must have shape (M, S) with M >= 1, got {table.shape}")
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, got {num_resamples}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    sums, sizes = _cluster_sums(table, clusters)
    means = _resampled_means(sums, sizes, num_resamples, np.random.default_rng(seed))
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    rows = zip(table.mean(axis=0), low, high, strict=True)
    return [Interval(float(mean), float(lo), float(hi)) for mean, lo, hi in rows]


def _cluster_sums(table: Floats, clusters: npt.ArrayLike | None) -> tuple[Floats, Floats]:
    """Return (G, S) sums of values and (G,) numbers of queries, by cluster in ascending order."""
    if clusters is None:
        return table, np.ones(len(table))
    labels = np.asarray(clusters)
    if labels.shape != table.shape[:1]:
        raise ValueError(f"clusters must have shape {table.shape[:1]}, got {labels.shape}")
    _, cluster_of = np.unique(labels, return_inverse=True)
    sizes = np.bincount(cluster_of).astype(np.float64)
    sums = np.zeros((len(sizes), table.shape[1]))
    # `sums[cluster_of] += table` would add only one query of each cluster.
    np.add.at(sums, cluster_of, table)
    return sums, sizes


def _resampled_means(
    sums: Floats, sizes: Floats, num_resamples: int, rng: np.random.Generator
) -> Floats:
    """Return the (R, S) means over the queries of each resample."""
    # Counting how often each cluster is drawn turns the resampled sums into one matrix product.
    num_clusters = len(sizes)
    rows_at_once = max(1, _DRAWS_AT_ONCE // num_clusters)
    means = []
    for first in range(0, num_resamples, rows_at_once):
        rows = min(rows_at_once, num_resamples - first)
        drawn = rng.integers(num_clusters, size=(rows, num_clusters))
        # Each resample gets its own range of numbers, so that one `bincount` counts all of them.
        offsets = np.arange(rows)[:, None] * num_clusters
        counts = np.bincount((drawn + offsets).ravel(), minlength=rows * num_clusters)
        times_drawn = counts.reshape(rows, num_clusters).astype(np.float64)
        # Clusters differ in size, so the number of queries differs between resamples.
        means.append((times_drawn @ sums) / (times_drawn @ sizes)[:, None])
    return np.concatenate(means)

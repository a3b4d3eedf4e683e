"""`reir.metrics.bootstrap` against loops over the same draws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reir.metrics import bootstrap
from reir.metrics.bootstrap import bootstrap_intervals


def slow_intervals(
    values: np.ndarray, clusters: np.ndarray, num_resamples: int, seed: int
) -> list[tuple[float, float]]:
    """Draw cluster by cluster, gather its queries, average; quantiles of the sorted means."""
    members = [np.flatnonzero(clusters == label) for label in sorted(set(clusters.tolist()))]
    draws = np.random.default_rng(seed).integers(len(members), size=(num_resamples, len(members)))
    intervals = []
    for column in range(values.shape[1]):
        means = []
        for draw in draws:
            drawn = [values[m, column] for cluster in draw for m in members[cluster]]
            means.append(sum(drawn) / len(drawn))
        intervals.append((quantile(means, 0.025), quantile(means, 0.975)))
    return intervals


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000), num=st.integers(1, 15), columns=st.integers(1, 3), by=st.booleans()
)
def test_bootstrap_intervals_matches_reference(seed: int, num: int, columns: int, by: bool) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2, size=(num, columns)).astype(float)
    clusters = rng.integers(0, 4, num) if by else np.arange(num)
    got = bootstrap_intervals(
        values, clusters=clusters if by else None, num_resamples=40, seed=seed
    )
    np.testing.assert_allclose([i.mean for i in got], values.mean(axis=0))
    np.testing.assert_allclose(
        [(i.low, i.high) for i in got], slow_intervals(values, clusters, 40, seed), atol=1e-12
    )


@pytest.mark.parametrize("draws_at_once", [1, 70, 999], ids=["row", "some", "all"])
def test_memory_budget_changes_nothing(draws_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random((30, 2)) < 0.4
    whole = bootstrap_intervals(values, num_resamples=25)
    monkeypatch.setattr(bootstrap, "_DRAWS_AT_ONCE", draws_at_once)
    assert bootstrap_intervals(values, num_resamples=25) == whole


def test_clusters_widen_the_interval_of_copied_queries() -> None:
    successes = np.random.default_rng(1).integers(0, 2, 50).repeat(8)[:, None]
    alone = bootstrap_intervals(successes)[0]
    together = bootstrap_intervals(successes, clusters=np.arange(50).repeat(8))[0]
    assert together.high - together.low > 2 * (alone.high - alone.low)


def test_interval_covers_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for seed in range(200):
        sample = rng.random((150, 1)) < 0.3
        interval = bootstrap_intervals(sample, num_resamples=300, confidence=0.9, seed=seed)[0]
        covered += interval.low <= 0.3 <= interval.high
    assert 165 <= covered <= 195


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"M >= 1, got \(0, 2\)"):
        bootstrap_intervals(np.empty((0, 2)))
    with pytest.raises(ValueError, match=r"\(3,\), got \(2,\)"):
        bootstrap_intervals(np.ones((3, 1)), clusters=[0, 1])
    with pytest.raises(ValueError, match="num_resamples must be at least 1, got 0"):
        bootstrap_intervals(np.ones((3, 1)), num_resamples=0)
    with pytest.raises(ValueError, match=r"confidence must lie in .*, got 95"):
        bootstrap_intervals(np.ones((3, 1)), confidence=95)

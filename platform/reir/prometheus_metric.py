"""The declaration of a Prometheus metric: what the code counts with, and the documentation lists.

Each package declares its metrics in one module, as constants of this class. This module does not
import the Prometheus client, which only the extras install.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

M = TypeVar("M", "Counter", "Gauge", "Histogram")


@dataclass(frozen=True)
class PrometheusMetric:
    """One metric.

    Attributes:
        name: the name that Prometheus stores; that of a counter ends in `_total`, and that of a
            histogram lacks `_bucket`, `_sum` and `_count`.
        kind: its type.
        help: what it says, in one sentence.
        labels: names of its labels.
        starts_with: values of its label, or tuples of values of its labels, that exist from the
            start, at zero. Otherwise a counter appears when it first counts, and `rate()` and
            `increase()` miss that first time.
        buckets: upper limits of the buckets of a histogram.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    starts_with: tuple[str | tuple[str, ...], ...] = ()
    buckets: tuple[float, ...] = ()

    def counter(self, registry: CollectorRegistry) -> Counter:
        """Register this metric as a counter of the Prometheus client."""
        from prometheus_client import Counter

        return self._started(Counter(self.name, self.help, self.labels, registry=registry))

    def gauge(self, registry: CollectorRegistry, **options: Any) -> Gauge:
        """Register this metric as a gauge, with further options of the Prometheus client."""
        from prometheus_client import Gauge

        return self._started(Gauge(self.name, self.help, self.labels, registry=registry, **options))

    def histogram(self, registry: CollectorRegistry) -> Histogram:
        """Register this metric as a histogram of the Prometheus client."""
        from prometheus_client import Histogram

        return self._started(
            Histogram(self.name, self.help, self.labels, registry=registry, buckets=self.buckets)
        )

    def _started(self, metric: M) -> M:
        for values in self.starts_with:
            metric.labels(*([values] if isinstance(values, str) else values))
        return metric

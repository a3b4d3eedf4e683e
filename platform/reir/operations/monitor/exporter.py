"""The monitor's process: runs the checks at their intervals, and answers `GET /metrics`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, start_http_server

from reir.errors import ConfigError, ReirError
from reir.operations.monitor import metrics
from reir.operations.monitor.checks import CHECKS, DEEP, GalleryFailure, MonitoredSystem
from reir.operations.monitor.metrics import MonitorCollector, Sample

logger = logging.getLogger(__name__)


class Monitor:
    """Measures a system again and again.

    Attributes:
        collector: the last measured values.
    """

    def __init__(
        self,
        system: MonitoredSystem,
        *,
        interval_s: float,
        deep_interval_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Prepare a monitor.

        Args:
            system: what to look at.
            interval_s: time from the start of a check to its next start.
            deep_interval_s: the same for checks that load models and scan vectors.
            clock: returns the Unix time.
        """
        self.collector = MonitorCollector()
        self._system, self._clock = system, clock
        self._intervals_s = {
            name: deep_interval_s if name in DEEP else interval_s for name in CHECKS
        }
        self._next_s = dict.fromkeys(CHECKS, 0.0)

    def run(self, stop: threading.Event) -> None:
        """Run checks until `stop` is set."""
        while not stop.is_set():
            self.run_due()
            # A check that takes longer than its interval is due again at once, so a pause is
            # enforced.
            stop.wait(max(0.1, min(self._next_s.values()) - self._clock()))

    def run_due(self) -> list[str]:
        """Run the checks that are due now, and return their names."""
        due = [name for name, next_s in self._next_s.items() if next_s <= self._clock()]
        for name in due:
            self._next_s[name] = self._clock() + self._intervals_s[name]
            self._run(name)
        return due

    def _run(self, name: str) -> None:
        started_s = time.perf_counter()
        try:
            # Completed first: a check that fails in the middle must not leave half of its values.
            found = list(CHECKS[name](self._system))
        # The monitor must survive, or nothing would be measured until somebody restarts it.
        except Exception as error:  # noqa: BLE001, it is logged
            # The values of the last success stay; the metric below says that they are old.
            failed = True
            _log_failure(f"check {name} failed", error)
        else:
            failed = self._replace(name, found)
        self.collector.replace(
            f"check {name}",
            [
                metrics.CHECK_FAILED.sample(failed, name),
                metrics.CHECK_ENDED.sample(self._clock(), name),
                metrics.CHECK_SECONDS.sample(time.perf_counter() - started_s, name),
            ],
        )

    def _replace(self, name: str, found: Sequence[Sample | GalleryFailure]) -> bool:
        """Replace the values of a check; return whether it failed for some galleries."""
        samples = [each for each in found if isinstance(each, Sample)]
        failures = [each for each in found if isinstance(each, GalleryFailure)]
        for failure in failures:
            _log_failure(f"check {name} failed for gallery {failure.gallery}", failure.error)
        # The values of the last success stay, here too.
        failed = {failure.gallery for failure in failures}
        old = [each for each in self.collector.measured(name) if each.gallery in failed]
        self.collector.replace(name, [*samples, *old])
        return bool(failures)


def _log_failure(what: str, error: Exception) -> None:
    # Any other exception is a bug, and keeps its traceback.
    is_expected = isinstance(error, ReirError | OSError)
    logger.warning("%s: %s", what, error, exc_info=None if is_expected else error)


def serve_metrics(
    collector: MonitorCollector, host: str, port: int
) -> tuple[int, Callable[[], None]]:
    """Answer `GET /metrics` in a thread.

    Args:
        collector: the values.
        host: address to listen on.
        port: port to listen on; 0 takes a free one.

    Returns:
        The port, and a function that stops the thread.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    registry = CollectorRegistry()
    registry.register(collector)
    try:
        server, thread = start_http_server(port, host, registry)
    # Python raises OverflowError for a port above 65535.
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot serve metrics on {host}:{port} ({error}); choose another --host or --port"
        ) from error

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return int(server.server_port), close

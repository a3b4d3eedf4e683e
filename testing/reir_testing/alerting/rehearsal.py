"""Runs faults, and records which alerts reported them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from reir_testing.alerting.faults import Fault
from reir_testing.alerting.watched_system import WatchedSystem
from reir_testing.alerting.webhook import Webhook, webhook
from reir_testing.prometheus_server import RunningPrometheus, prometheus_server

FIRE_TIMEOUT_S = CLEAR_TIMEOUT_S = 400.0
UNEXPANDED = ("<no value>", "error expanding", "NaN")
"""Parts of texts whose template does not fit the alert."""


@dataclass(frozen=True, kw_only=True)
class FaultRun:
    """How one fault was reported.

    Attributes:
        fault: the fault.
        fired_s: alert -> seconds from the fault to its notification; None if there was none.
        cleared_s: alert -> seconds from the end of the repair to the notification that it is over;
            None if there was none, or if it had not fired.
        others: further alerts that fired.
    """

    fault: Fault
    fired_s: Mapping[str, float | None]
    cleared_s: Mapping[str, float | None]
    others: tuple[str, ...]


@contextmanager
def watched_by_prometheus(
    system: WatchedSystem, folder: Path, rules: Sequence[Path]
) -> Iterator[tuple[RunningPrometheus, Webhook]]:
    """Run Prometheus with these rules, and Alertmanager, until the end of the block."""
    with (
        webhook() as received,
        prometheus_server(
            folder,
            system.scrape_configs(),
            rules=rules,
            alertmanager=received.config(() if system.with_server else ("ReirServerDown",)),
        ) as server,
    ):
        yield server, received


def run_fault(fault: Fault, system: WatchedSystem, received: Webhook) -> FaultRun:
    """Break something, wait for its alerts, repair it, and wait until no alert fires."""
    broken = fault.break_it(system)
    begun_s = time.time()
    next(broken)
    fired = {
        name: received.wait_until_fired(name, begun_s, FIRE_TIMEOUT_S) for name in fault.alerts
    }
    next(broken, None)
    repaired_s = time.time()
    cleared: dict[str, float | None] = {}
    for name in fault.alerts:
        silent_s = received.wait_until_silent(name, CLEAR_TIMEOUT_S)
        was_told = fired[name] is not None and silent_s is not None
        cleared[name] = max(0.0, silent_s - repaired_s) if was_told and silent_s else None
    names = {each.name for each in received.received if each.received_s >= begun_s}
    deadline_s = time.monotonic() + CLEAR_TIMEOUT_S
    for name in names:  # the next fault begins when nothing fires any more
        received.wait_until_silent(name, max(0.0, deadline_s - time.monotonic()))
    return FaultRun(
        fault=fault,
        fired_s={name: None if at is None else at - begun_s for name, at in fired.items()},
        cleared_s=cleared,
        others=tuple(sorted(names - {*fault.alerts})),
    )


def unexpanded_texts(received: Webhook) -> list[str]:
    """Return texts of notifications in which a value is missing."""
    texts = {text for each in received.received for text in each.annotations.values()}
    return sorted(text for text in texts if any(part in text for part in UNEXPANDED))


def share(runs: Sequence[Mapping[str, float | None]]) -> float:
    """Return the share of values that are known."""
    values = [value for run in runs for value in run.values()]
    return sum(value is not None for value in values) / len(values)

"""Do the alerts report what goes wrong, and are they silent while nothing does?

    python benchmarks/alerts.py

Runs a gallery of real photos with its server, monitor, scheduler and light traffic, watched by a
real Prometheus with the generated rules. A real Alertmanager sends alerts to a webhook in this
script. Needs Debian's `prometheus` and `prometheus-alertmanager`, and root, for a small disk in
memory that can be filled.

First nothing is broken for `--quiet-minutes`. Two servers watch meanwhile: one with the rules as
they are, and one whose durations are multiplied by `--scale`, so that conditions have to hold for a
fraction of the time only. Then the faults of `reir_testing.alerting.faults` follow one after
another, watched by the second server.

    alerts.false           alerts that fired while nothing was broken, with either rules
    alerts.fired_share     alerts that reported their fault / alerts that had to
    alerts.cleared_share   alerts that ended after the repair / alerts that had to
    alerts.induced         number of alerts that had to
    alerts.not_induced     alerts that no fault here causes; `promtool` tests them
    alerts.faults          for each fault: seconds until its alerts fired, and until they ended
    alerts.texts_without_value   texts of notifications in which a value was missing
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _indexing import parser_of
from _report import ROOT, write_report

from reir_k8s.monitoring.rules.files import all_alerts, write_rules
from reir_k8s.monitoring.rules.rule import Durations
from reir_testing.alerting.faults import FAULTS, Fault
from reir_testing.alerting.rehearsal import (
    FaultRun,
    run_fault,
    share,
    unexpanded_texts,
    watched_by_prometheus,
)
from reir_testing.alerting.watched_system import WatchedSystem, watched_system
from reir_testing.alerting.webhook import Webhook
from reir_testing.prometheus_server import RunningPrometheus, prometheus_server

RULES = ROOT / "k8s" / "monitoring" / "rules"
SCRAPE_S, CHECK_S, DEEP_CHECK_S = 15.0, 60.0, 900.0
"""Intervals of Prometheus and of the monitor in production."""

SETTLE_S = 60.0
"""Before the quiet part: the monitor runs all of its checks."""


def main() -> None:
    """Measure, print the figures, and write them to a report."""
    parser = parser_of(__doc__)
    parser.add_argument("--quiet-minutes", type=float, default=20.0)
    parser.add_argument("--scale", type=float, default=1 / 20, help="Factor of all durations.")
    parser.add_argument("--photos", type=int, default=80)
    parser.add_argument(
        "--no-server", action="store_true", help="Leave out the server and its faults."
    )
    parser.add_argument("--only", nargs="*", help="Words of the names of faults to run.")
    arguments = parser.parse_args()
    # If the benchmark is terminated, no process of it may stay behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="a-") as name:
        figures = measure(arguments, Path(name))
    for key, value in figures.items():
        if key != "alerts.faults":
            print(f"{key:28} {value}")
    print(f"figures in {write_report('alerts', figures).name}")


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the system, the quiet part and the faults; return the figures."""
    scale = arguments.scale
    with watched_system(
        folder,
        num_photos=arguments.photos,
        interval_s=scale * CHECK_S,
        deep_interval_s=scale * DEEP_CHECK_S,
        with_server=not arguments.no_server,
    ) as system:
        time.sleep(SETTLE_S)
        rules = write_rules(folder / "rules", Durations().scaled(scale))
        with watched_by_prometheus(system, folder / "scaled", rules) as (server, received):
            false = quiet(system, folder, arguments.quiet_minutes, server, received)
            runs = [
                run_fault_and_print(fault, system, received)
                for fault in FAULTS
                if not (arguments.no_server and fault.needs_server)
                and (arguments.only is None or any(word in fault.name for word in arguments.only))
            ]
        texts = unexpanded_texts(received)
    induced = {name for run in runs for name in run.fired_s}
    return {
        "alerts.false": len(false),
        "alerts.false_names": false,
        "alerts.fired_share": share([run.fired_s for run in runs]),
        "alerts.cleared_share": share([run.cleared_s for run in runs]),
        "alerts.induced": len(induced),
        "alerts.not_induced": sorted({alert.name for alert in all_alerts()} - induced),
        "alerts.quiet_minutes": arguments.quiet_minutes,
        "alerts.duration_scale": scale,
        "alerts.texts_without_value": texts,
        "alerts.faults": [_row(run) for run in runs],
    }


def quiet(
    system: WatchedSystem,
    folder: Path,
    minutes: float,
    scaled: RunningPrometheus,
    received: Webhook,
) -> list[str]:
    """Break nothing for some minutes; return the names of the alerts that fired."""
    print(f"nothing is broken for {minutes:g} minutes", flush=True)
    with prometheus_server(
        folder / "production",
        system.scrape_configs(),
        rules=sorted(RULES.glob("*.yaml")),
        scrape_interval_s=SCRAPE_S,
        evaluation_interval_s=SCRAPE_S,
    ) as production:
        time.sleep(60.0 * minutes)
        fired = 'max_over_time(ALERTS{alertstate="firing"}[1d])'
        found = [each.labels for each in (*production.query(fired), *scaled.query(fired))]
    names = {each["alertname"] for each in found} | {each.name for each in received.received}
    return sorted(names)


def run_fault_and_print(fault: Fault, system: WatchedSystem, received: Webhook) -> FaultRun:
    """Run a fault, and print how it was reported."""
    run = run_fault(fault, system, received)
    print(_line(run), flush=True)
    return run


def _row(run: FaultRun) -> dict[str, Any]:
    return {
        "fault": run.fault.name,
        "fired_s": {name: _rounded(value) for name, value in run.fired_s.items()},
        "cleared_s": {name: _rounded(value) for name, value in run.cleared_s.items()},
        "also_fired": list(run.others),
    }


def _line(run: FaultRun) -> str:
    alerts = [
        f"{name:26} fired {_rounded(fired)!s:>6} s, ended {_rounded(run.cleared_s[name])!s:>6} s"
        for name, fired in run.fired_s.items()
    ]
    also = [f"also {', '.join(run.others)}"] if run.others else []
    return f"\n{'':32}".join([f"{run.fault.name:32}{alerts[0]}", *alerts[1:], *also])


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


if __name__ == "__main__":
    main()

"""`reir monitor`: export the state and the quality of galleries to Prometheus."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reir.cli.common import AsJson, Store, connect, messages, print_json

if TYPE_CHECKING:
    from reir.operations.monitor.exporter import Monitor

EXAMPLES = """[bold]Examples[/bold]

reir monitor

reir monitor --gallery photos --interval-s 30 --deep-interval-s 300 --port 9500"""


def register(app: typer.Typer) -> None:
    """Add the subcommand to the command line."""
    app.command("monitor", epilog=EXAMPLES, rich_help_panel="Operation")(monitor)


def monitor(  # noqa: PLR0913, every argument is an option of the command
    galleries: Annotated[
        list[str] | None,
        typer.Option("--gallery", help="Gallery to look at; repeatable. Default: all."),
    ] = None,
    store: Store = None,
    host: Annotated[str, typer.Option(help="Address to serve the metrics on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65_535, help="Port to serve the metrics on; 0 picks one.")
    ] = 9464,
    interval_s: Annotated[
        float, typer.Option(min=0.1, help="Seconds between two runs of the quick checks.")
    ] = 60.0,
    deep_interval_s: Annotated[
        float,
        typer.Option(
            min=0.1,
            help="Seconds between two runs of the checks that load models and scan vectors.",
        ),
    ] = 900.0,
    search_log: Annotated[
        Path | None,
        typer.Option(help="Folder of the search log. Default: $REIR_HOME/searches."),
    ] = None,
    schedules: Annotated[
        Path | None,
        typer.Option(help="File of the schedules. Default: $REIR_HOME/schedules.yaml."),
    ] = None,
    schedule_runs: Annotated[
        Path | None,
        typer.Option(help="Folder of their runs. Default: $REIR_HOME/schedule-runs."),
    ] = None,
    once: Annotated[
        bool, typer.Option("--once", help="Run every check once, print the values, and exit.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure galleries again and again, and serve the values as Prometheus metrics.

    Measures what no request can: the recall of searches against an exact scan, canaries, drift of
    presence, freshness, failures by reason, disk, backups and schedules. The metrics contain names
    of galleries and need no key, so keep the port private.
    """
    from reir.config import reir_home
    from reir.operations.monitor.checks import MonitoredSystem
    from reir.operations.monitor.exporter import Monitor
    from reir.operations.monitor.searches import LoggedSearches
    from reir.operations.schedule.settings import default_runs_folder, default_schedule_file
    from reir.store import default_location, is_embedded

    place = store or default_location()
    runs = schedule_runs or default_runs_folder()
    with connect(store) as opened:
        system = MonitoredSystem(
            store=opened,
            store_folder=Path(place).expanduser() if is_embedded(place) else None,
            galleries=tuple(galleries) if galleries else None,
            searches=LoggedSearches(search_log or reir_home() / "searches"),
            schedules=(schedules or default_schedule_file(), runs),
        )
        watched = Monitor(system, interval_s=interval_s, deep_interval_s=deep_interval_s)
        if once:
            _print_once(watched, as_json=as_json)
        else:
            _serve(watched, host, port, as_json=as_json)


def _serve(watched: Monitor, host: str, port: int, *, as_json: bool) -> None:
    """Run the checks, and serve their values, until the process is told to stop."""
    from reir.operations.monitor.exporter import serve_metrics

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    bound, close = serve_metrics(watched.collector, host, port)
    address = f"http://{host}:{bound}/metrics"
    if as_json:
        print_json({"address": address})
    else:
        messages().print(f"Metrics: {address}  (press Ctrl-C to stop)", soft_wrap=True)
    try:
        watched.run(stop)
    finally:
        close()


def _print_once(watched: Monitor, *, as_json: bool) -> None:
    from prometheus_client import CollectorRegistry, generate_latest

    watched.run_due()
    registry = CollectorRegistry()
    registry.register(watched.collector)
    if as_json:
        print_json(
            [
                {"metric": sample.name, "labels": sample.labels, "value": sample.value}
                for family in registry.collect()
                for sample in family.samples
            ]
        )
    else:
        typer.echo(generate_latest(registry).decode(), nl=False)

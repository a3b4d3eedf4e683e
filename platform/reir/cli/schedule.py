"""`reir schedule`: run `reir` commands at fixed times on this machine."""

from __future__ import annotations

import json
import queue
import signal
import threading
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from reir.cli.common import AsJson, messages, new_table, output, plural, print_json
from reir.errors import ConfigError

if TYPE_CHECKING:
    from reir.operations.schedule.runs import ScheduledRun

FAILED, INTERRUPTED = 1, 130

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the schedule.")]
File = Annotated[
    Path | None,
    typer.Option("--file", help="File of the schedules. Default: $REIR_HOME/schedules.yaml."),
]
Folder = Annotated[
    Path | None,
    typer.Option("--runs", help="Folder of the runs. Default: $REIR_HOME/schedule-runs."),
]

ADD_EXAMPLES = """[bold]Examples[/bold]

reir schedule add refresh --cron "0 * * * *" -- index ~/Pictures --gallery photos

reir schedule add nightly --cron "0 3 * * *" --time-limit 6h --jitter 10m -- reindex photos"""

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def register(app: typer.Typer) -> None:
    """Add the subcommands to the command line."""
    schedule = typer.Typer(
        no_args_is_help=True,
        help="Run `reir` commands at fixed times on this machine. On Kubernetes, use the cron jobs "
        "in k8s/ instead.",
    )
    schedule.command("add", epilog=ADD_EXAMPLES)(add)
    schedule.command("list")(list_schedules)
    schedule.command("remove")(remove)
    schedule.command("run-now")(run_now)
    schedule.command("runs")(runs)
    schedule.command("start")(start)
    app.add_typer(schedule, name="schedule", rich_help_panel="Operation")


def add(  # noqa: PLR0913, every argument is an option of the command
    name: Name,
    command: Annotated[
        list[str],
        typer.Argument(metavar="-- COMMAND...", help="The `reir` command, without `reir`."),
    ],
    cron: Annotated[
        str,
        typer.Option(
            help="When: minute, hour, day of month, month, day of week; '0 3 * * *' is 3:00 every "
            "night."
        ),
    ],
    timezone: Annotated[
        str, typer.Option(help="Time zone such as Europe/Berlin. Default: that of the machine.")
    ] = "",
    jitter: Annotated[
        str, typer.Option(help="Start up to so much later, such as 10m, at random.")
    ] = "0s",
    time_limit: Annotated[
        str | None, typer.Option(help="Stop a run that takes longer, such as 6h.")
    ] = None,
    missed: Annotated[
        str,
        typer.Option(
            help="'run' starts one run as soon as possible if some were missed while the scheduler "
            "did not run; 'skip' waits for the next one."
        ),
    ] = "run",
    file: File = None,
) -> None:
    """Add a schedule. A running scheduler notices it within seconds."""
    from reir.config import load_config
    from reir.operations.schedule.schedules import Schedule, add_schedule

    schedule = load_config(
        Schedule,
        {
            "command": command,
            "cron": cron,
            "timezone": timezone,
            "jitter_s": round(parse_duration("--jitter", jitter)),
            "time_limit_s": None
            if time_limit is None
            else parse_duration("--time-limit", time_limit),
            "missed": missed,
            # Runs that would have been due before this moment do not count as missed.
            "added_s": time.time(),
        },
    )
    add_schedule(_file(file), name, schedule)
    following = schedule.next_due(datetime.now().astimezone())
    output().print(
        f"Added schedule {name}; it is due next {_moment(following)}. Schedules run while `reir "
        f"schedule start` does."
    )


def list_schedules(file: File = None, folder: Folder = None, as_json: AsJson = False) -> None:
    """List the schedules, when they are due, and how their last runs ended."""
    from reir.operations.schedule.runs import own_runs
    from reir.operations.schedule.scheduler import is_scheduler_alive, next_due_times
    from reir.operations.schedule.schedules import read_schedules

    known, place = read_schedules(_file(file)), _folder(folder)
    due = next_due_times(known)
    last = {
        name: next(iter(own_runs(place, name, schedule, 1)), None)
        for name, schedule in known.items()
    }
    if as_json:
        print_json(
            {
                "scheduler_runs": is_scheduler_alive(place),
                "schedules": [
                    {
                        "name": name,
                        **schedule.model_dump(mode="json"),
                        "next": _iso(due[name]),
                        "last_run": _run_values(last[name]),
                    }
                    for name, schedule in known.items()
                ],
            }
        )
        return
    if not known:
        messages().print("No schedules yet. Add one with `reir schedule add`.")
        return
    table = new_table("schedule", "command", "cron", "next", "last run", "")
    for name, schedule in known.items():
        run = last[name]
        table.add_row(
            name,
            Text(f"reir {' '.join(schedule.command)}"),
            schedule.cron,
            _moment(due[name]),
            "" if run is None else _moment(datetime.fromtimestamp(run.started_s).astimezone()),
            _status(run),
        )
    output().print(table)
    if not is_scheduler_alive(place):
        messages().print(
            "No scheduler runs on this machine; start one with `reir schedule start`.",
            style="yellow",
        )


def remove(name: Name, file: File = None) -> None:
    """Remove a schedule; the records of its runs are kept."""
    from reir.operations.schedule.schedules import remove_schedule

    remove_schedule(_file(file), name)
    output().print(f"Removed schedule {name}.")


def run_now(name: Name, file: File = None, folder: Folder = None, as_json: AsJson = False) -> None:
    """Run a schedule once, now, and wait for its end; the exit status is 1 if it fails.

    Ctrl-C, or closing the terminal, stops the command; the exit status is 130 then.
    """
    from reir.operations.schedule.runs import run_schedule
    from reir.operations.schedule.schedules import find_schedule, read_schedules

    schedule = find_schedule(read_schedules(_file(file)), name)
    run = run_schedule(_folder(folder), name, schedule, _stop_signal())
    if as_json:
        print_json(_run_values(run))
    else:
        output().print(Path(run.log).read_text(errors="replace").rstrip(), markup=False)
        output().print(_outcome(run))
    if run.has_failed:
        raise typer.Exit(INTERRUPTED if run.status == "stopped" else FAILED)


def runs(
    name: Name,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of runs to list.")] = 10,
    file: File = None,
    folder: Folder = None,
    as_json: AsJson = False,
) -> None:
    """List the last runs of a schedule, newest first, with the files of output and report."""
    from reir.operations.schedule.runs import last_runs
    from reir.operations.schedule.schedules import find_schedule, read_schedules

    place = _folder(folder)
    if not (place / name).is_dir():  # the runs of a removed schedule can still be listed
        find_schedule(read_schedules(_file(file)), name)
    found = last_runs(place, name, limit)
    if as_json:
        print_json([_run_values(run) for run in found])
        return
    table = new_table("started", "took", "status", "output and report")
    for run in found:
        started = datetime.fromtimestamp(run.started_s).astimezone()
        took = f"{run.ended_s - run.started_s:.0f} s" if run.ended_s else ""
        files = "\n".join(each for each in (run.log, run.report) if each)
        table.add_row(_moment(started), took, _status(run), Text(files))
    output().print(table)


def start(file: File = None, folder: Folder = None, as_json: AsJson = False) -> None:
    """Run the schedules at their times, until Ctrl-C; a running command is stopped then, too."""
    from reir.operations.schedule.scheduler import Scheduler, only_scheduler
    from reir.operations.schedule.schedules import read_schedules

    path, place = _file(file), _folder(folder)
    known = read_schedules(path)
    stop = _stop_signal()

    def show(name: str, run: ScheduledRun) -> None:
        if as_json:
            typer.echo(json.dumps(_run_values(run)))
        else:
            output().print(f"{name}: {_outcome(run)}")

    with only_scheduler(place):
        messages().print(
            f"Running {plural(len(known), 'schedule')} of {path}; press Ctrl-C to stop.",
            soft_wrap=True,
        )
        Scheduler(path, place, show).run(stop)


def parse_duration(option: str, text: str) -> float:
    """Return seconds from a text such as "90s", "10m", "6h" or "1d".

    Raises:
        ConfigError: the text is something else.
    """
    number, unit = text[:-1], text[-1:]
    try:
        return float(number) * _UNITS_S[unit]
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"{option} {text!r} must be a number with a unit: s, m, h or d, such as 90s or 6h"
        ) from error


def _stop_signal() -> threading.Event:
    """Return an event that Ctrl-C, SIGTERM or SIGHUP sets, instead of ending the process.

    SIGHUP says that the terminal was closed; under `nohup`, it stays ignored.
    """
    from reir.operations.schedule.runs import STOP_GRACE_S

    stop = threading.Event()
    # A signal handler may call `SimpleQueue.put`, but not `Event.set`, which could wait for itself.
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()

    def stop_at_first() -> None:
        signals.get()
        with suppress(OSError):  # the terminal may be gone
            typer.echo(f"stopping; a running command has {STOP_GRACE_S:.0f} s to finish", err=True)
        stop.set()

    threading.Thread(target=stop_at_first, daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: signals.put(number))
    return stop


def _file(file: Path | None) -> Path:
    from reir.operations.schedule.settings import default_schedule_file

    return default_schedule_file() if file is None else file


def _folder(folder: Path | None) -> Path:
    from reir.operations.schedule.settings import default_runs_folder

    return default_runs_folder() if folder is None else folder


def _run_values(run: ScheduledRun | None) -> dict[str, Any] | None:
    from dataclasses import asdict

    return None if run is None else asdict(run)


def _outcome(run: ScheduledRun) -> str:
    return (
        f"{run.status} after {run.ended_s - run.started_s:.0f} s, exit status {run.exit_code}; "
        f"output: {run.log}"
    )


def _status(run: ScheduledRun | None) -> Text:
    if run is None:
        return Text("never")
    return Text(run.status, style="red" if run.has_failed else "green")


def _moment(moment: datetime | None) -> str:
    return "never" if moment is None else f"{moment:%Y-%m-%d %H:%M %Z}"


def _iso(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()

"""`reir doctor`: check whether this installation works, and suggest fixes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from reir.cli.common import AsJson, Checkpoint, Store, connect, output, print_json
from reir.cli.doctor.check import Check, Status
from reir.cores import num_cores
from reir.errors import ConfigError, StoreDamaged, StoreError

if TYPE_CHECKING:
    from reir.models.interfaces import InstanceEncoder

COLORS: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}

EXAMPLES = """[bold]Examples[/bold]

reir doctor --store ./my-store

RAY_ADDRESS=ray-head:6379 reir doctor --server http://127.0.0.1:8000"""

Server = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Also check a server: its release, checkpoints and clock."),
]


def register(app: typer.Typer) -> None:
    """Add the subcommand to the command line."""
    app.command("doctor", epilog=EXAMPLES)(doctor)


def doctor(
    as_json: AsJson = False,
    store: Store = None,
    checkpoint: Checkpoint = None,
    server: Server = None,
) -> None:
    """Check installation, store, galleries, jobs, backups and schedules, and suggest fixes.

    Also checks the Ray cluster that RAY_ADDRESS names. Exits with status 1 if a check fails;
    warnings do not count.
    """
    checks = []
    for check in run_checks(store, checkpoint, server):
        checks.append(check)
        if not as_json:
            output().print(as_line(check), soft_wrap=True)
    if as_json:
        print_json([asdict(check) for check in checks])
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(1)


def as_line(check: Check) -> Text:
    """Return a check as text for the terminal, with the advice on a second line."""
    line = Text.assemble((f"{check.status:<5}", COLORS[check.status]), f"{check.name:<14} ")
    line.append(check.detail)
    if check.advice:
        # Below the detail: status and name take 20 columns.
        line.append(f"\n{'':20}-> {check.advice}", style="bold")
    return line


def run_checks(
    location: str | None, checkpoint: Path | None, server: str | None
) -> Iterator[Check]:
    """Run all checks, quick ones first, and yield each outcome as soon as it is known."""
    from reir.cli.doctor import galleries, installation, operations, remote

    yield installation.check_python(sys.version_info[:2])
    yield installation.check_torch()
    yield installation.check_threads(num_cores())
    yield installation.check_versions()
    yield from installation.check_disks(location)
    yield from map(installation.check_app, installation.APP_EXTRAS)
    try:
        yield from operations.check_schedules()
    except (ConfigError, ImportError) as error:
        yield Check("schedules", "fail", str(error), "correct the file, or install [operations]")
    encoder, check = galleries.load_checkpoint(checkpoint)
    yield check
    try:
        yield from _check_store(location, encoder)
    except StoreDamaged as error:
        advice = "restore a backup into a new --store (docs/operations/disaster-recovery.md)"
        yield Check("store", "fail", str(error), advice)
    except (StoreError, ConfigError) as error:
        yield Check("store", "fail", str(error), "correct --store or REIR_STORE")
    yield from remote.check_cluster()
    if server is not None:
        yield from remote.check_server(server, encoder)


def _check_store(location: str | None, encoder: InstanceEncoder | None) -> Iterator[Check]:
    from reir.cli.doctor import galleries, operations
    from reir.store import default_location, is_embedded

    place = default_location() if location is None else location
    with connect(location) as store:
        yield galleries.check_round_trip(store)
        folder = Path(place).expanduser() if is_embedded(place) else None
        yield galleries.check_clock(store, folder)
        yield from galleries.check_galleries(store, encoder)
        for name in store.galleries():
            yield from operations.check_jobs(store, name)
            yield operations.check_backup(store, name)

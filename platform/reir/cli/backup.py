"""`reir backup` and `reir restore`: galleries in open files, to keep or to move them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal

from reir.cli.common import (
    AsJson,
    Gallery,
    Store,
    connect,
    messages,
    new_table,
    output,
    plural,
    print_json,
    printable,
)
from reir.cli.galleries import Version, version_or_live
from reir.errors import ConfigError

if TYPE_CHECKING:
    from reir.operations.backup.reports import BackupReport, Progress, RestoreReport

PANEL = "Galleries"
FAILED = 1
BACKUP_EXAMPLES = """[bold]Examples[/bold]

reir backup photos /backups/photos-1

reir backup photos "s3://bucket/reir/photos-{date}"

reir backup photos --list"""
RESTORE_EXAMPLES = """[bold]Examples[/bold]

reir restore /backups/photos-1

reir restore s3://bucket/reir/photos-2026-01-31 --gallery copy --store http://milvus:19530"""


def register(app: typer.Typer) -> None:
    """Add the subcommands to the command line."""
    app.command("backup", rich_help_panel=PANEL, epilog=BACKUP_EXAMPLES)(backup)
    app.command("restore", rich_help_panel=PANEL, epilog=RESTORE_EXAMPLES)(restore)


def backup(  # noqa: PLR0913, every argument is an option of the command
    gallery: Gallery,
    dest: Annotated[
        str | None,
        typer.Argument(
            metavar="DEST",
            help="Folder for the backup, which must be empty or not exist: a path, s3://... or "
            "gs://.... {date} and {time} in it stand for the current date and time (UTC).",
        ),
    ] = None,
    version: Version = None,
    listed: Annotated[
        bool, typer.Option("--list", help="List the last backup of each version instead.")
    ] = False,
    as_json: AsJson = False,
    store: Store = None,
) -> None:
    """Write a gallery into a folder of open files.

    The gallery can be searched and written meanwhile. A backup has everything that searches need,
    but not the photo files.
    """
    if listed == (dest is not None):
        raise ConfigError(
            f"name a folder for the backup, or use --list to see earlier ones; got "
            f"{'both' if listed else 'neither'}"
        )
    with _needs_pyarrow():
        from reir.operations.backup.write import recorded_backups, write_backup
    from reir.query.search import check_gallery

    with connect(store) as opened:
        if dest is None:
            check_gallery(opened, gallery)
            _show_backups(recorded_backups(opened, gallery), gallery, as_json=as_json)
            return
        version = version_or_live(opened, gallery, version)
        with _progress_bar() as show:
            report = write_backup(opened, gallery, version, dest, show)
    if as_json:
        print_json(report.to_dict())
    else:
        _show_report(report)


def restore(  # noqa: PLR0913, every argument is an option of the command
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder of the backup.")],
    gallery: Annotated[
        str | None,
        typer.Option(help="Gallery to restore into. Default: the one that was backed up."),
    ] = None,
    version: Annotated[
        str | None,
        typer.Option(
            help="Name of the restored version. Default: the one that was backed up, with a number "
            "if another version has its name."
        ),
    ] = None,
    promote: Annotated[
        bool | None,
        typer.Option(
            "--promote/--no-promote",
            help="Whether to make the version live. Default: only if the gallery has no live one.",
        ),
    ] = None,
    as_json: AsJson = False,
    store: Store = None,
) -> None:
    """Restore a gallery from a backup, as a version of its own.

    All files are checked before anything is written, and the restored version is compared with the
    backup at the end. If they differ, the exit status is 1, and the version is not made live. An
    interrupted restore continues when the command runs again.
    """
    with _needs_pyarrow():
        from reir.operations.backup.restore import RestoreRequest, restore_backup

    request = RestoreRequest(
        source=source, gallery=gallery or "", version=version or "", promote=promote
    )
    with connect(store) as opened, _progress_bar() as show:
        report = restore_backup(opened, request, show)
    if as_json:
        print_json(report.to_dict())
    else:
        _show_restored(report)
    if report.problems:
        raise typer.Exit(FAILED)


@contextmanager
def _needs_pyarrow() -> Iterator[None]:
    """Say which package is missing if an import fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(f"backups need pyarrow ({error}); pip install pyarrow") from error


def _show_report(report: BackupReport) -> None:
    counts = report.counts
    output().print(
        f"Backed up version {report.version} of gallery {report.gallery} to "
        f"{printable(report.dest)}: {plural(counts.photos, 'photo')} "
        f"({counts.failed:,} failed, {plural(counts.duplicates, 'duplicate')}), "
        f"{plural(counts.instances, 'instance')}, {plural(counts.masks, 'mask')}; "
        f"{decimal(report.num_bytes)} in {report.seconds:.1f} s."
    )
    screen = messages()
    if report.read_again:
        screen.print(f"Photos that were written meanwhile and read again: {report.read_again:,}.")
    if report.incomplete or report.orphans:
        screen.print(
            f"The store lacks instances of {plural(report.incomplete + report.orphans, 'photo')}, "
            f"and so does the backup; `reir index SOURCE --gallery {report.gallery} --verify` "
            f"shows which, and --repair restores them.",
            style="yellow",
        )
    if not report.recorded:
        screen.print(
            "The store cannot be changed, so it has no record of this backup.", style="yellow"
        )


def _show_backups(found: list[dict[str, Any]], gallery: str, *, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    if not found:
        messages().print(f"No backup of gallery {gallery} is recorded in this store.")
        return
    numbers = ("photos", "instances", "size", "seconds")
    table = new_table("version", "ended", "folder", *numbers, right=numbers)
    for each in found:
        table.add_row(
            each["version"],
            datetime.fromtimestamp(each["ended_s"]).astimezone().isoformat(" ", "minutes"),
            printable(each["dest"]),
            f"{each['photos']:,}",
            f"{each['instances']:,}",
            decimal(each["bytes"]),
            f"{each['seconds']:.1f}",
        )
    output().print(table)


def _show_restored(report: RestoreReport) -> None:
    name = f"version {report.version} of gallery {report.gallery}"
    if report.problems:
        messages().print(
            f"Restored {printable(report.source)} as {name}, but it differs from the backup:",
            style="bold red",
        )
        for problem in report.problems:
            messages().print(f"  {printable(problem)}", style="red")
        messages().print(_advice_on_difference(report))
        return
    counts = report.counts
    output().print(
        f"Restored {printable(report.source)} as {name}: {plural(counts.photos, 'photo')} with "
        f"{plural(counts.instances, 'instance')} in {report.seconds:.1f} s. Photos written: "
        f"{report.written:,}. Searches that were compared with the backup: {report.queries} "
        f"(recall {report.recall:.1%})."
    )
    if report.erased:
        messages().print(
            f"Photos that were left out, because they were erased from gallery {report.gallery}: "
            f"{report.erased:,}."
        )
    if report.live:
        output().print(f"It is live: searches of gallery {report.gallery} use it.")
    else:
        output().print(
            f"It is not live; to make it live:  reir promote {report.gallery} {report.version}"
        )


def _advice_on_difference(report: RestoreReport) -> str:
    if report.existed or report.live:  # somebody may need it
        existed = "existed before this restore, and " if report.existed else ""
        return (
            f"It {existed}is {'live' if report.live else 'not live'}; to get the state of the "
            f"backup as a version of its own, restore it with another name: --version NAME"
        )
    return (
        f"It was not made live. Delete it with `reir rm {report.gallery} --version "
        f"{report.version}`, and restore the backup again."
    )


@contextmanager
def _progress_bar() -> Iterator[Progress]:
    """Show what is done of the current step, and the remaining time, on standard error."""
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.TextColumn("{task.percentage:.0f}%"),
        bars.TimeRemainingColumn(),
    )
    console = messages()
    # A pipe or a log would only get its last state, or an empty line.
    with bars.Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        tasks: dict[str, bars.TaskID] = {}

        def show(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bar.add_task(step, total=total)
            bar.update(tasks[step], completed=done, total=total)

        yield show

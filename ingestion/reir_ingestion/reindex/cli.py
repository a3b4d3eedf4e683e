"""`reir reindex` and `reir sources`."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from reir.cli.common import (
    AsJson,
    Checkpoint,
    Encoder,
    Gallery,
    Store,
    connect,
    encoder_from_options,
    messages,
    new_table,
    output,
    plural,
    print_json,
    printable,
)
from reir.errors import ConfigError
from reir.images.large_photos import LargePhotos
from reir_ingestion.command_runner import CommandRunner, choose_views, open_sinks, stoppable
from reir_ingestion.runner_choice import RunnerName

if TYPE_CHECKING:
    from reir.operations.gate.verdicts import GateReport
    from reir.store import InstanceStore
    from reir_ingestion.known_sources import KnownSource
    from reir_ingestion.reindex.job import ReindexJob
    from reir_ingestion.reindex.plan import ReindexPlan
    from reir_ingestion.reindex.run import ReindexRequest, ReindexResult
    from reir_ingestion.sources import Source as OpenSource
    from reir_ingestion.stages import IndexOptions

REJECTED = 3
"""Exit status if the check refused the new version."""

EXAMPLES = """[bold]Examples[/bold]

reir reindex photos

reir reindex photos --checkpoint runs/new/best --dry-run

reir reindex photos --encoder owlv2:google/owlv2-base-patch16-ensemble --canary canaries.jsonl

reir reindex photos --limit lost_photos=0.05

reir reindex photos --status"""

_COLORS = {"passed": "green", "failed": "bold red", "info": "dim"}

SourceTexts = Annotated[
    list[str] | None,
    typer.Option(
        "--source",
        help="Source to index, as for `reir index`; repeatable. Default: the sources that the "
        "gallery was indexed from (`reir sources`).",
    ),
]
Canaries = Annotated[
    Path | None,
    typer.Option(
        "--canary",
        metavar="FILE",
        help="JSON lines of expressions with known answers. Default: the canaries of the gallery "
        "(`reir canary`).",
    ),
]
LimitsFile = Annotated[
    Path | None, typer.Option("--limits", metavar="FILE", help="YAML file with limits.")
]
LimitOverrides = Annotated[
    list[str] | None,
    typer.Option(
        "--limit", metavar="NAME=VALUE", help="Change one limit of the check; repeatable."
    ),
]
Keep = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Number of old versions to keep; `reir rollback` needs at least one. Default: 1.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Do nothing; estimate the photos, the time and the disk."),
]
Drop = Annotated[
    bool, typer.Option("--drop", help="Delete the version of an interrupted or rejected job.")
]
Status = Annotated[bool, typer.Option("--status", help="Show the last job, and do nothing else.")]
Report = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FOLDER",
        help="Folder for the report of the check, report.json and report.html. Default: a folder "
        "in $REIR_HOME/reports.",
    ),
]
LargePhotosOption = Annotated[
    LargePhotos | None,
    typer.Option(help="How to encode large photos, as for `reir index`. Default: as before."),
]
MetricsHost = Annotated[
    str, typer.Option(help="Address to serve the metrics on, as for `reir index`.")
]


def register(app: typer.Typer) -> None:
    """Add the subcommands to the CLI."""
    app.command("reindex", epilog=EXAMPLES)(reindex)
    app.command("sources", epilog="[bold]Example[/bold]\n\nreir sources photos")(sources)


def reindex(  # noqa: PLR0913, every argument is an option of the command
    gallery: Gallery,
    store: Store = None,
    checkpoint: Checkpoint = None,
    encoder: Encoder = None,
    large_photos: LargePhotosOption = None,
    source: SourceTexts = None,
    canary: Canaries = None,
    limits: LimitsFile = None,
    limit: LimitOverrides = None,
    keep: Keep = None,
    dry_run: DryRun = False,
    drop: Drop = False,
    status: Status = False,
    report: Report = None,
    runner: Annotated[
        RunnerName, typer.Option(help="Where to index, as for `reir index`.")
    ] = RunnerName.AUTO,
    num_workers: Annotated[
        int | None, typer.Option(min=1, help="Largest number of encoders on Ray.")
    ] = None,
    num_gpus: Annotated[float | None, typer.Option(min=0, help="GPUs per encoder on Ray.")] = None,
    events: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Append one JSON line per batch to this file."),
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(min=0, max=65_535, help="Serve Prometheus metrics on this port meanwhile."),
    ] = None,
    metrics_host: MetricsHost = "127.0.0.1",
    as_json: AsJson = False,
) -> None:
    """Build a new version of a gallery, check it, and switch to it.

    Searches use the old version until the new one has passed the check, and all of them change to
    the new one at once. If the check fails, the old version stays live, the new one is kept for
    inspection, and the exit status is 3. An interrupted job continues when the command runs again.
    """
    from reir.config import load_config
    from reir.operations.gate.verdicts import GateLimits
    from reir.query.search import check_gallery
    from reir_ingestion.known_sources import known_source
    from reir_ingestion.reindex.run import ReindexRequest
    from reir_ingestion.sources import SourceOptions

    request = ReindexRequest(
        encoder=encoder_from_options(checkpoint, encoder) or "",
        large_photos=large_photos,
        sources=tuple(known_source(each, SourceOptions()) for each in source or ()),
        keep=keep,
        limits=load_config(GateLimits, limits, limit or ()) if limits or limit else None,
        canary_file="" if canary is None else str(canary.absolute()),
    )
    opened_sinks = open_sinks(events, metrics_port, metrics_host)
    with stoppable(), opened_sinks as sinks, connect(store) as opened:
        check_gallery(opened, gallery)
        if status or drop:
            job = _drop(opened, gallery) if drop else _job(opened, gallery)
            _show_job(opened, job, as_json=as_json)
            return
        running = CommandRunner(opened, store, runner, num_workers, num_gpus, sinks)
        if dry_run:
            _show_plan(_plan(running, gallery, request), as_json=as_json)
            return
        result = _run(running, gallery, request)
    folder = None if result.report is None else _save_report(result.report, gallery, report)
    _show_result(result, folder, as_json=as_json)
    if result.report is not None and not result.report.passed:
        raise typer.Exit(REJECTED)


def sources(
    gallery: Gallery,
    forget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="Forget a source; the photos indexed from it stay in the gallery. Repeatable.",
        ),
    ] = None,
    as_json: AsJson = False,
    store: Store = None,
) -> None:
    """List the sources that a gallery was indexed from; `reir reindex` indexes them again."""
    from reir.query.search import check_gallery
    from reir_ingestion.known_sources import forget_source, known_sources

    with connect(store) as opened:
        check_gallery(opened, gallery)
        found = known_sources(opened, gallery)
        by_text = {each.text: each for each in found}
        for text in forget or ():
            if text not in by_text:
                raise ConfigError(
                    f"gallery '{gallery}' was not indexed from {text!r}; its sources are: "
                    f"{', '.join(by_text) or 'none'}"
                )
            forget_source(opened, gallery, by_text[text])
    found = [each for each in found if each.text not in (forget or ())]
    if as_json:
        print_json([_source_values(each) for each in found])
        return
    table = new_table("source", "last indexed", "options")
    for each in found:
        values = _source_values(each)
        table.add_row(
            Text(printable(each.text)), _age(each.indexed_s), ", ".join(values["options"])
        )
    output().print(table)


def _source_values(source: KnownSource) -> dict[str, Any]:
    options = source.options
    chosen = {
        "allow-http": options.allow_http,
        "allow-private": options.allow_private,
        f"image-column {options.image_column}": bool(options.image_column),
        "follow-links": options.follow_links,
        "needs credentials": source.has_secrets,
    }
    return {
        "source": source.text,
        "indexed_s": source.indexed_s,
        "options": [name for name, is_set in chosen.items() if is_set],
    }


def _run(running: CommandRunner, gallery: str, request: ReindexRequest) -> ReindexResult:
    from reir.index_report import IndexReport
    from reir_ingestion.reindex.run import reindex as run_job

    def build(source: OpenSource, job: ReindexJob) -> IndexReport:
        messages().print(f"Indexing {printable(source.text)} into version {job.candidate}")
        options = _options(running.store, gallery, job.encoder, job.large_photos)
        return running.index(source, gallery, replace(options, candidate=job.candidate))

    def show_state(job: ReindexJob) -> None:
        messages().print(f"Re-indexing {gallery}: {job.state}")

    return run_job(running.store, gallery, request, build, on_state=show_state)


def _options(
    store: InstanceStore, gallery: str, encoder: str, large_photos: LargePhotos | None
) -> IndexOptions:
    from reir_ingestion.stages import IndexOptions

    return IndexOptions(encoder_spec=encoder, views=choose_views(store, gallery, large_photos))


def _plan(running: CommandRunner, gallery: str, request: ReindexRequest) -> ReindexPlan:
    from reir.encoders import load_encoder_spec, stored_spec
    from reir_ingestion.reindex.plan import make_plan

    spec = request.encoder or stored_spec(running.store, gallery)
    with messages().status("Measuring the speed of this machine"):
        return make_plan(
            running.store,
            running.location,
            gallery,
            request,
            load_encoder_spec(spec),
            _options(running.store, gallery, spec, request.large_photos),
        )


def _drop(store: InstanceStore, gallery: str) -> ReindexJob:
    from reir_ingestion.reindex.run import drop_job

    return drop_job(store, gallery)


def _job(store: InstanceStore, gallery: str) -> ReindexJob:
    from reir_ingestion.reindex.job import load_job

    job = load_job(store, gallery)
    if job is None:
        raise ConfigError(f"gallery '{gallery}' has never been re-indexed with `reir reindex`")
    return job


def _show_job(store: InstanceStore, job: ReindexJob, *, as_json: bool) -> None:
    from reir.operations.lease import holder_of
    from reir_ingestion.reindex.job import State, load_report
    from reir_ingestion.reindex.run import job_summary, lease_of

    holder, report = holder_of(store, lease_of(job.gallery)), load_report(store, job)
    runs_in = "" if holder is None else f"process {holder.pid} on {holder.host}"
    failed = [] if report is None else [check.name for check in report.failed_checks]
    if as_json:
        print_json(job_summary(job) | {"runs_in": runs_in or None, "failed_checks": failed})
        return
    table = new_table("", "")
    table.show_header = False
    table.add_row("gallery", job.gallery)
    table.add_row("state", job.state.value)
    table.add_row("runs in", runs_in or "no process")
    table.add_row("new version", job.candidate)
    table.add_row("compared with", job.live)
    table.add_row("encoder", job.encoder or "clare-nano")
    for each in job.sources:
        table.add_row("source", Text(printable(each.text)))
    table.add_row("started", _age(job.started_s))
    table.add_row("last change", _age(job.updated_s))
    if failed:
        table.add_row("limits not kept", Text(", ".join(failed), style="red"))
    if job.error:
        table.add_row("error", Text(job.error, style="red"))
    output().print(table)
    if not job.state.is_end and not runs_in:
        output().print(f"To finish it:  reir reindex {job.gallery}")
    if (not job.state.is_end and not runs_in) or job.state is State.REJECTED:
        output().print(f"To delete the new version:  reir reindex {job.gallery} --drop")


def _show_plan(plan: ReindexPlan, *, as_json: bool) -> None:
    from reir_ingestion.reindex.plan import format_bytes

    if as_json:
        print_json(
            {
                "sources": plan.sources,
                "others": plan.others,
                "photos": plan.num_photos,
                "photos_per_s": plan.photos_per_s,
                "seconds": plan.seconds,
                "bytes_needed": plan.bytes_needed,
                "bytes_free": plan.bytes_free,
            }
        )
        return
    table = new_table("", "", "")
    table.show_header = False
    for text, number in plan.sources.items():
        table.add_row("source", plural(number, "photo"), Text(printable(text)))
    if plan.others:
        table.add_row("other photos", plural(plan.others, "photo"), "uploaded, or from elsewhere")
    if plan.seconds is None or plan.photos_per_s is None:
        table.add_row("time", "unknown", "no photo of the gallery could be read")
    else:
        rate = f"{plan.photos_per_s:.1f} photos/s on this machine, measured on a sample"
        table.add_row("time", _duration(plan.seconds), rate)
    free = "" if plan.bytes_free is None else f"{format_bytes(plan.bytes_free)} are free"
    table.add_row("disk", format_bytes(plan.bytes_needed), free)
    output().print(table)


def _save_report(report: GateReport, gallery: str, folder: Path | None) -> Path:
    from reir.config import reir_home
    from reir.operations.gate.page import report_page
    from reir.operations.schedule.report_note import note_report

    folder = folder or reir_home() / "reports" / f"{gallery}-{report.candidate}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    (folder / "report.html").write_text(report_page(report), encoding="utf-8")
    # If `reir schedule` runs this command, it lists the report with the run.
    note_report((folder / "report.html").absolute())
    return folder


def _show_result(result: ReindexResult, folder: Path | None, *, as_json: bool) -> None:
    from reir_ingestion.reindex.run import job_summary

    if as_json:
        print_json(
            job_summary(result.job)
            | {
                "passed": None if result.report is None else result.report.passed,
                "report": None if result.report is None else result.report.to_dict(),
                "report_folder": None if folder is None else str(folder),
                "indexed": [each.to_dict() for each in result.indexed],
                "deleted": list(result.deleted),
            }
        )
        return
    screen = output()
    if result.report is not None:
        screen.print(_check_table(result.report))
        screen.print(f"Report: {folder}/report.html", soft_wrap=True)
    screen.print(_outcome(result), soft_wrap=True)


def _check_table(report: GateReport) -> Any:
    from reir.operations.gate.page import format_value

    numbers = ("live", "new")
    table = new_table("check", *numbers, "limit", "verdict", right=numbers)
    for check in report.checks:
        table.add_row(
            check.name,
            format_value(check, check.live),
            format_value(check, check.candidate),
            check.limit,
            Text("" if check.verdict == "info" else check.verdict, style=_COLORS[check.verdict]),
        )
    return table


def _outcome(result: ReindexResult) -> str:
    job = result.job
    if result.report is not None and not result.report.passed:
        names = ", ".join(check.name for check in result.report.failed_checks)
        return (
            f"Refused: {names}. Version {job.live} stays live. To look at the new one:  reir "
            f"search EXPRESSION --gallery {job.gallery} --version {job.candidate}\n"
            f"To use it nevertheless:  reir promote {job.gallery} {job.candidate}\n"
            f"To delete it:  reir reindex {job.gallery} --drop"
        )
    deleted = f" Deleted {', '.join(result.deleted)}." if result.deleted else ""
    return (
        f"Version {job.candidate} of gallery {job.gallery} is live.{deleted} To go back:  reir "
        f"rollback {job.gallery}"
    )


def _age(unix_s: float) -> str:
    """Return how long ago a moment was, for people."""
    return f"{_duration(max(0.0, time.time() - unix_s))} ago" if unix_s else "unknown"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"

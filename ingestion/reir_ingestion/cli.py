"""`reir index`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reir.cli_common import (
    DEFAULT_GALLERY,
    AsJson,
    Checkpoint,
    Encoder,
    Store,
    chosen_encoder,
    messages,
    opened,
    output,
    print_json,
    several,
    shown_photo,
)
from reir_ingestion.runners import RunnerName

if TYPE_CHECKING:
    from rich.console import RenderableType

    from reir.sinks import Sink
    from reir.store import InstanceStore
    from reir.tiling import Tiling
    from reir_ingestion.report import IndexReport, Progress
    from reir_ingestion.sources import Source as OpenSource
    from reir_ingestion.stages import IndexOptions

SERVER_FROM_INSTANCES = 50_000
LARGE = ("2561 to 5120", "over 5120")
"""Sizes of `reir_ingestion.report.SIZES` for which the command speaks of tiles."""

EXAMPLES = """[bold]Examples[/bold]

reir index ~/Pictures --gallery photos

reir index '~/Pictures/2026/**/*.jpg' --gallery photos --prune

reir index s3://bucket/2026 --gallery photos

reir index products.jsonl --gallery shop

reir index ~/Pictures --gallery photos --encoder owlv2:google/owlv2-base-patch16-ensemble

RAY_ADDRESS=auto reir index /data/photos --store http://milvus:19530 --num-gpus 0.5"""


Source = Annotated[
    str,
    typer.Argument(
        help="Folder, image file, or quoted pattern: 'photos/**/*.jpg', here or below "
        "s3://BUCKET/ or gs://BUCKET/. Or what names or holds images: a list (.jsonl, .csv, "
        ".tsv, .txt), WebDataset archives (.tar), a table (.parquet, .lance)."
    ),
]
Target = Annotated[str, typer.Option(help="Gallery to fill; made when absent.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Photos a batch.")]
Prune = Annotated[
    bool, typer.Option("--prune", help="Remove photos whose file is gone from SOURCE.")
]
RetryFailed = Annotated[
    bool, typer.Option("--retry-failed", help="Try unchanged photos again that failed before.")
]
MaxFailures = Annotated[
    str | None, typer.Option(metavar="N|N%", help="Stop when more photos fail than this.")
]
Verify = Annotated[
    bool,
    typer.Option("--verify", help="Only compare SOURCE, ledger and store; exit 1 if not equal."),
]
Repair = Annotated[
    bool, typer.Option("--repair", help="Index photos anew that the store has lost parts of.")
]
Tile = Annotated[
    bool | None,
    typer.Option(
        "--tile/--no-tile",
        help="See large photos in tiles too: finds smaller things, takes several times as long; "
        "without either, as the gallery was indexed before.",
    ),
]
Events = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Append one JSON line a batch to this file.")
]
MetricsPort = Annotated[
    int | None, typer.Option(min=0, max=65_535, help="Serve Prometheus metrics while it runs.")
]
ReportTo = Annotated[
    Path | None, typer.Option("--report", metavar="FILE", help="Write the final report as JSON.")
]
BulkImport = Annotated[
    str,
    typer.Option(
        metavar="STORAGE",
        help="New photos into a Milvus server by files instead of upserts: a "
        "folder in the server's own storage, such as s3://milvus-bucket/import. A run that is "
        "killed does some thousand photos again.",
    ),
]
ImageColumn = Annotated[
    str, typer.Option(help="Column of a list or table that has the images; default: by its name.")
]
AllowHttp = Annotated[
    bool, typer.Option("--allow-http", help="Fetch what a list names by http:// or https://.")
]
AllowPrivate = Annotated[
    bool, typer.Option("--allow-private", help="With --allow-http: private addresses, too.")
]
FollowLinks = Annotated[
    bool,
    typer.Option("--follow-links", help="Also index photos behind symlinks that leave the folder."),
]
RunnerOption = Annotated[
    RunnerName, typer.Option(help="Threads of this process, or Ray Data; auto: what suits.")
]
NumWorkers = Annotated[
    int | None, typer.Option(min=1, help="Encoders on Ray, at most; default: what fits.")
]
NumGpus = Annotated[
    float | None, typer.Option(min=0, help="GPUs of one encoder on Ray; 0.5 lets two share one.")
]


def register(app: typer.Typer) -> None:
    """Add the subcommand to the CLI."""
    app.command("index", epilog=EXAMPLES)(index)


def index(  # noqa: PLR0913, every argument is an option of the command
    source: Source,
    gallery: Target = DEFAULT_GALLERY,
    store: Store = None,
    checkpoint: Checkpoint = None,
    encoder: Encoder = None,
    batch_size: BatchSize = 16,
    prune: Prune = False,
    retry_failed: RetryFailed = False,
    max_failures: MaxFailures = None,
    verify: Verify = False,
    repair: Repair = False,
    image_column: ImageColumn = "",
    allow_http: AllowHttp = False,
    allow_private: AllowPrivate = False,
    follow_links: FollowLinks = False,
    runner: RunnerOption = RunnerName.AUTO,
    num_workers: NumWorkers = None,
    num_gpus: NumGpus = None,
    tile: Tile = None,
    bulk_import: BulkImport = "",
    events: Events = None,
    metrics_port: MetricsPort = None,
    report_to: ReportTo = None,
    as_json: AsJson = False,
) -> None:
    """Make photos searchable; run it again at any time to bring the gallery up to date."""
    from reir.encoders import stored_spec
    from reir_ingestion.failures import FailureLimit
    from reir_ingestion.sources import SourceOptions, open_source
    from reir_ingestion.stages import IndexOptions

    reach = SourceOptions(
        allow_http=allow_http,
        allow_private=allow_private,
        image_column=image_column,
        follow_links=follow_links,
    )
    found = open_source(source, reach)  # a wrong name is told before the model is loaded
    if verify:
        _verify(found, gallery, store, as_json=as_json)
        return
    _check_import(bulk_import, store)
    named = chosen_encoder(checkpoint, encoder)
    limit = None if max_failures is None else FailureLimit.parse(max_failures)
    with _stoppable(), _sinks(events, metrics_port) as sinks, opened(store) as held:
        spec = named or stored_spec(held, gallery)
        tiling = _tiling(held, gallery, tile)
        options = IndexOptions(
            batch_size=batch_size,
            prune=prune,
            retry_failed=retry_failed,
            repair=repair,
            tiling=tiling,
            encoder_spec=spec,
            max_failures=limit,
            bulk_import=bulk_import,
        )
        run = partial(_run_here, store=held)
        if _is_for_ray(runner, found):
            run = partial(_run_on_ray, store=store, most=num_workers, num_gpus=num_gpus)
        report = run(found, gallery, options, sinks)
    if report_to is not None:
        report_to.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    if as_json:
        print_json(report.to_dict())
    else:
        _show(report, store, tiled=tiling is not None)


def _show(report: IndexReport, store: str | None, *, tiled: bool) -> None:
    """Print the report and the next steps."""
    screen = output()
    screen.print(report.table())
    for line in next_steps(report, store, tiled=tiled):
        screen.print(line, markup=False, soft_wrap=True)


def _check_import(bulk_import: str, store: str | None) -> None:
    """Refuse an embedded store before the model is loaded."""
    from reir.store import default_location, is_embedded
    from reir.store.checks import no_import

    if bulk_import and is_embedded(store):
        raise no_import(store or default_location())


def _is_for_ray(runner: RunnerName, source: OpenSource) -> bool:
    """Choose the runner, and say which and why."""
    from reir_ingestion.runners import choose_runner

    choice = choose_runner(runner, source)
    messages().print(str(choice))
    return choice.name is RunnerName.RAY


def _run_here(
    source: OpenSource,
    gallery: str,
    options: IndexOptions,
    sinks: Sequence[Sink],
    *,
    store: InstanceStore,
) -> IndexReport:
    from reir.encoders import load_encoder_spec
    from reir_ingestion.pipeline import index

    with messages().status("loading the model"):
        encoder = load_encoder_spec(options.encoder_spec)
    with _progress_bar() as progress:
        return index(
            source, gallery, store, encoder, options=options, progress=progress, sinks=sinks
        )


def _run_on_ray(  # noqa: PLR0913 - all but the four parts are by name
    source: OpenSource,
    gallery: str,
    options: IndexOptions,
    sinks: Sequence[Sink],
    *,
    store: str | None,
    most: int | None,
    num_gpus: float | None,
) -> IndexReport:
    from reir.encoders import load_encoder_spec
    from reir_ingestion.jobs import Workers, index_on_ray

    # Ray prints what happens to its workers on standard output, which is for the answer.
    with _progress_bar() as progress, redirect_stdout(sys.stderr):
        return index_on_ray(
            source,
            gallery,
            store,
            partial(load_encoder_spec, options.encoder_spec),
            options=options,
            workers=Workers(most=most, num_gpus=num_gpus),
            progress=progress,
            sinks=sinks,
        )


def _tiling(store: InstanceStore, gallery: str, wanted: bool | None) -> Tiling | None:
    """How to cut large photos: as the option says, or else as the live version does."""
    from reir.tiling import Tiling

    versions = store.versions(gallery) if gallery in store.galleries() else []
    live = next((each.spec.settings for each in versions if each.live), {})
    known = Tiling.from_settings(live)
    if wanted is None:
        return known
    return (known or Tiling()) if wanted else None


@contextmanager
def _sinks(events: Path | None, metrics_port: int | None) -> Iterator[list[Sink]]:
    """Open what gets the records of the run."""
    from reir.sinks import JsonLines

    with ExitStack() as opened_sinks:
        sinks: list[Sink] = []
        if events is not None:
            sinks.append(JsonLines(events))
            opened_sinks.callback(sinks[-1].close)
        if metrics_port is not None:
            from reir_ingestion.metrics import ADDRESS, Prometheus

            metrics = Prometheus()
            port = metrics.serve(metrics_port)
            opened_sinks.callback(metrics.close)
            messages().print(f"metrics: http://{ADDRESS}:{port}/metrics")
            sinks.append(metrics)
        yield sinks


def _verify(source: OpenSource, gallery: str, store: str | None, *, as_json: bool) -> None:
    """Compare, print what differs and what mends it, and exit with 1 when something does."""
    from reir.search import check_gallery
    from reir_ingestion.verify import verify

    with opened(store) as held:
        check_gallery(held, gallery)
        report = verify(source, gallery, held, held.live_version(gallery))
    if as_json:
        print_json(report.to_dict())
    else:
        screen = output()
        screen.print(report.table())
        for kind, uris in report.examples.items():
            for uri in uris:
                screen.print(f"  {kind}: {shown_photo(uri)}", markup=False, soft_wrap=True)
        for line in report.mends(source.text, _store_option(store)):
            screen.print(f"Mend it:  {line}", markup=False, soft_wrap=True)
    if not report.is_sound:
        raise typer.Exit(1)


def next_steps(
    report: IndexReport, store: str | None = None, *, tiled: bool = False
) -> Iterator[str]:
    """Yield what the user may want to know or type after a run."""
    from reir.store import is_embedded
    from reir_ingestion.sources.local import LINKS_OUT

    name = report.gallery
    where = _store_option(store)
    if report.num_failed:
        yield f"Why photos failed:  reir failures {name}{where}"
    if links := report.passed_over.get(LINKS_OUT):
        yield (
            f"Skipped {several(links, 'symlink')} to targets outside the folder; "
            f"use --follow-links to index those too."
        )
    if report.kept_versions:
        sizes = report.kept_versions.items()
        kept = ", ".join(f"{each} ({several(number, 'photo')})" for each, number in sizes)
        yield (
            f"Version {report.version} ({several(report.num_images, 'photo')}) is live; "
            f"kept to go back to: {kept}.  reir promote {name} VERSION{where}"
        )
    num_large = sum(report.sizes.get(size, {}).get("images", 0) for size in LARGE)
    if num_large and not tiled:
        yield (
            f"{several(num_large, 'photo')} far larger than the model's input: --tile finds "
            f"smaller objects in such photos, but takes many times as long for each of them."
        )
    if report.num_instances >= SERVER_FROM_INSTANCES and is_embedded(store):
        yield (
            f"{report.num_instances:,} instances: from about {SERVER_FROM_INSTANCES:,} on a Milvus "
            f"server is the better store.  reir index SOURCE --gallery {name} --store http://HOST:19530"
        )
    yield f'Search it:  reir search "the red mug left of the laptop" --gallery {name}{where}'


def _store_option(store: str | None) -> str:
    return f" --store {shlex.quote(store)}" if store else ""


@contextmanager
def _stoppable() -> Iterator[None]:
    """Say on Ctrl-C that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        messages().print(
            "Stopped. What was written is kept; run the same command again to continue."
        )
        raise


@contextmanager
def _progress_bar() -> Iterator[Callable[[Progress], None]]:
    """Photos done, rate, time left and failures, on standard error."""
    from rich import progress as bars
    from rich.text import Text

    columns = (
        bars.TextColumn("photos"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[rate]}"),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[failures]}"),
    )

    class WithStages(bars.Progress):
        """One line for the photos, and below it each stage's share of the work."""

        stages = ""

        def get_renderables(self) -> Iterator[RenderableType]:
            yield from super().get_renderables()
            yield Text(self.stages, style="dim")

    with WithStages(*columns, console=messages()) as bar:
        task = bar.add_task("photos", total=None, rate="", failures="")

        def show(now: Progress) -> None:
            bar.update(
                task,
                completed=now.done,
                total=now.total,
                rate=f"{bar.tasks[0].speed or 0:.1f} photos/s",
                failures=f"[red]{now.failed:,} failed" if now.failed else "",
            )
            bar.stages = "  ".join(f"{stage} {share} %" for stage, share in now.percent.items())

        yield show

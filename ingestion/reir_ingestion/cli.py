"""`reir index`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reir.cli.common import (
    DEFAULT_GALLERY,
    AsJson,
    Checkpoint,
    Encoder,
    Store,
    connect,
    encoder_from_options,
    output,
    photo_name,
    plural,
    print_json,
    printable,
)
from reir.errors import ConfigError
from reir.images.large_photos import LargePhotos
from reir_ingestion.command_runner import CommandRunner, choose_views, open_sinks, stoppable
from reir_ingestion.runner_choice import RunnerName

if TYPE_CHECKING:
    from reir.index_report import IndexReport
    from reir_ingestion.sources import Source as OpenSource

SERVER_FROM_INSTANCES = 1_000_000
"""From about so many instances on, a Milvus server searches faster than the embedded store
(docs/scale.md)."""

LARGE_SIZES = ("2561 to 5120", "over 5120")
"""Keys of `IndexReport.sizes`, which come from `report.SIZES`, for which zoom is recommended."""

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
        metavar="SOURCE",
        help="A folder, an image file, or a quoted pattern such as 'photos/**/*.jpg'; local, or "
        "under s3://BUCKET/ or gs://BUCKET/. Or a file that lists or contains images: a list "
        "(.jsonl, .csv, .tsv, .txt), a WebDataset archive (.tar) or a table (.parquet, .lance).",
    ),
]
Target = Annotated[str, typer.Option(help="Gallery to index into; created if it does not exist.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Number of photos per batch.")]
Prune = Annotated[
    bool,
    typer.Option("--prune", help="Remove photos from the gallery whose file is gone from SOURCE."),
]
RetryFailed = Annotated[
    bool,
    typer.Option("--retry-failed", help="Retry photos that failed before and have not changed."),
]
MaxFailures = Annotated[
    str | None,
    typer.Option(
        metavar="N|N%", help="Stop when more than N photos, or N% of the photos, have failed."
    ),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="Do not index; compare SOURCE, ledger and store, and exit with 1 if they differ.",
    ),
]
Repair = Annotated[
    bool,
    typer.Option(
        "--repair", help="Index photos again if some of their instances are missing from the store."
    ),
]
LargePhotosOption = Annotated[
    LargePhotos | None,
    typer.Option(
        help="How to encode large photos. zoom also encodes the parts where a first look finds "
        "something, which finds smaller objects but takes several times as long; tiles also "
        "encodes all parts. By default, the gallery keeps its current setting.",
    ),
]
Events = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Append one JSON line per batch to this file.")
]
MetricsPort = Annotated[
    int | None,
    typer.Option(
        min=0, max=65_535, help="Serve Prometheus metrics on this port during the run; 0 picks one."
    ),
]
MetricsHost = Annotated[
    str,
    typer.Option(help="Address to serve the metrics on; they need no key, so keep it private."),
]
ReportTo = Annotated[
    Path | None, typer.Option("--report", metavar="FILE", help="Write the final report as JSON.")
]
BulkImport = Annotated[
    str,
    typer.Option(
        metavar="STORAGE",
        help="Send new photos to a Milvus server in files, which is faster for a first load. "
        "STORAGE is a folder in the server's own storage, such as s3://milvus-bucket/import. "
        "A run that is killed has to repeat its last few thousand photos.",
    ),
]
ImageColumn = Annotated[
    str,
    typer.Option(
        help="Column of a list or table that contains the images. By default, it is detected by "
        "its name."
    ),
]
AllowHttp = Annotated[
    bool,
    typer.Option("--allow-http", help="Download images from http:// and https:// addresses."),
]
AllowPrivate = Annotated[
    bool,
    typer.Option(
        "--allow-private", help="With --allow-http, also download from private network addresses."
    ),
]
Masks = Annotated[
    bool,
    typer.Option(
        "--masks",
        help="Also store the mask of each instance. It takes about twice as long; without it, a "
        "search with --localize computes the masks of its first hits.",
    ),
]
FollowLinks = Annotated[
    bool,
    typer.Option("--follow-links", help="Also index photos behind symlinks that leave the folder."),
]
IncludeErased = Annotated[
    bool,
    typer.Option("--include-erased", help="Index photos again that `reir erase` has deleted."),
]
RunnerOption = Annotated[
    RunnerName,
    typer.Option(
        help="local indexes in threads of this process, ray with Ray Data; auto chooses by the "
        "number of files, cores and GPUs."
    ),
]
NumWorkers = Annotated[
    int | None,
    typer.Option(
        min=1, help="Largest number of encoders on Ray. By default, as many as the cluster can run."
    ),
]
NumGpus = Annotated[
    float | None,
    typer.Option(min=0, help="GPUs per encoder on Ray; with 0.5, two encoders share a GPU."),
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
    masks: Masks = False,
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
    include_erased: IncludeErased = False,
    runner: RunnerOption = RunnerName.AUTO,
    num_workers: NumWorkers = None,
    num_gpus: NumGpus = None,
    large_photos: LargePhotosOption = None,
    bulk_import: BulkImport = "",
    events: Events = None,
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = "127.0.0.1",
    report_to: ReportTo = None,
    as_json: AsJson = False,
) -> None:
    """Make photos searchable. Run the command again to bring the gallery up to date."""
    from reir.encoders import stored_spec, with_masks
    from reir_ingestion.failures import FailureLimit
    from reir_ingestion.known_sources import known_source
    from reir_ingestion.sources import SourceOptions, open_source
    from reir_ingestion.stages import IndexOptions

    source_options = SourceOptions(
        allow_http=allow_http,
        allow_private=allow_private,
        image_column=image_column,
        follow_links=follow_links,
    )
    found = open_source(source, source_options)
    if verify:
        _verify(found, gallery, store, as_json=as_json)
        return
    _check_before_run(bulk_import, store, report_to)
    named = encoder_from_options(checkpoint, encoder)
    limit = None if max_failures is None else FailureLimit.parse(max_failures)
    opened_sinks = open_sinks(events, metrics_port, metrics_host)
    with stoppable(), opened_sinks as sinks, connect(store) as held:
        spec = named or stored_spec(held, gallery)
        views = choose_views(held, gallery, large_photos)
        options = IndexOptions(
            batch_size=batch_size,
            prune=prune,
            retry_failed=retry_failed,
            repair=repair,
            views=views,
            encoder_spec=with_masks(spec) if masks else spec,
            max_failures=limit,
            origin=known_source(source, source_options),
            include_erased=include_erased,
            bulk_import=bulk_import,
        )
        running = CommandRunner(held, store, runner, num_workers, num_gpus, sinks)
        report = running.index(found, gallery, options)
    _show(report, store, zoomed=views is not None, as_json=as_json)
    if report_to is not None:
        report_to.write_text(json.dumps(report.to_dict(), indent=2) + "\n")


def _show(report: IndexReport, store: str | None, *, zoomed: bool, as_json: bool) -> None:
    """Print the report and the next steps."""
    if as_json:
        print_json(report.to_dict())
        return
    screen = output()
    screen.print(report.table())
    for line in next_steps(report, store, zoomed=zoomed):
        screen.print(line, markup=False, soft_wrap=True)


def _check_before_run(bulk_import: str, store: str | None, report_to: Path | None) -> None:
    """Fail before the model is loaded if the store has no bulk import, or the report no folder.

    Raises:
        ConfigError: an option cannot be followed.
    """
    from reir.store import default_location, is_embedded
    from reir.store.validation import import_needs_server_error

    if bulk_import and is_embedded(store):
        raise import_needs_server_error(store or default_location())
    if report_to is not None and report_to.is_dir():
        raise ConfigError(f"--report {report_to} is a folder; name a file in it")
    if report_to is not None and not report_to.parent.is_dir():
        raise ConfigError(
            f"--report {report_to}: there is no folder {report_to.parent}; create it first"
        )


def _verify(source: OpenSource, gallery: str, store: str | None, *, as_json: bool) -> None:
    """Compare the gallery with its source, print the differences, and how to repair them.

    Raises:
        typer.Exit: with status 1, if there are differences.
    """
    from reir.query.search import check_gallery
    from reir_ingestion.verify import verify

    with connect(store) as held:
        check_gallery(held, gallery)
        report = verify(source, gallery, held, held.live_version(gallery))
    if as_json:
        print_json(report.to_dict())
    else:
        screen = output()
        screen.print(report.table())
        for kind, uris in report.examples.items():
            for uri in uris:
                screen.print(f"  {kind}: {photo_name(uri)}", markup=False, soft_wrap=True)
        for line in report.repair_commands(source.text, _store_option(store)):
            screen.print(f"To repair:  {printable(line)}", markup=False, soft_wrap=True)
    if not report.is_consistent:
        raise typer.Exit(1)


def next_steps(
    report: IndexReport, store: str | None = None, *, zoomed: bool = False
) -> Iterator[str]:
    """Yield hints about the result, and commands that the user may want to run next."""
    from reir.store import is_embedded
    from reir_ingestion.sources.local import LINKS_OUT

    name = report.gallery
    where = _store_option(store)
    if report.num_failed:
        yield f"To see why photos failed:  reir failures {name}{where}"
    if links := report.skipped.get(LINKS_OUT):
        yield (
            f"Skipped {plural(links, 'symlink')} to outside the folder; use --follow-links to "
            f"follow such links."
        )
    if report.kept_versions:
        sizes = report.kept_versions.items()
        kept = ", ".join(f"{each} ({plural(number, 'photo')})" for each, number in sizes)
        yield (
            f"Searches now use version {report.version} ({plural(report.num_images, 'photo')}). "
            f"The gallery also keeps {kept}. To go back:  reir rollback {name}{where}"
        )
    num_large = sum(report.sizes.get(size, {}).get("images", 0) for size in LARGE_SIZES)
    if num_large and not zoomed:
        is_are = "is" if num_large == 1 else "are"
        yield (
            f"{plural(num_large, 'photo')} {is_are} far larger than the input of the model: with "
            f"--large-photos zoom, smaller objects are found in such photos, but each takes many "
            f"times as long."
        )
    if report.num_instances >= SERVER_FROM_INSTANCES and is_embedded(store):
        yield (
            f"The gallery has {report.num_instances:,} instances. From about "
            f"{SERVER_FROM_INSTANCES:,} on, a Milvus server searches faster than this store:  "
            f"reir index SOURCE --gallery {name} --store http://HOST:19530"
        )
    yield f'To search it:  reir search "the red mug left of the laptop" --gallery {name}{where}'


def _store_option(store: str | None) -> str:
    return f" --store {shlex.quote(store)}" if store else ""

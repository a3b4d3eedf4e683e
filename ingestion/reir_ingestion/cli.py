"""`reir index`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
)

if TYPE_CHECKING:
    from reir_ingestion.report import IndexReport, Progress

SERVER_FROM_INSTANCES = 50_000

EXAMPLES = """[bold]Examples[/bold]

reir index ~/Pictures --gallery photos

reir index '~/Pictures/2026/**/*.jpg' --gallery photos --prune

reir index s3://bucket/2026 --gallery photos

reir index products.jsonl --gallery shop

reir index ~/Pictures --gallery photos --encoder owlv2:google/owlv2-base-patch16-ensemble"""


def register(app: typer.Typer) -> None:
    """Add the subcommand to the CLI."""
    app.command("index", epilog=EXAMPLES)(index)


def index(  # noqa: PLR0913, every argument is an option of the command
    source: Annotated[
        str,
        typer.Argument(
            help="Folder, image file, or quoted pattern: 'photos/**/*.jpg', here or below "
            "s3://BUCKET/ or gs://BUCKET/. Or what names or holds images: a list (.jsonl, .csv, "
            ".tsv, .txt), WebDataset archives (.tar), a table (.parquet, .lance)."
        ),
    ],
    gallery: Annotated[
        str, typer.Option(help="Gallery to fill; made when absent.")
    ] = DEFAULT_GALLERY,
    store: Store = None,
    checkpoint: Checkpoint = None,
    encoder: Encoder = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Photos a batch.")] = 16,
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove photos whose file is gone from SOURCE.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try unchanged photos again that failed before.")
    ] = False,
    image_column: Annotated[
        str,
        typer.Option(help="Column of a list or table that has the images; default: by its name."),
    ] = "",
    allow_http: Annotated[
        bool, typer.Option("--allow-http", help="Fetch what a list names by http:// or https://.")
    ] = False,
    allow_private: Annotated[
        bool, typer.Option("--allow-private", help="With --allow-http: private addresses, too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make photos searchable; run it again at any time to bring the gallery up to date."""
    from reir.encoders import load_encoder_spec, stored_spec
    from reir_ingestion.pipeline import IndexOptions
    from reir_ingestion.pipeline import index as run
    from reir_ingestion.sources import SourceOptions, open_source

    reach = SourceOptions(
        allow_http=allow_http, allow_private=allow_private, image_column=image_column
    )
    found = open_source(source, reach)  # a wrong name is told before the model is loaded
    named = chosen_encoder(checkpoint, encoder)
    with _stoppable(), opened(store) as held:
        spec = named or stored_spec(held, gallery)
        options = IndexOptions(
            batch_size=batch_size, prune=prune, retry_failed=retry_failed, encoder_spec=spec
        )
        with messages().status("loading the model"):
            model = load_encoder_spec(spec)
        with _progress_bar() as progress:
            report = run(found, gallery, held, model, options=options, progress=progress)
        sizes = {each.name: each.num_instances for each in held.versions(gallery)}
    if as_json:
        print_json(report.to_dict())
        return
    screen = output()
    screen.print(report.table())
    for line in next_steps(report, store, sizes[report.version]):
        screen.print(line, markup=False, soft_wrap=True)


def next_steps(
    report: IndexReport, store: str | None = None, num_instances: int = 0
) -> Iterator[str]:
    """Yield what the user may want to know or type after a run."""
    from reir.store import is_embedded

    name = report.gallery
    where = f" --store {shlex.quote(store)}" if store else ""
    if report.num_failed:
        yield f"Why photos failed:  reir failures {name}{where}"
    if report.kept_versions:
        kept = ", ".join(f"{each} ({n:,} photos)" for each, n in report.kept_versions.items())
        yield (
            f"Version {report.version} ({report.num_images:,} photos) is live; "
            f"kept to go back to: {kept}.  reir promote {name} VERSION{where}"
        )
    if num_instances >= SERVER_FROM_INSTANCES and is_embedded(store):
        yield (
            f"{num_instances:,} instances: from about {SERVER_FROM_INSTANCES:,} on a Milvus server "
            f"is the better store.  reir index SOURCE --gallery {name} --store http://HOST:19530"
        )
    yield f'Search it:  reir search "the red mug left of the laptop" --gallery {name}{where}'


@contextmanager
def _stoppable() -> Iterator[None]:
    """Say on Ctrl-C that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        messages().print("Stopped. What was written stays; the same command goes on from there.")
        raise


@contextmanager
def _progress_bar() -> Iterator[Callable[[Progress], None]]:
    """Photos done, rate, time left and failures, on standard error."""
    from rich import progress as bars

    columns = (
        bars.TextColumn("photos"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[rate]}"),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[failures]}"),
    )
    with bars.Progress(*columns, console=messages()) as bar:
        task = bar.add_task("photos", total=None, rate="", failures="")

        def show(now: Progress) -> None:
            bar.update(
                task,
                completed=now.done,
                total=now.total,
                rate=f"{bar.tasks[0].speed or 0:.1f} photos/s",
                failures=f"[red]{now.failed:,} failed" if now.failed else "",
            )

        yield show

"""`reir index`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
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
from reir_ingestion.runners import RunnerName

if TYPE_CHECKING:
    from reir.store import InstanceStore
    from reir_ingestion.report import IndexReport, Progress
    from reir_ingestion.sources import Source
    from reir_ingestion.stages import IndexOptions

SERVER_FROM_INSTANCES = 50_000

EXAMPLES = """[bold]Examples[/bold]

reir index ~/Pictures --gallery photos

reir index '~/Pictures/2026/**/*.jpg' --gallery photos --prune

reir index ~/Pictures --gallery photos --encoder owlv2:google/owlv2-base-patch16-ensemble

RAY_ADDRESS=auto reir index /data/photos --store http://milvus:19530 --num-gpus 0.5"""


def register(app: typer.Typer) -> None:
    """Add the subcommand to the CLI."""
    app.command("index", epilog=EXAMPLES)(index)


def index(  # noqa: PLR0913, every argument is an option of the command
    source: Annotated[
        str, typer.Argument(help="Folder, image file, or quoted pattern: 'photos/**/*.jpg'.")
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
    runner: Annotated[
        RunnerName, typer.Option(help="Threads of this process, or Ray Data; auto: what suits.")
    ] = RunnerName.AUTO,
    num_workers: Annotated[
        int | None, typer.Option(min=1, help="Encoders on Ray, at most; default: what fits.")
    ] = None,
    num_gpus: Annotated[
        float | None,
        typer.Option(min=0, help="GPUs of one encoder on Ray; 0.5 lets two share one."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make photos searchable; run it again at any time to bring the gallery up to date."""
    from reir.encoders import stored_spec
    from reir_ingestion.runners import choose_runner
    from reir_ingestion.sources import open_source
    from reir_ingestion.stages import IndexOptions

    found = open_source(source)  # a wrong name is told before the model is loaded
    named = chosen_encoder(checkpoint, encoder)
    with _stoppable(), opened(store) as held:
        spec = named or stored_spec(held, gallery)
        options = IndexOptions(
            batch_size=batch_size, prune=prune, retry_failed=retry_failed, encoder_spec=spec
        )
        choice = choose_runner(runner, found)
        messages().print(str(choice))
        if choice.name is RunnerName.RAY:
            report = _on_ray(found, gallery, store, options, (num_workers, num_gpus))
        else:
            report = _in_this_process(found, gallery, held, options)
        sizes = {each.name: each.num_instances for each in held.versions(gallery)}
    if as_json:
        print_json(report.to_dict())
        return
    screen = output()
    screen.print(report.table())
    for line in next_steps(report, store, sizes[report.version]):
        screen.print(line, markup=False, soft_wrap=True)


def _in_this_process(
    source: Source, gallery: str, store: InstanceStore, options: IndexOptions
) -> IndexReport:
    from reir.encoders import load_encoder_spec
    from reir_ingestion.pipeline import index

    with messages().status("loading the model"):
        encoder = load_encoder_spec(options.encoder_spec)
    with _progress_bar() as progress:
        return index(source, gallery, store, encoder, options=options, progress=progress)


def _on_ray(
    source: Source,
    gallery: str,
    store: str | None,
    options: IndexOptions,
    workers: tuple[int | None, float | None],
) -> IndexReport:
    from reir.encoders import load_encoder_spec
    from reir_ingestion.jobs import Workers, index_on_ray

    most, num_gpus = workers
    load = partial(load_encoder_spec, options.encoder_spec)
    # Ray prints what happens to its workers on standard output, which is for the answer.
    with _progress_bar() as progress, redirect_stdout(sys.stderr):
        return index_on_ray(
            source,
            gallery,
            store,
            load,
            options=options,
            workers=Workers(most=most, num_gpus=num_gpus),
            progress=progress,
        )


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

"""`reir eval ...`: one subcommand for each published task."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from reir.cli_common import chosen_encoder

if TYPE_CHECKING:
    from reir.datasets import ReferringDataset
    from reir.evaluate import Progress


def register(app: typer.Typer) -> None:
    """Add `eval` and its subcommands to the command line."""
    group = typer.Typer(no_args_is_help=True, help="Measure a checkpoint on annotated photos.")
    group.command("reir")(evaluate)
    app.add_typer(group, name="eval")


def evaluate(  # noqa: PLR0913, every argument is an option of the command
    annotations: Annotated[
        Path, typer.Option(help="Annotations in REIRCOCO's json form.", dir_okay=False)
    ],
    images: Annotated[Path, typer.Option(help="Folder that the file names start from.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint directory; without it, the shipped one.")
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Model by name, as `reir index --encoder` takes it."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    all_expressions: Annotated[
        bool, typer.Option("--all-expressions", help="Every expression of an instance, not one.")
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Only the first N photos: a quick try, no figure to publish."),
    ] = None,
) -> None:
    """Find each expression's instance among all photos: BR@K, image recall, REC precision."""
    from reir.datasets import read_reircoco
    from reir.encoders import load_encoder_spec
    from reir.evaluate import evaluate_reir

    dataset = read_reircoco(annotations)
    if limit is not None:
        dataset = first_photos(dataset, limit)
    model = load_encoder_spec(chosen_encoder(checkpoint, encoder) or "")
    with _progress_bar() as progress:
        report = evaluate_reir(
            model, dataset, images, all_expressions=all_expressions, progress=progress
        )
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        Console().print(report.table())


def first_photos(dataset: ReferringDataset, limit: int) -> ReferringDataset:
    """Return the first photos of a dataset with what belongs to them."""
    name = f"first {limit}"
    members = frozenset(photo.image_id for photo in dataset.images[:limit])
    return replace(dataset, splits={name: members}).split(name)


@contextmanager
def _progress_bar() -> Iterator[Progress]:
    """Photos done, rate and time left, on standard error."""
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[rate]} photos/s"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("photos", total=None, rate="-")

        def show(done: int, total: int) -> None:
            speed = bar.tasks[0].speed
            rate = f"{speed:.1f}" if speed else "-"
            bar.update(task, completed=done, total=total, rate=rate)

        yield show

"""`reir build-dataset`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import typer
from rich import progress as bars
from rich.text import Text

from reir.cli.common import (
    AsJson,
    Checkpoint,
    messages,
    new_table,
    output,
    plural,
    print_json,
    printable,
)
from reir.errors import ConfigError, nearest_name
from reir_ingestion.build_dataset import options as given

if TYPE_CHECKING:
    from reir_ingestion.build_dataset.answers.budget import Budget
    from reir_ingestion.build_dataset.build import BuildOptions, BuildReport
    from reir_ingestion.build_dataset.choice import Choice
    from reir_ingestion.build_dataset.photos import PhotoSet

EXAMPLES = """[bold]Examples[/bold]

reir build-dataset ~/Pictures/2026 built

reir build-dataset coco built --writer endpoint --endpoint http://localhost:8000/v1 --model NAME"""

MAX_REASONS = 12

Name = TypeVar("Name", bound=StrEnum)


def register(app: typer.Typer) -> None:
    """Add the subcommand to the command line."""
    app.command("build-dataset", epilog=EXAMPLES)(build_dataset_command)


def build_dataset_command(  # noqa: PLR0913 - every argument is an option of the command
    photos: given.Photos,
    out: given.Out,
    writer: given.Writer = "template",
    judge: given.Judges = "rules",
    unique_in: given.UniqueIn = "gallery",
    per_instance: given.PerInstance = 3,
    val_share: given.ValShare = 0.1,
    annotations: given.Annotations = None,
    split: given.Split = None,
    checkpoint: Checkpoint = None,
    endpoint: given.Endpoint = "",
    model: given.Model = "",
    judge_model: given.JudgeModel = "",
    threads: given.Threads = 4,
    timeout: given.Timeout = 120.0,
    engines: given.Engines = 1,
    engine_option: given.EngineOption = None,
    ask_again: given.AskAgain = False,
    max_requests: given.MaxRequests = None,
    max_cost: given.MaxCost = None,
    price_in: given.PriceIn = 0.0,
    price_out: given.PriceOut = 0.0,
    as_json: AsJson = False,
) -> None:
    """Write and filter expressions about the instances of photos, for training and evaluation.

    A rerun continues where an earlier one stopped, and asks no question twice that was answered.
    """
    from reir.config import apply_override
    from reir_ingestion.build_dataset.answers.budget import Budget, Limits
    from reir_ingestion.build_dataset.build import BuildOptions, work_folder
    from reir_ingestion.build_dataset.choice import Choice, JudgeName, Scope, WriterName
    from reir_ingestion.build_dataset.photos import open_photos

    choice = Choice(
        writer=_named(WriterName, "--writer", writer),
        judges=tuple(_named(JudgeName, "--judge", each) for each in judge.split(",")),
        model=model,
        judge_model=judge_model,
        endpoint=endpoint,
        timeout_s=timeout,
        engines=engines,
        engine_arguments=reduce(apply_override, engine_option or [], {}),
        scope=_named(Scope, "--unique-in", unique_in),
        per_instance=per_instance,
        ask_again=ask_again,
    )
    limits = Limits(
        max_requests=max_requests, max_cost=max_cost, price_in=price_in, price_out=price_out
    )
    budget = Budget(limits, work_folder(out))
    # Before the models are loaded, so that a wrong folder is reported at once.
    opened = open_photos(photos, annotations=annotations, split=split)
    how = BuildOptions(val_share=val_share, threads=threads)
    report = _build(opened, out, choice, checkpoint, budget, how)
    if as_json:
        print_json({**report.to_dict(), "requests": budget.num_requests, "cost": budget.cost})
    else:
        _print(report, budget)


def _build(  # noqa: PLR0913 - one by one is clearer than a bag of options
    photos: PhotoSet,
    out: Path,
    choice: Choice,
    checkpoint: Path | None,
    budget: Budget,
    how: BuildOptions,
) -> BuildReport:
    """Load the models and build the dataset, with a progress bar."""
    from reir.checkpoint import load_color_reader, load_encoder
    from reir_ingestion.build_dataset.build import build_dataset, work_folder
    from reir_ingestion.build_dataset.choice import BuilderFactory, connected
    from reir_ingestion.build_dataset.scenes import SceneReader

    work = work_folder(out)
    with connected(choice):
        with messages().status("loading the models"):
            encoder = load_encoder(checkpoint)
            colors = load_color_reader(checkpoint)
            builders = BuilderFactory(choice, encoder, budget, work, colors)
        with _progress() as show:
            reader = SceneReader(encoder, work / "scenes")
            return build_dataset(photos, out, reader, builders, replace(how, progress=show))


def _named(kind: type[Name], option: str, text: str) -> Name:
    """Return the member that an option names.

    Raises:
        ConfigError: there is none.
    """
    names = [each.value for each in kind]
    if text.strip() not in names:
        raise ConfigError(
            f"{option} {text!r} is unknown; use one of {', '.join(names)}"
            f"{nearest_name(text, names)}"
        )
    return kind(text.strip())


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show the stage, what is done, the rate and the time left on standard error."""
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[rate]}"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=messages()) as bar:
        tasks: dict[str, bars.TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            # The stages are not known in advance, because the number of rounds of batches is not.
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total, rate="")
            speed = bar.tasks[tasks[stage]].speed or 0
            bar.update(tasks[stage], completed=done, rate=f"{speed:.1f}/s")

        yield show


def _print(report: BuildReport, budget: Budget) -> None:
    console, counts = output(), report.statistics
    for status, number in counts.photos.items():
        console.print(f"{plural(number, 'photo')} {status}")
    kept = f"{plural(counts.expressions, 'expression')} about {counts.described:,} of "
    console.print(f"{kept}{plural(counts.instances, 'instance')}")
    if budget.num_requests:
        told = f"{plural(budget.num_requests, 'request')}, "
        console.print(
            f"{told}{budget.tokens_in:,} tokens asked, {budget.tokens_out:,} answered, "
            f"cost {budget.cost:.2f}"
        )
    table = new_table("not kept", "number", right=("number",))
    groups = (counts.photo_reasons, counts.writer_refusals, counts.not_kept)
    for name, reasons in zip(("photo", "instance", "expression"), groups, strict=True):
        for reason, number in list(reasons.items())[:MAX_REASONS]:
            table.add_row(printable(f"{name}: {reason}"), f"{number:,}")
    if table.rows:
        console.print(table)
    console.print(Text(f"dataset: {printable(str(report.out))}"), soft_wrap=True)

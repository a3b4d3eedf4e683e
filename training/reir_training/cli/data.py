"""`reir data check`: checks whether data is ready for training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reir.cli.common import AsJson

if TYPE_CHECKING:
    from rich.table import Table

    from reir_training.report.data_check import DataReport, SetReport, SplitReport

# Exit code, so that a script can stop before it starts a training that would fail.
NOT_READY = 1


def register(app: typer.Typer) -> None:
    """Add `reir data` to the command line."""
    group = typer.Typer(no_args_is_help=True, help="Inspect training data.")
    group.command("check")(check)
    app.add_typer(group, name="data")


def check(
    data: Annotated[Path, typer.Option(help="YAML file of a training run, as for `reir train`.")],
    as_json: AsJson = False,
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Override a setting of the YAML file, such as exclude_evaluation=true. May be "
            "repeated.",
        ),
    ] = None,
) -> None:
    """Check the data of a training configuration before you train.

    Reads all annotations, finds missing photo files, decodes a sample of the photos, and finds
    photos that are both trained on and evaluated on. Exits with code 1 if there is a problem.
    """
    # Imported here, so that `reir --help` does not wait for the libraries of training.
    from reir.cli.common import messages, print_json
    from reir.config import load_config
    from reir_training.report.data_check import DataOnlyConfig, check_data

    config = load_config(DataOnlyConfig, data, override or [])
    with messages().status("reading") as status:
        report = check_data(config, lambda label: status.update(f"reading {label}"))
    if as_json:
        print_json(report.to_dict())
    else:
        _show(report)
    if not report.fit:
        raise typer.Exit(NOT_READY)


def _show(report: DataReport) -> None:
    from rich.text import Text

    from reir.cli.common import output, printable, printable_lines

    console = output()
    for each in report.sets:
        console.print(Text(printable(each.label), style="bold"))
        console.print(_table(each))
        console.print()
    for lines, word, style in (
        (report.notes, "note: ", "yellow"),
        (report.problems, "problem: ", "bold red"),
    ):
        for line in lines:
            console.print(Text.assemble((word, style), printable_lines(line)), soft_wrap=True)
    verdict = "ready for training" if report.fit else "not ready for training"
    console.print(Text(verdict, style="bold green" if report.fit else "bold red"))


def _table(found: SetReport) -> Table:
    """Return a table with one row per count and one column per split."""
    from reir.cli.common import new_table, printable

    names = [printable(f"{split.split} ({split.use})") for split in found.splits]
    table = new_table("", *names, right=tuple(names))
    for label, cell in _ROWS:
        table.add_row(label, *(cell(split) for split in found.splits))
    # A data set with a single kind of expression needs no breakdown.
    kinds = sorted({kind for split in found.splits for kind in split.expressions_by_kind})
    if len(kinds) > 1:
        for kind in kinds:
            counts = (split.expressions_by_kind.get(kind, 0) for split in found.splits)
            table.add_row(f"  {printable(kind)}", *(f"{count:,}" for count in counts))
    return table


def _unreadable(split: SplitReport) -> str:
    return f"{len(split.unreadable)} of {split.sampled}"


def _count(field: str) -> Callable[[SplitReport], str]:
    return lambda split: f"{getattr(split, field):,}"


_ROWS: Sequence[tuple[str, Callable[[SplitReport], str]]] = (
    ("photos", _count("photos")),
    ("  without expressions", _count("photos_without_expressions")),
    ("  leaked", _count("leaked")),
    ("  file missing", lambda split: f"{len(split.missing):,}"),
    ("  unreadable (of a sample)", _unreadable),
    ("instances", _count("instances")),
    ("  box outside the photo", _count("boxes_outside")),
    ("  box without area", _count("boxes_empty")),
    ("captions", _count("captions")),
    ("expressions", _count("expressions")),
    ("  duplicate", _count("duplicates")),
    ("  ambiguous", _count("ambiguous")),
    ("  mean number of words", _count("mean_words")),
    ("  95th percentile of words", _count("p95_words")),
)

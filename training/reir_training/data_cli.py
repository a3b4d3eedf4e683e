"""`reir data check`: is this data fit for training?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reir.cli_common import AsJson

if TYPE_CHECKING:
    from rich.table import Table

    from reir_training.data_check import DataReport, SetReport, SplitReport

UNFIT = 1


def register(app: typer.Typer) -> None:
    """Add `data` and its subcommands to the CLI."""
    group = typer.Typer(no_args_is_help=True, help="Look at training data.")
    group.command("check", help="Check a data configuration before hours are spent on it.")(check)
    app.add_typer(group, name="data")


def check(
    data: Annotated[Path, typer.Option(help="YAML file of a training run.")],
    as_json: AsJson = False,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override one setting: exclude_evaluation=true."),
    ] = None,
) -> None:
    """Read every declared set, look for every photo, decode a few; exit with 1 when unfit."""
    from reir.cli_common import messages, print_json
    from reir.config import load_config
    from reir_training.data_check import DataPart, check_data

    config = load_config(DataPart, data, override or [])
    with messages().status("reading") as status:
        report = check_data(config, lambda label: status.update(f"reading {label}"))
    if as_json:
        print_json(report.to_dict())
    else:
        _show(report)
    if not report.fit:
        raise typer.Exit(UNFIT)


def _show(report: DataReport) -> None:
    from rich.text import Text

    from reir.cli_common import output, printable

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
            console.print(Text.assemble((word, style), printable(line)), soft_wrap=True)
    verdict = "fit for training" if report.fit else "not fit for training"
    console.print(Text(verdict, style="bold green" if report.fit else "bold red"))


def _table(found: SetReport) -> Table:
    """One row a count, one column a split."""
    from reir.cli_common import new_table, printable

    names = [printable(f"{split.split} ({split.use})") for split in found.splits]
    table = new_table("", *names, right=tuple(names))
    for label, cell in _ROWS:
        table.add_row(label, *(cell(split) for split in found.splits))
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
    ("  unreadable, sampled", _unreadable),
    ("instances", _count("instances")),
    ("  box outside the photo", _count("boxes_outside")),
    ("  box without area", _count("boxes_empty")),
    ("captions", _count("captions")),
    ("expressions", _count("expressions")),
    ("  duplicate", _count("duplicates")),
    ("  of several instances", _count("ambiguous")),
    ("  words, mean", _count("mean_words")),
    ("  words, 95th percentile", _count("p95_words")),
)

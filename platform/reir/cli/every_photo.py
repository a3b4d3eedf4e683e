"""`reir search --all`: every photo of a gallery that has the described object."""

from __future__ import annotations

import json
from contextlib import ExitStack
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from reir.cli.common import is_typed, messages, new_table, output, photo_text, plural
from reir.errors import ConfigError
from reir.query.language import NOTE, seems_foreign

if TYPE_CHECKING:
    from reir.query.every_photo import EveryPhoto, EveryPhotoOptions, FoundPhoto
    from reir.query.photo_curve import Decision

Every = Annotated[
    bool,
    typer.Option(
        "--all", help="Find every photo that has the object, not the -k best hits, one by one."
    ),
]
Precision = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="With --all: set the threshold so that this share of the found photos should have the "
        "object.",
        show_default=False,
    ),
]
Recall = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="With --all: set the threshold so that this share of the photos with the object "
        "should be found.",
        show_default=False,
    ),
]

ONLY_WITHOUT_ALL = (
    *("k", "per_image", "like", "unlike", "rerank", "localize", "segmenter"),
    *("zoom", "localizer", "explain", "draw", "export"),
)
ONLY_WITH_ALL = ("precision", "recall")
TABLE_ROWS = 1000
"""Photos in one table; a longer answer is printed as several tables, as it is found."""


def check_options(context: typer.Context, *, every: bool) -> None:
    """Check that a command has no option that `--all`, or its absence, rules out.

    Raises:
        ConfigError: it has one.
    """
    excluded = ONLY_WITHOUT_ALL if every else ONLY_WITH_ALL
    for parameter in context.command.params:
        # Typed, because the value alone may be the default or what the user gave.
        if parameter.name in excluded and is_typed(context, parameter.name):
            rule = "is not possible with --all" if every else "needs --all"
            raise ConfigError(f"{parameter.opts[0]} {rule}; leave one of them out, or see --help")


def print_every_photo(  # noqa: PLR0913 - the options of the command
    expression: str | None,
    options: EveryPhotoOptions,
    gallery: str,
    store: str | None,
    encoder: str | None,
    server: str | None,
    version: str,
    *,
    as_json: bool,
) -> None:
    """Search here or on a server, and print the photos as they are found.

    Raises:
        ConfigError: there is no expression, or the options exclude each other.
    """
    if expression is None:
        raise ConfigError("--all needs an EXPRESSION, which says what to search for")
    # The photos are read while they are printed, so the gallery or client stays open until then.
    with ExitStack() as opened:
        if server is not None:
            from reir.client.http_client import Client

            client = opened.enter_context(Client(server))
            found = client.every_photo(expression, gallery, **options)
        else:
            from reir.query.search import open_gallery

            with messages().status("loading the model"):
                local = open_gallery(gallery, store=store, encoder=encoder, version=version)
            found = opened.enter_context(local).every_photo(expression, **options)
        if as_json:
            for line in found.lines():
                typer.echo(json.dumps(line))
        else:
            print_tables(found)


def print_tables(found: EveryPhoto) -> None:
    """Print the threshold, tables of the photos, and how many were found and left out."""
    console = output()
    if seems_foreign(found.expression):
        console.print(Text(NOTE, style="yellow"))
    console.print(Text(expectation(found.decision, found.num_photos), style="bold"))
    number = 0
    while rows := list(islice(found, TABLE_ROWS)):
        console.print("", as_table(rows, number + 1), "", sep="\n")
        number += len(rows)
    place = f"in gallery {found.gallery}, version {found.version}"
    ending = f"{plural(number, 'photo')} found {place}"
    # Counted while the photos are read, so the number is complete only after the last one.
    if found.num_contradicted:
        ending += (
            f"; {plural(found.num_contradicted, 'photo')} left out, because the colors do not fit "
            f"(--no-verify keeps them)"
        )
    console.print(Text(ending, style="dim"))


def expectation(decision: Decision, num_photos: int | None) -> str:
    """Return a sentence that says which photos are found, and how often that should be right."""
    found = f"Photos whose presence is at least {decision.min_presence:.3g}."
    recall = _percent(decision.recall)
    if num_photos is None or decision.precision is None:  # the API key is that of a tenant
        return f"{found} Recall to expect: {recall}."
    return (
        f"{found} To expect if one of {plural(num_photos, 'photo')} has the object: "
        f"recall {recall}, precision {_percent(decision.precision)}."
    )


def as_table(rows: list[FoundPhoto], first: int) -> Table:
    """Return photos as a table; its first row has the number `first`."""
    table = new_table("#", "presence", "photo", "x %", "y %", right=("#", "presence"))
    for number, each in enumerate(rows, first):
        x1, y1, x2, y2 = (round(100 * side) for side in each.box)
        presence = f"{100 * each.presence:.0f} %"
        table.add_row(str(number), presence, photo_text(each.uri), f"{x1}-{x2}", f"{y1}-{y2}")
    return table


def _percent(share: float) -> str:
    """Return a share in percent with two digits, such as 0.43 %, 54 % or 100 %."""
    # Twice, because `.2g` writes 100 as 1e+02, and `g` has more digits.
    return f"{float(f'{100 * share:.2g}'):g} %"

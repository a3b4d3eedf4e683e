"""What the core commands share: their options, where output goes, and how a photo is named."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from reir.errors import ConfigError

if TYPE_CHECKING:
    from reir.store.contract import InstanceStore

DEFAULT_GALLERY = "default"
UNLIMITED_COLUMNS = 10_000

Gallery = Annotated[str, typer.Argument(metavar="GALLERY", help="Name of the gallery.")]
Store = Annotated[
    str | None,
    typer.Option(envvar="REIR_STORE", help="Folder of the embedded store, or address of a server."),
]
Checkpoint = Annotated[
    Path | None, typer.Option(help="Directory of a checkpoint that `reir train` wrote.")
]
Encoder = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="Model by name: owlv2:NAME_OR_DIR, siglip-crops:NAME_OR_DIR, clare:DIR, "
        "clare-masks:DIR or clare-nano; without it, the one that the gallery was indexed with.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def output() -> Console:
    """Return the console for answers; a pipe or file gets lines of any length, not cut ones."""
    return Console(width=None if sys.stdout.isatty() else UNLIMITED_COLUMNS, highlight=False)


def messages() -> Console:
    """Return the console for all that is not the answer itself: standard error."""
    return Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """Print plain values as JSON, in ASCII, so that any terminal and any pipe can take it."""
    typer.echo(json.dumps(value, indent=2))


def new_table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """Return an empty table without frames; columns in `right` hold numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        justify: Any = "right" if column in right else "left"
        table.add_column(column, justify=justify, no_wrap=column in right, overflow="fold")
    return table


def chosen_encoder(checkpoint: Path | None, encoder: str | None) -> str | None:
    """Return the encoder that the options name, in full; None when they name none.

    Raises:
        ConfigError: both options are given, or the encoder's name is not known.
    """
    from reir.encoders import TRAINED_KIND, EncoderSpec, parse_encoder_spec

    if checkpoint is None:
        return None if encoder is None else str(parse_encoder_spec(encoder))
    if encoder is not None:
        raise ConfigError(f"--checkpoint {checkpoint} and --encoder {encoder}: give one of them")
    return str(EncoderSpec(TRAINED_KIND, str(checkpoint.absolute())))


@contextmanager
def opened(location: str | None) -> Iterator[InstanceStore]:
    """Open the store for one command."""
    from reir.store import open_store

    store = open_store(location)
    try:
        with messages().status("opening the store"):
            store.galleries()  # first contact, which may have to start the embedded server
        yield store
    finally:
        store.close()


def photo_text(uri: str) -> Text:
    """Return how a photo is shown: the path for a local file, from here if it lies below."""
    return Text(shown_photo(uri), style=f"link {uri}")


def shown_photo(uri: str) -> str:
    """Return the path of a local photo, relative if it lies below this folder; else the URI.

    Control characters and bytes in no valid encoding are escaped, so that a file name can neither
    break a line nor steer the terminal.
    """
    from reir.images import path_of_uri

    if not uri.startswith("file:///"):
        return printable(uri)
    path = path_of_uri(uri)
    here = Path.cwd()
    return printable(os.fspath(path.relative_to(here) if path.is_relative_to(here) else path))


def several(number: int, noun: str) -> str:
    """Return "1 photo", or "1,200 photos"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def printable(text: str) -> str:
    """Return text with every character that is no visible one escaped."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )

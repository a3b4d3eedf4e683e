"""What all commands share: options, consoles for output, and formatting for the terminal.

Heavy packages are imported within functions, so that `reir --help` is fast.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
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
# Width for a pipe or file, where rich would otherwise wrap lines as in a terminal of 80 columns.
UNLIMITED_COLUMNS = 10_000

Gallery = Annotated[str, typer.Argument(metavar="GALLERY", help="Name of the gallery.")]
Store = Annotated[
    str | None,
    typer.Option(
        envvar="REIR_STORE", help="Folder of an embedded store, or address of a Milvus server."
    ),
]
Checkpoint = Annotated[
    Path | None, typer.Option(help="Checkpoint directory written by `reir train`.")
]
Encoder = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="Encoder to use: owlv2:NAME_OR_DIR, siglip-crops:NAME_OR_DIR, "
        "siglip-relations:NAME_OR_DIR, clare:DIR, clare-masks:DIR or clare-nano. "
        "Default: the encoder that the gallery was indexed with.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def output() -> Console:
    """Return the console for results; lines are wrapped in a terminal, never in a pipe or file."""
    # Without `highlight`, rich does not color the numbers and paths in a text.
    return Console(width=None if sys.stdout.isatty() else UNLIMITED_COLUMNS, highlight=False)


def messages() -> Console:
    """Return the console for everything but the result itself, on standard error."""
    return Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """Print plain values as JSON in ASCII, so that no terminal encoding can fail on them."""
    typer.echo(json.dumps(value, indent=2))


def new_table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """Return an empty table without borders; the columns in `right` are right-aligned."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        justify: Any = "right" if column in right else "left"
        table.add_column(column, justify=justify, no_wrap=column in right, overflow="fold")
    return table


def encoder_from_options(checkpoint: Path | None, encoder: str | None) -> str | None:
    """Return the encoder spec that the options name, None without either option.

    Raises:
        ConfigError: both options are given, or the kind of encoder is unknown.
    """
    from reir.encoders import TRAINED_KIND, EncoderSpec, parse_encoder_spec

    if checkpoint is None:
        return None if encoder is None else str(parse_encoder_spec(encoder))
    if encoder is not None:
        raise ConfigError(
            f"--checkpoint {checkpoint} and --encoder {encoder} exclude each other; give only one"
        )
    # A gallery stores this path, and later commands may run in another folder.
    return str(EncoderSpec(TRAINED_KIND, str(checkpoint.absolute())))


def is_typed(context: typer.Context, parameter: str) -> bool:
    """Whether a parameter was given on the command line, not by the environment or a default."""
    source = context.get_parameter_source(parameter)
    # By the name, because Typer brings its own copy of click, whose types are not public.
    return source is not None and source.name == "COMMANDLINE"


def refuse_with_server(context: typer.Context, version: str, models: Mapping[str, object]) -> None:
    """Refuse options of a search that are for the server to decide.

    A store is refused only if it is typed: the environment may name one for other commands.

    Args:
        context: the command.
        version: value of `--version`.
        models: values of the options that name a model, by name without dashes; None if not given.

    Raises:
        ConfigError: one of them is given.
    """
    rule = "is not possible with --server or $REIR_SERVER: a server"
    for name, spec in models.items():
        if spec is not None:
            raise ConfigError(f"--{name} {spec} {rule} has its own models; leave one of them out")
    if is_typed(context, "store"):
        raise ConfigError(
            f"--store {context.params['store']} {rule} has its own store; leave one of them out"
        )
    if version:
        raise ConfigError(
            f"--version {version} {rule} searches the version that is live, or the one that its "
            f"setting `live.pinned` names"
        )


@contextmanager
def connect(location: str | None) -> Iterator[InstanceStore]:
    """Open the store for one command, and close it at the end."""
    from reir.store import open_store

    store = open_store(location)
    try:
        with messages().status("opening the store"):
            store.galleries()  # the first request may have to start the embedded server
        yield store
    finally:
        store.close()


@contextmanager
def photo_progress(what: str = "photos") -> Iterator[Callable[[int, int], None]]:
    """Show what is done with photos, how many are done, rate and remaining time.

    Yields a function that is called with the number of finished photos and of all photos.
    """
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[rate]} photos/s"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=messages()) as bar:
        task = bar.add_task(what, total=None, rate="-")

        def show(done: int, total: int) -> None:
            speed = bar.tasks[0].speed
            rate = f"{speed:.1f}" if speed else "-"
            bar.update(task, completed=done, total=total, rate=rate)

        yield show


def photo_text(uri: str) -> Text:
    """Return `photo_name(uri)` as a link that the terminal can open."""
    return Text(photo_name(uri), style=f"link {uri}")


def photo_name(uri: str) -> str:
    """Return the path of a local photo, relative if it is below the current folder, or the URI.

    Control characters and invalid bytes are escaped, so that a file name can neither break a line
    nor send commands to the terminal.
    """
    from reir.images.decode import path_of_uri

    if not uri.startswith("file:///"):
        return printable(uri)
    path = path_of_uri(uri)
    here = Path.cwd()
    return printable(os.fspath(path.relative_to(here) if path.is_relative_to(here) else path))


def plural(number: int, noun: str) -> str:
    """Return "1 photo", or "1,200 photos"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def printable(text: str) -> str:
    """Return text with every unprintable character escaped."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def printable_lines(text: str) -> str:
    """Return text with every unprintable character but line breaks escaped, for messages."""
    return "\n".join(map(printable, text.split("\n")))

"""`reir search`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from reir.cli_common import (
    DEFAULT_GALLERY,
    AsJson,
    Checkpoint,
    Encoder,
    Store,
    chosen_encoder,
    messages,
    new_table,
    output,
    photo_text,
    print_json,
)
from reir.errors import ConfigError

if TYPE_CHECKING:
    from reir.records import SearchResult

EXAMPLES = """[bold]Examples[/bold]

reir search "the red mug left of the laptop" --gallery photos

reir search "a dog" -k 20 --per-image 3 --draw dogs.png

reir search "the largest boat" --where "area > 0.1" --json"""

MAX_COUNT = 1000


def register(app: typer.Typer) -> None:
    """Add the subcommand to the command line."""
    app.command("search", epilog=EXAMPLES)(search)


def search(  # noqa: PLR0913, every argument is an option of the command
    expression: Annotated[
        str, typer.Argument(metavar="EXPRESSION", help="Describes one object, in quotes.")
    ],
    gallery: Annotated[str, typer.Option(help="Gallery to search.")] = DEFAULT_GALLERY,
    k: Annotated[int, typer.Option("-k", min=1, max=MAX_COUNT, help="Most hits.")] = 10,
    per_image: Annotated[
        int, typer.Option(min=1, max=MAX_COUNT, help="Most hits of one photo.")
    ] = 1,
    where: Annotated[
        str | None,
        typer.Option(help="Filter: 'area > 0.05 and attr.camera == \"X100\"'.", metavar="FILTER"),
    ] = None,
    draw: Annotated[
        Path | None, typer.Option(help="Write the hits as a picture.", metavar="PICTURE")
    ] = None,
    as_json: AsJson = False,
    store: Store = None,
    checkpoint: Checkpoint = None,
    encoder: Encoder = None,
    server: Annotated[
        str | None,
        typer.Option(
            envvar="REIR_SERVER",
            metavar="URL",
            help="Ask a server that `reir serve` runs; its key is taken from $REIR_API_KEY.",
        ),
    ] = None,
) -> None:
    """Find the object that a sentence describes.

    Prints photo, score and box, best first; boxes are in percent, from the upper left corner.
    """
    check_request(expression, where, draw)  # before the model, which takes seconds to load
    if server is not None:
        from reir.client import Client

        with Client(server) as client:
            result = client.search(expression, gallery, k=k, per_image=per_image, where=where)
    else:
        named = chosen_encoder(checkpoint, encoder)
        from reir.search import open_gallery

        with messages().status("loading the model"):
            opened = open_gallery(gallery, store=store, encoder=named)
        with opened:
            result = opened.search(expression, k, per_image, where)
    if draw is not None:
        result.save_drawing(draw)
    if as_json:
        print_json(result.to_dict())
        return
    output().print(as_table(result))
    if draw is not None:
        output().print(Text(f"picture: {draw}"))


def check_request(expression: str, where: str | None, draw: Path | None) -> None:
    """Refuse what cannot be answered.

    Raises:
        QueryError: the expression or the filter is wrong.
        ConfigError: the picture cannot be written.
    """
    from reir.store.filters import parse
    from reir.text import validate_expression

    validate_expression(expression)
    if where is not None:
        parse(where)
    if draw is not None:
        _check_picture(draw)


def _check_picture(path: Path) -> None:
    from PIL import Image

    known = {end for end, form in Image.registered_extensions().items() if form in Image.SAVE}
    if path.suffix.lower() not in known:
        raise ConfigError(
            f"--draw {path}: cannot write {path.suffix or 'a file without ending'}; "
            f"use .png, .jpg or .webp"
        )
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--draw {path}: folder {path.parent} does not exist; make it first")


def as_table(result: SearchResult) -> RenderableType:
    """Return the answer for a terminal: a line a hit, then what was searched and how fast."""
    table = new_table("#", "score", "photo", "x %", "y %", "area", right=("#", "score", "area"))
    for rank, hit in enumerate(result.hits, 1):
        x1, y1, x2, y2 = (round(100 * side) for side in hit.box)
        table.add_row(
            str(rank),
            f"{hit.score:#.3g}",
            photo_text(hit.uri),
            f"{x1}-{x2}",
            f"{y1}-{y2}",
            f"{100 * hit.area:.1f} %",
        )
    return Group(table, "", _footer(result)) if result.hits else _footer(result)


def _footer(result: SearchResult) -> Text:
    num = len(result.hits)
    found = f"{num} hit{'' if num == 1 else 's'}" if num else "Nothing found"
    times = ", ".join(f"{stage} {ms:.0f}" for stage, ms in result.timings_ms.items())
    parts = [f"{found} in gallery {result.gallery}, version {result.version}", f"{times} ms"]
    if result.degraded:
        parts.append("without " + ", ".join(result.degraded))
    return Text("; ".join(parts), style="dim")

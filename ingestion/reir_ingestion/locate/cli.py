"""`reir locate`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from reir.cli.common import (
    Checkpoint,
    Encoder,
    encoder_from_options,
    messages,
    output,
    photo_name,
    photo_text,
    plural,
    printable,
)

if TYPE_CHECKING:
    from reir_ingestion.locate.photos import LocatedPhoto

EXAMPLES = """[bold]Examples[/bold]

reir locate ~/Pictures/2026 "a dog on a sofa"

reir locate photos.csv "the red mug" --min-presence 0.8 --json > mugs.jsonl"""

MAX_DRAWN = 24
"""Maximum number of photos on the contact sheet: those with the highest presence."""

MinPresence = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Photos have the object from this probability on. Default: 0.5, from which on it is "
        "likely.",
        show_default=False,
    ),
]
Draw = Annotated[
    Path | None,
    typer.Option(
        help=f"Save a picture of the photos that have it, at most {MAX_DRAWN}.", metavar="PICTURE"
    ),
]


def register(app: typer.Typer) -> None:
    """Add the subcommand to the command line."""
    app.command("locate", epilog=EXAMPLES)(locate)


def locate(  # noqa: PLR0913 - every argument is an option of the command
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A folder, a list of photos, or another source of `reir index`."
        ),
    ],
    expression: Annotated[
        str, typer.Argument(metavar="EXPRESSION", help="Description of one object, in quotes.")
    ],
    min_presence: MinPresence = None,
    draw: Draw = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each photo as one line of JSON.")
    ] = False,
    checkpoint: Checkpoint = None,
    encoder: Encoder = None,
) -> None:
    """Find the photos of a folder that have an object, without an index.

    Every photo is read and encoded, so this takes as long as indexing; an index answers the next
    question at once. Prints presence, box and photo. Boxes are in percent of the photo's width and
    height, from the upper left corner. `reir localize` instead finds the object in one photo.
    """
    from reir.cli.search import check_picture
    from reir.encoders import SHIPPED_KIND
    from reir.errors import ConfigError
    from reir.index_report import format_counts
    from reir.query.photo_curve import DEFAULT_MIN_PRESENCE
    from reir.query.search import chosen_model
    from reir.text import validate_expression
    from reir_ingestion.locate.photos import locate_photos
    from reir_ingestion.sources import open_source
    from reir_ingestion.sources.local import LocalSource

    validate_expression(expression)  # before the model is loaded, which takes seconds
    opened = open_source(source)
    check_picture(draw)
    with messages().status("loading the model"):
        model, extras = chosen_model(encoder_from_options(checkpoint, encoder) or SHIPPED_KIND)
    if min_presence is not None and extras.calibration is None:
        raise ConfigError(
            f"--min-presence {min_presence:g} needs a calibration, which this encoder does not "
            f"have; create one with `reir calibrate`, or leave it out"
        )
    localizer = extras.localizer(model)
    tally = Tally()
    threshold = DEFAULT_MIN_PRESENCE if min_presence is None else min_presence
    for photo in tally.counted(locate_photos(opened, localizer, expression, threshold)):
        if as_json:
            typer.echo(json.dumps(photo.to_dict()))
        elif photo.error:
            told = printable(f"{photo_name(photo.uri)}: {photo.error}")
            messages().print(Text(told, style="yellow"), soft_wrap=True)
        elif photo.present:
            output().print(as_line(photo), soft_wrap=True)
    if draw is not None:
        save_drawing(draw, expression, tally)
    # With --json, standard output has lines of photos only.
    console = messages() if as_json else output()
    console.print(Text(tally.summary(), style="dim"))
    if isinstance(opened, LocalSource) and opened.skipped:
        console.print(Text(f"not read: {format_counts(opened.skipped)}", style="dim"))
    if draw is not None:
        console.print(Text(f"picture: {printable(str(draw))}"))


class Tally:
    """Counts photos, and keeps those with the highest presence.

    Attributes:
        num_photos: number of photos that were read.
        num_found: number of those that have the object.
        num_failed: number of photos that could not be read.
        best: the photos with the highest presence, best first.
    """

    def __init__(self) -> None:
        self.num_photos = self.num_found = self.num_failed = 0
        self.best: list[LocatedPhoto] = []

    def counted(self, photos: Iterator[LocatedPhoto]) -> Iterator[LocatedPhoto]:
        """Pass photos on, and count them; shows the number of photos on standard error."""
        with messages().status("reading photos") as status:
            for photo in photos:
                self._count(photo)
                status.update(self.summary())
                yield photo

    def _count(self, photo: LocatedPhoto) -> None:
        self.num_photos += not photo.error
        self.num_failed += bool(photo.error)
        self.num_found += photo.present
        if photo.present:
            # Cut after each photo, so that a folder of any size needs the same memory.
            ranked = sorted([*self.best, photo], key=_presence, reverse=True)
            self.best = ranked[:MAX_DRAWN]

    def summary(self) -> str:
        """Return the counts in words."""
        failed = (
            f"; {plural(self.num_failed, 'photo')} could not be read" if self.num_failed else ""
        )
        return f"{self.num_found:,} of {plural(self.num_photos, 'photo')} have it{failed}"


def as_line(photo: LocatedPhoto) -> Text:
    """Return a photo that has the object as a line: presence, box in percent, and name."""
    assert photo.box is not None, "a photo without an instance does not have the object"
    presence = "   -" if photo.presence is None else f"{100 * photo.presence:3.0f} %"
    x1, y1, x2, y2 = (round(100 * side) for side in photo.box)
    place = f"x {x1}-{x2} y {y1}-{y2}"
    return Text.assemble(f"{presence}  {place:<19} ", photo_text(photo.uri))


def save_drawing(path: Path, expression: str, tally: Tally) -> None:
    """Write a contact sheet of the best photos."""
    from reir.images.drawing import Sheet, Tile, contact_sheet
    from reir.results import file_name

    tiles = [
        Tile(file_name(each.uri), each.box, each.score or 0.0, None, each.read)
        for each in tally.best
        if each.box is not None and each.read is not None
    ]
    sheet = Sheet(expression, [tally.summary()], tiles, "in these photos")
    contact_sheet(sheet).save(path)


def _presence(photo: LocatedPhoto) -> float:
    return photo.presence if photo.presence is not None else photo.score or 0.0

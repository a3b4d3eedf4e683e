"""`reir localize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from reir.cli.common import (
    AsJson,
    Checkpoint,
    encoder_from_options,
    messages,
    new_table,
    output,
    plural,
    print_json,
)
from reir.cli.search import check_picture
from reir.errors import ConfigError

if TYPE_CHECKING:
    from reir.query.photo_query import Locator
    from reir.results import Localization

EXAMPLES = """[bold]Examples[/bold]

reir localize kitchen.jpg "the red mug left of the laptop" --draw found.png

reir localize street.jpg "the round sign" -k 1 --localizer piza:runs/piza/adapters --json"""

MAX_BOXES = 100

Count = Annotated[int, typer.Option("-k", min=1, max=MAX_BOXES, help="Maximum number of boxes.")]
LocalizerSpec = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="Find it with this model, which reads sentence and pixels together: "
        "grounding-dino:NAME_OR_DIR or piza:DIR. Default: the encoder.",
    ),
]
Encoder = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="Encoder to use, in the form of `reir index --encoder`. Default: the shipped "
        "checkpoint.",
    ),
]
Draw = Annotated[
    Path | None, typer.Option(help="Save the photo with the boxes drawn.", metavar="PICTURE")
]


def register(app: typer.Typer) -> None:
    """Add the subcommand to the command line."""
    app.command("localize", epilog=EXAMPLES)(localize)


def localize(  # noqa: PLR0913, every argument is an option of the command
    photo: Annotated[Path, typer.Argument(metavar="PHOTO", help="An image file.")],
    expression: Annotated[
        str, typer.Argument(metavar="EXPRESSION", help="Description of one object, in quotes.")
    ],
    k: Count = 5,
    localizer: LocalizerSpec = None,
    draw: Draw = None,
    as_json: AsJson = False,
    checkpoint: Checkpoint = None,
    encoder: Encoder = None,
) -> None:
    """Find where in one photo the object is that a sentence describes.

    Prints the best boxes, best first, in percent of the photo's width and height from the upper
    left corner. `reir locate` instead finds the photos of a folder that have the object.
    """
    from reir.images.decode import read_bytes
    from reir.query.photo_query import locate
    from reir.text import validate_expression

    validate_expression(expression)  # before the model is loaded, which takes seconds
    data = read_bytes(photo)
    check_picture(draw)
    spec = encoder_from_options(checkpoint, encoder)
    if localizer is not None and spec is not None:
        raise ConfigError(
            f"--localizer {localizer} and encoder {spec} are two models; leave one of them out"
        )
    with messages().status("loading the model"):
        locator = load_locator(localizer, spec)
    found = locate(locator, data, expression, k, masks=False)
    if as_json:
        print_json(found.to_dict())
    else:
        output().print(as_table(found))
    # After the answer, which is worth printing even if the picture cannot be saved.
    if draw is not None:
        save_drawing(draw, data, found)
        if not as_json:
            output().print(Text(f"picture: {draw}"))


def load_locator(localizer: str | None, encoder: str | None) -> Locator:
    """Return what answers for a photo: a localizer, or an encoder with its calibration.

    Args:
        localizer: spec of a localizer; None for the encoder.
        encoder: spec of an encoder; None for the shipped checkpoint.

    Raises:
        ConfigError: the spec cannot be parsed, or a package that it needs is missing.
        CheckpointError: the model does not load.
    """
    from reir.encoders import SHIPPED_KIND
    from reir.models.localizers import load_localizer_spec
    from reir.query.photo_query import BoxLocator
    from reir.query.search import chosen_model

    if localizer is not None:
        return BoxLocator(load_localizer_spec(localizer))
    model, extras = chosen_model(encoder or SHIPPED_KIND)
    return extras.localizer(model)


def as_table(found: Localization) -> RenderableType:
    """Return the boxes for a terminal, below a line that says whether the object is there."""
    calibrated = found.presence is not None
    columns = ["#", "score", *(["object in box"] if calibrated else []), "x %", "y %"]
    table = new_table(*columns, right=("#", "score"))
    for number, each in enumerate(found.boxes, 1):
        x1, y1, x2, y2 = (round(100 * side) for side in each.box)
        likelihood = [each.likelihood or "-"] if calibrated else []
        place = (f"{x1}-{x2}", f"{y1}-{y2}")
        table.add_row(str(number), f"{each.score:#.3g}", *likelihood, *place)
    if not found.boxes:
        return Text("Nothing found in this photo", style="bold")
    missing = Text("" if found.present else "Probably not in this photo\n", style="bold")
    times = ", ".join(f"{stage} {ms:.0f}" for stage, ms in found.timings_ms.items())
    footer = f"\n{plural(len(found.boxes), 'instance')}; {times} ms"
    return Group(*([missing] if missing else []), table, Text(footer, style="dim"))


def save_drawing(path: Path, data: bytes, found: Localization) -> None:
    """Write the photo with the boxes and their numbers drawn on it.

    Raises:
        ReirError: the format cannot hold a picture of this size.
    """
    from PIL import Image

    from reir.images.decode import decode
    from reir.images.drawing import draw_boxes, save_picture

    labels = [f"{number}  {each.score:#.3g}" for number, each in enumerate(found.boxes, 1)]
    photo = Image.fromarray(decode(data).pixels)
    save_picture(draw_boxes(photo, [each.box for each in found.boxes], labels), path)

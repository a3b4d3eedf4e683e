"""`reir label`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reir.cli.common import AsJson

if TYPE_CHECKING:
    from reir_training.pseudo_labels.labels import PseudoLabels

EXAMPLES = """[bold]Examples[/bold]

reir label pairs.csv labels.json --localizer weak:runs/a --images photos

reir label pairs.csv labels.json --localizer weak:runs/a --second weak:runs/b --images photos"""

LocalizerSpec = Annotated[
    str,
    typer.Option(
        metavar="SPEC", help="Finds the boxes: weak:DIR, grounding-dino:NAME_OR_DIR or piza:DIR."
    ),
]
Second = Annotated[
    str | None,
    typer.Option(metavar="SPEC", help="Keep only boxes that this second localizer finds, too."),
]


def register(app: typer.Typer) -> None:
    """Add `reir label` to the command line."""
    app.command("label", epilog=EXAMPLES)(label)


def label(  # noqa: PLR0913 - every argument is an option of the command
    sentences: Annotated[
        Path,
        typer.Argument(
            metavar="SENTENCES",
            help="CSV or JSON lines with the columns photo and sentence, and where people drew "
            "boxes x1, y1, x2 and y2 in pixels.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="REIRCOCO JSON file to write.", dir_okay=False, writable=True
        ),
    ],
    localizer: LocalizerSpec,
    images: Annotated[Path, typer.Option(help="Folder of the photos.")],
    second: Second = None,
    min_iou: Annotated[
        float, typer.Option(min=0, max=1, help="Two boxes agree from this IoU on.")
    ] = 0.5,
    as_json: AsJson = False,
) -> None:
    """Find a box for every sentence about a photo, and keep those that two looks agree on.

    The second look is at the mirrored photo, with left and right swapped in the sentence. Boxes
    that people drew are kept as they are. `reir train` reads the file as format reircoco; found
    boxes have a `score`.
    """
    # Imported here, so that `reir --help` does not wait for torch.
    from reir.cli.common import messages, photo_progress, print_json
    from reir.datasets import read_photo_sentences, write_reircoco
    from reir.models.localizers import load_localizer_spec
    from reir_training.pseudo_labels.agreement import AgreementFilter
    from reir_training.pseudo_labels.labels import label_sentences

    dataset = read_photo_sentences(sentences, images)
    # Tried first: to find the boxes may take hours, which a failure to write them would waste.
    _check_writable(out)
    with messages().status("loading the model"):
        finder = load_localizer_spec(localizer)
        other = load_localizer_spec(second) if second else None
    with photo_progress() as progress:
        labels = label_sentences(dataset, images, AgreementFilter(finder, other, min_iou), progress)
    write_reircoco(labels.dataset, out)
    if as_json:
        print_json({"file": str(out), **labels.to_dict()})
    else:
        _show(labels, out)


def _check_writable(file: Path) -> None:
    """Check that a file can be written, and leave it as it is.

    Raises:
        OSError: it cannot.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    is_new = not file.exists()
    # The file itself, because it may be writable in a folder that is not, such as /dev/stdout.
    with file.open("a"):
        pass
    if is_new:
        file.resolve().unlink()  # a link to nowhere stays


def _show(labels: PseudoLabels, out: Path) -> None:
    from reir.cli.common import new_table, output, plural

    table = new_table("sentences", "", right=("",))
    table.add_row("all", f"{labels.num_sentences:,}")
    table.add_row("kept", f"{labels.num_kept:,}", style="bold")
    table.add_row("kept, with a box that was drawn", f"{labels.num_drawn:,}")
    for reason, count in labels.refused.items():
        table.add_row(f"refused: {reason}", f"{count:,}")
    output().print(table)
    output().print(f"\n{plural(labels.num_kept, 'sentence')} with a box in {out}", soft_wrap=True)

"""`reir finetune`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from reir.cli.common import AsJson, Gallery, Store
from reir.cli.feedback import Folder
from reir.errors import ConfigError

if TYPE_CHECKING:
    from reir_training.finetune.remembered import RememberedSet

EXAMPLES = """[bold]Examples[/bold]

reir finetune photos --sentences pairs.csv

reir finetune photos --from feedback

reir finetune photos --sentences pairs.csv --held-out 0.3 --output runs/second --json"""

Sentences = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="CSV or JSON lines with the columns photo (file name, path or URI of a photo of the "
        "gallery) and sentence, and where people drew boxes x1, y1, x2 and y2 in pixels.",
        show_default=False,
    ),
]
Source = Annotated[
    Literal["feedback"] | None,
    typer.Option(
        "--from",
        help="Instead of --sentences: learn from what users said about searches, as far as "
        "reliable users agree.",
        show_default=False,
    ),
]
MaxUserShare = Annotated[
    float | None,
    typer.Option(
        min=0.01,
        max=1,
        help="With --from feedback: largest share of the answers of one user. With few users, an "
        "equal share is allowed; 20 answers always are. Default: 0.25.",
        show_default=False,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        help="Folder for all results. A run with the same folder continues there. Default: "
        "runs/finetune/GALLERY.",
        show_default=False,
    ),
]
Remember = Annotated[
    Path | None,
    typer.Option(
        metavar="ANNOTATIONS",
        help="Measure what is forgotten on these annotated photos, in a format of `reir eval "
        "reir`. Default: the built-in gallery.",
        show_default=False,
    ),
]
RememberImages = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Folder of the photos of --remember.")
]


Epochs = Annotated[int, typer.Option(min=1, help="Epochs of the training of clare-nano.")]
HeldOut = Annotated[
    float, typer.Option(min=0.01, max=0.9, help="Share of the photos to measure the result on.")
]
MaxShare = Annotated[
    float,
    typer.Option(
        min=0.01,
        max=1,
        help="Largest share of the new weights in the result: with more, the model learns more and "
        "forgets more of what it knew.",
    ),
]
SkipUnknown = Annotated[
    bool,
    typer.Option(
        "--skip-unknown",
        help="With --sentences: leave out rows whose photo is not in the gallery; without this "
        "option, they are an error.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add `reir finetune` to the command line."""
    app.command("finetune", epilog=EXAMPLES)(finetune)


def finetune(  # noqa: PLR0913 - every argument is an option of the command
    gallery: Gallery,
    sentences: Sentences = None,
    source: Source = None,
    search_log: Folder = None,
    max_user_share: MaxUserShare = None,
    output: Output = None,
    # These are the defaults of `FinetuneOptions`, whose module would load torch.
    epochs: Epochs = 8,
    held_out: HeldOut = 0.2,
    max_share: MaxShare = 0.5,
    skip_unknown: SkipUnknown = False,
    remember: Remember = None,
    remember_images: RememberImages = None,
    as_json: AsJson = False,
    store: Store = None,
) -> None:
    """Train the model of a gallery on sentences about its photos; nobody has to draw boxes.

    The sentences are those of a file, or those that users gave feedback about. Finds the boxes
    that nobody drew, trains, and measures on photos that it did not train on whether that
    helped. The gallery is not changed: the last line is the command that checks the new checkpoint
    and makes it live.
    """
    # Imported here, so that `reir --help` does not wait for torch.
    from reir.cli.common import connect, messages, photo_progress, print_json
    from reir.cli.common import output as console
    from reir.operations.search_log import default_folder
    from reir.query.search import check_gallery
    from reir_training.finetune.feedback_pairs import feedback_pairs
    from reir_training.finetune.pairs import read_pairs
    from reir_training.finetune.run import Finetune, FinetuneOptions
    from reir_training.finetune.start import start_model_of
    from reir_training.finetune.trust import MAX_SHARE

    if (sentences is None) == (source is None):
        given = "none of them" if sentences is None else "both"
        raise ConfigError(f"give one of --sentences and --from, got {given}")
    if sentences is not None:
        _refuse({"--search-log": search_log, "--max-user-share": max_user_share}, "--from feedback")
    else:
        # A flag that is not given is False, which `_refuse` would take for a value.
        _refuse({"--skip-unknown": skip_unknown or None}, "--sentences")
    remembered = _remembered(remember, remember_images)
    # The store is closed before the training, which takes long and does not need it.
    with connect(store) as opened:
        check_gallery(opened, gallery)
        start = start_model_of(opened, gallery)
        if sentences is not None:
            pairs = read_pairs(opened, gallery, sentences, skip_unknown=skip_unknown)
        else:
            folder = search_log or default_folder()
            share = max_user_share or MAX_SHARE
            pairs = feedback_pairs(opened, gallery, folder, max_user_share=share)
    for line in pairs.skipped:
        messages().print(f"left out, {line}", markup=False, soft_wrap=True)
    report = Finetune(
        gallery=gallery,
        start=start,
        pairs=pairs,
        output=output or Path("runs") / "finetune" / gallery,
        options=FinetuneOptions(epochs=epochs, held_out=held_out, max_share=max_share),
        remembered=remembered,
        show=photo_progress,
        store=store,
    ).run()
    if as_json:
        print_json(report.to_dict())
    else:
        console().print(report.table(), soft_wrap=True)


def _refuse(options: Mapping[str, object], belongs_to: str) -> None:
    """Refuse options that would have no effect.

    Raises:
        ConfigError: one of them is given.
    """
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"{name} has an effect only with {belongs_to}; leave it out")


def _remembered(annotations: Path | None, images: Path | None) -> RememberedSet:
    """Return where it is measured what is forgotten.

    Raises:
        ConfigError: only one of the two options is given.
    """
    from reir_training.finetune.remembered import built_in_set, read_remembered_set

    if annotations is None and images is None:
        return built_in_set()
    if annotations is None or images is None:
        raise ConfigError("--remember and --remember-images belong together; give both or none")
    return read_remembered_set(annotations, images)

"""`reir calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reir.cli.common import AsJson
from reir.cli.evaluate import Annotations, Images, Limit, Split, SplitBy, Threads, Work


def register(app: typer.Typer) -> None:
    """Add `reir calibrate` to the command line."""
    app.command("calibrate")(calibrate)


def calibrate(  # noqa: PLR0913 - every argument is an option of the command
    annotations: Annotations,
    images: Images,
    checkpoint: Annotated[
        Path, typer.Option(help="Checkpoint directory. calibration.json is written into it.")
    ],
    split_by: SplitBy = None,
    split: Split = None,
    kind: Annotated[
        str | None, typer.Option(help="Use only expressions of this kind, such as long.")
    ] = None,
    work: Work = None,
    threads: Threads = 1,
    limit: Limit = None,
    as_json: AsJson = False,
) -> None:
    """Calibrate a checkpoint: fit the probability that a described object is in the photos.

    Searches report it as `presence`. Use photos that the checkpoint was not trained on, with
    expressions that each describe exactly one object in all of the photos. Expressions of the kind
    "short" may describe one object of their photo only; then all objects need a class.
    """
    # Imported here, so that `reir --help` does not wait for torch.
    from reir.cli.common import output, print_json
    from reir.cli.evaluate import one_split
    from reir.cli.evaluated_model import EncodingOptions
    from reir.datasets import read_annotations
    from reir.query.presence import FILE, calibration_values
    from reir_training.report.calibrate import calibrate_checkpoint

    where = EncodingOptions(checkpoint, None, work, None, False, threads)
    dataset = one_split(read_annotations(annotations, split_by), split).first_images(limit)
    described = dataset.with_targets()
    described = described if kind is None else described.of_kind(kind)
    about = {"annotations": annotations.name, "split": split or "", "kind": kind or ""}
    with where.encoding() as (encoder, how):
        calibration = calibrate_checkpoint(
            checkpoint, encoder, dataset, images, described.expressions, about=about, how=how
        )
    if as_json:
        print_json(calibration_values(calibration))
        return
    console = output()
    for name in ("gallery", "hit", "photo", "box"):
        figures = calibration.about[name]
        console.print(
            f"{name:8} AUROC {figures['auroc']:.3f}  ECE {figures['ece']:.3f}  "
            f"FPR at 90 % TPR {figures['fpr90']:.3f}"
        )
    console.print(
        f"objects count as found at a presence of {calibration.threshold:.2f} or more; wrote "
        f"{checkpoint / FILE}"
    )

"""`reir calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reir.cli_common import AsJson
from reir.eval_cli import Annotations, Images, Limit, Split, SplitBy, Threads, Work


def register(app: typer.Typer) -> None:
    """Add the subcommand to the command line."""
    app.command("calibrate")(calibrate)


def calibrate(  # noqa: PLR0913, every argument is an option of the command
    annotations: Annotations,
    images: Images,
    checkpoint: Annotated[
        Path, typer.Option(help="Directory of the checkpoint; gets a calibration.json.")
    ],
    split_by: SplitBy = None,
    split: Split = None,
    kind: Annotated[
        str | None, typer.Option(help="Only expressions of this kind, where they have one.")
    ] = None,
    work: Work = None,
    threads: Threads = 1,
    limit: Limit = None,
    as_json: AsJson = False,
) -> None:
    """Fit what the scores of a checkpoint mean: is the described object there at all?

    Needs photos that it was not trained on, with expressions that fit one object among them all.
    """
    from dataclasses import asdict

    from reir.cli_common import output, print_json
    from reir.datasets import read_annotations
    from reir.eval_cli import Where, one_split
    from reir.evaluate import encode_gallery
    from reir.evaluate.gallery import queries_of
    from reir.presence import save_calibration
    from reir_training.calibration import fit_calibration

    where = Where(checkpoint, None, work, None, False, threads)
    dataset = one_split(read_annotations(annotations, split_by), split).first_images(limit)
    asked = dataset.with_targets()
    asked = asked if kind is None else asked.of_kind(kind)
    with where.encoding() as (encoder, how):
        queries = queries_of(encoder, dataset, asked.expressions)
        gallery = encode_gallery(encoder, dataset, images, how=how).arrays
    about = {"annotations": annotations.name, "split": split or "", "kind": kind or ""}
    calibration = fit_calibration(gallery, queries, encoder.digest, about)
    path = save_calibration(checkpoint, calibration)
    if as_json:
        print_json(asdict(calibration))
        return
    console = output()
    for name in ("gallery", "hit", "photo", "box"):
        said = calibration.about[name]
        console.print(
            f"{name:8} AUROC {said['auroc']:.3f}  ECE {said['ece']:.3f}  "
            f"FPR at 90 % TPR {said['fpr90']:.3f}"
        )
    console.print(f"found from a presence of {calibration.threshold:.2f} on; written: {path}")

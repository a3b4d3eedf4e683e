"""`reir eval`: a subcommand for each of the five published tasks, and one for probes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from reir.cli.common import AsJson, Checkpoint, output, print_json
from reir.cli.evaluated_model import EncodingOptions
from reir.errors import ConfigError, DataError
from reir.images.large_photos import LargePhotos

if TYPE_CHECKING:
    from reir.datasets import ReferringDataset
    from reir.evaluate import (
        ProbeReport,
        RecReport,
        ReirReport,
        ResedisReport,
        SorecReport,
        TirReport,
    )

# Not imported from `reir.evaluate.rec`, which imports torch and would make every command slow.
TRAIN = "train"

Images = Annotated[Path, typer.Option(help="Folder of the photos; file names are relative to it.")]
Annotations = Annotated[
    Path,
    typer.Option(
        help="REIRCOCO JSON file, RefCOCO/+/g JSON file, or folder with refs(...).p or "
        "expressions.json."
    ),
]
SplitBy = Annotated[
    Literal["unc", "umd", "google"] | None,
    typer.Option(help="Which refs(...).p to read, if the folder has several."),
]
Split = Annotated[
    str | None, typer.Option(help="Split to evaluate; required if there are several besides train.")
]
Spec = Annotated[
    str | None,
    typer.Option(
        "--encoder",
        metavar="SPEC",
        help="Encoder to evaluate, in the form of `reir index --encoder`.",
    ),
]
Localizer = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="Evaluate a localizer, which reads photo and expression together, instead of an "
        "encoder: grounding-dino:NAME_OR_DIR.",
    ),
]
Work = Annotated[
    Path | None,
    typer.Option(
        help="Folder for finished photos. After an interruption, the next run continues from them.",
        file_okay=False,
    ),
]
NumWorkers = Annotated[
    int | None,
    typer.Option(
        min=1, help="Number of Ray workers that encode the photos. Default: this process."
    ),
]
Gpu = Annotated[bool, typer.Option("--gpu", help="Give each Ray worker a GPU.")]
# All subcommands use 1 by default, so that figures do not depend on the machine.
Threads = Annotated[
    int,
    typer.Option(
        min=1, help="CPU threads per process; the number changes the last bits of the vectors."
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="Use only the first N photos of each split, for a quick check."),
]


def register(app: typer.Typer) -> None:
    """Add `eval` and its subcommands to the command line."""
    group = typer.Typer(no_args_is_help=True, help="Evaluate a checkpoint on annotated photos.")
    group.command("reir")(reir)
    group.command("rec")(rec)
    group.command("tir")(tir)
    group.command("resedis")(resedis)
    group.command("sorec")(sorec)
    group.command("probes")(probes)
    app.add_typer(group, name="eval")


def reir(  # noqa: PLR0913, every argument is an option of the command
    annotations: Annotations,
    images: Images,
    checkpoint: Checkpoint = None,
    encoder: Spec = None,
    split_by: SplitBy = None,
    split: Split = None,
    all_expressions: Annotated[
        bool,
        typer.Option(
            "--all-expressions",
            help="Use every expression of an instance instead of only the first.",
        ),
    ] = False,
    work: Work = None,
    num_workers: NumWorkers = None,
    gpu: Gpu = False,
    threads: Threads = 1,
    limit: Limit = None,
    as_json: AsJson = False,
) -> None:
    """Referring expression instance retrieval: find each expression's instance among all photos.

    Reports BR@K, image recall, and the precision of the best box in the right photo.
    """
    from reir.datasets import read_annotations
    from reir.evaluate import evaluate_reir

    options = EncodingOptions(checkpoint, encoder, work, num_workers, gpu, threads)
    dataset = one_split(read_annotations(annotations, split_by), split).first_images(limit)
    with options.encoding() as (model, how):
        report = evaluate_reir(model, dataset, images, all_expressions=all_expressions, how=how)
    show(report, as_json)


def rec(  # noqa: PLR0913, every argument is an option of the command
    annotations: Annotated[
        Path,
        typer.Option(
            help="As for `reir eval reir`; or a JSON file of SimREC; or a list of photos, "
            "sentences and boxes (.csv, .tsv or .jsonl)."
        ),
    ],
    images: Images,
    checkpoint: Checkpoint = None,
    encoder: Spec = None,
    localizer: Localizer = None,
    split_by: SplitBy = None,
    split: Annotated[
        list[str] | None,
        typer.Option(help="Split to evaluate; repeat for several. Default: all splits but train."),
    ] = None,
    work: Work = None,
    num_workers: NumWorkers = None,
    gpu: Gpu = False,
    threads: Threads = 1,
    limit: Limit = None,
    as_json: AsJson = False,
) -> None:
    """Referring expression comprehension: find each expression's box in its own photo.

    Reports P@.5, P@.7, P@.9 and mean IoU of each split.
    """
    from reir.datasets import read_annotations
    from reir.evaluate import evaluate_rec, evaluate_rec_localizer

    options = EncodingOptions(checkpoint, encoder, work, num_workers, gpu, threads)
    dataset = read_annotations(annotations, split_by, images_dir=images)
    if localizer is None:
        with options.encoding() as (model, how):
            report = evaluate_rec(
                model, dataset, images, splits=split or (), max_photos=limit, how=how
            )
    else:
        with options.localizing(localizer) as (finder, how):
            report = evaluate_rec_localizer(
                finder, dataset, images, splits=split or (), max_photos=limit, how=how
            )
    show(report, as_json)


def tir(  # noqa: PLR0913, every argument is an option of the command
    images: Images,
    captions: Annotated[
        Path | None, typer.Option(help="Captions, as a COCO JSON file.", dir_okay=False)
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(
            help="Annotations, as for `reir eval reir`: photos and, without --captions, texts."
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    encoder: Spec = None,
    split_by: SplitBy = None,
    split: Split = None,
    work: Work = None,
    num_workers: NumWorkers = None,
    gpu: Gpu = False,
    threads: Threads = 1,
    limit: Limit = None,
    as_json: AsJson = False,
) -> None:
    """Text-to-image retrieval: find each text's photo among all photos.

    Reports R@1, R@5 and R@10, ranked by the best instance and by the vector of the whole photo.
    """
    from reir.datasets import read_annotations, read_coco_captions, read_coco_images
    from reir.evaluate import evaluate_tir, texts_of

    options = EncodingOptions(checkpoint, encoder, work, num_workers, gpu, threads)
    if annotations is not None:
        dataset = one_split(read_annotations(annotations, split_by), split)
    elif captions is not None:
        dataset = read_coco_images(captions)
    else:
        raise ConfigError("there are no texts to evaluate; give --captions, --annotations or both")
    dataset = dataset.first_images(limit)
    all_texts = texts_of(dataset) if captions is None else read_coco_captions(captions)
    # A file of captions may also cover photos that --split or --limit leaves out.
    texts = [text for text in all_texts if text.image_id in dataset.images_by_id]
    with options.encoding() as (model, how):
        report = evaluate_tir(model, dataset, texts, images, how=how)
    show(report, as_json)


def resedis(  # noqa: PLR0913, every argument is an option of the command
    annotations: Annotated[
        Path,
        typer.Option(
            help="Folder with one JSON file for each expression (ReSeDis) or with grefs(unc).json "
            "(gRefCOCO); or annotations as for `reir eval reir`."
        ),
    ],
    images: Images,
    checkpoint: Checkpoint = None,
    encoder: Spec = None,
    split_by: SplitBy = None,
    split: Split = None,
    oracle: Annotated[
        bool,
        typer.Option(
            "--oracle",
            help="Use the true boxes as candidates, as an upper limit; for siglip-crops and "
            "siglip-relations.",
        ),
    ] = False,
    work: Work = None,
    num_workers: NumWorkers = None,
    gpu: Gpu = False,
    threads: Threads = 1,
    limit: Limit = None,
    as_json: AsJson = False,
) -> None:
    """ReSeDis: which photos of a gallery have the described instance, and where exactly?

    Reports image recall, the joint score of photo and box or mask, AP over all photos, and the
    decisions for all photos with their false alarms.
    """
    from reir.datasets import read_annotations
    from reir.evaluate import evaluate_resedis

    options = EncodingOptions(checkpoint, encoder, work, num_workers, gpu, threads)
    read = read_annotations(annotations, split_by, images_dir=images, masks=True)
    dataset = one_split(read, split).first_images(limit)
    with options.encoding() as (model, how):
        report = evaluate_resedis(
            model,
            dataset,
            images,
            calibration=options.calibration(model),
            how=replace(how, oracle=oracle),
        )
    show(report, as_json)


def sorec(  # noqa: PLR0913, every argument is an option of the command
    annotations: Annotated[
        Path,
        typer.Option(help="JSON file of one split of SOREC, such as testA.json.", dir_okay=False),
    ],
    images: Annotated[Path, typer.Option(help="Folder of the photos of SODA-D.")],
    checkpoint: Checkpoint = None,
    encoder: Spec = None,
    localizer: Localizer = None,
    large_photos: Annotated[
        LargePhotos, typer.Option(help="How to encode large photos, as for `reir index`.")
    ] = LargePhotos.WHOLE,
    skip_missing: Annotated[
        bool,
        typer.Option(
            "--skip-missing",
            help="Leave out expressions whose photo is not in the folder; without this, a missing "
            "photo is an error.",
        ),
    ] = False,
    work: Work = None,
    num_workers: NumWorkers = None,
    gpu: Gpu = False,
    threads: Threads = 1,
    limit: Limit = None,
    as_json: AsJson = False,
) -> None:
    """SOREC: find the described small instance in its own large photo.

    Reports mAcc, Acc50 and Acc75 of the best instance, and the accuracy of the first 1, 5 and 10
    instances at IoU .05 to .95.
    """
    from reir.datasets import read_sorec
    from reir.evaluate import evaluate_sorec, evaluate_sorec_localizer

    options = EncodingOptions(checkpoint, encoder, work, num_workers, gpu, threads, large_photos)
    dataset = read_sorec(annotations, images, skip_missing=skip_missing).first_images(limit)
    if localizer is None:
        with options.encoding() as (model, how):
            report = evaluate_sorec(model, dataset, images, how=how)
    else:
        with options.localizing(localizer) as (finder, how):
            report = evaluate_sorec_localizer(finder, dataset, images, how=how)
    show(report, as_json)


def probes(  # noqa: PLR0913, every argument is an option of the command
    annotations: Annotations,
    images: Images,
    checkpoint: Checkpoint = None,
    encoder: Spec = None,
    split_by: SplitBy = None,
    split: Split = None,
    work: Work = None,
    num_workers: NumWorkers = None,
    gpu: Gpu = False,
    threads: Threads = 1,
    limit: Limit = None,
    as_json: AsJson = False,
) -> None:
    """Probes of understanding: is a sentence preferred to the same one with a wrong word?

    Reports the share of sentences by what was changed: color, side, size, number, relation, action,
    or the class of the object. 50% is chance.
    """
    from reir.datasets import read_annotations
    from reir.evaluate import evaluate_probes

    options = EncodingOptions(checkpoint, encoder, work, num_workers, gpu, threads)
    dataset = one_split(read_annotations(annotations, split_by), split).first_images(limit)
    with options.encoding() as (model, how):
        report = evaluate_probes(model, dataset, images, how=how)
    show(report, as_json)


def one_split(dataset: ReferringDataset, name: str | None) -> ReferringDataset:
    """Return the named split; without a name, the only split besides "train", or the whole dataset.

    Raises:
        DataError: there is no such split, or no name is given and there are several.
    """
    if name is not None:
        return dataset.split(name)
    names = [each for each in dataset.splits if each != TRAIN]
    if len(names) > 1:
        raise DataError(f"{dataset.source} has splits {', '.join(names)}; choose one with --split")
    return dataset.split(names[0]) if names else dataset


def show(
    report: ReirReport | RecReport | TirReport | ResedisReport | SorecReport | ProbeReport,
    as_json: bool,
) -> None:
    """Print a report as tables or as JSON."""
    if as_json:
        print_json(report.to_dict())
    else:
        output().print(report.table(), soft_wrap=False)

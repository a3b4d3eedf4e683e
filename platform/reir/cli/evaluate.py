"""`reir eval`: a subcommand for each of the five published tasks, and one for probes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from reir.cli.common import AsJson, Checkpoint, encoder_from_options, messages, output, print_json
from reir.errors import ConfigError, DataError
from reir.images.large_photos import LargePhotos

if TYPE_CHECKING:
    from reir.datasets import ReferringDataset
    from reir.evaluate import (
        Encoding,
        ProbeReport,
        Progress,
        RecReport,
        ReirReport,
        ResedisReport,
        Runner,
        SorecReport,
        TirReport,
    )
    from reir.models.interfaces import InstanceEncoder
    from reir.query.presence import Calibration

RUNNERS = "reir.runners"
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
Work = Annotated[
    Path | None,
    typer.Option(
        help="Folder for encoded photos. After an interruption, the next run continues from them.",
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
    annotations: Annotations,
    images: Images,
    checkpoint: Checkpoint = None,
    encoder: Spec = None,
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
    from reir.evaluate import evaluate_rec

    options = EncodingOptions(checkpoint, encoder, work, num_workers, gpu, threads)
    dataset = read_annotations(annotations, split_by)
    with options.encoding() as (model, how):
        report = evaluate_rec(model, dataset, images, splits=split or (), max_photos=limit, how=how)
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
    from reir.evaluate import evaluate_sorec

    options = EncodingOptions(checkpoint, encoder, work, num_workers, gpu, threads, large_photos)
    dataset = read_sorec(annotations, images, skip_missing=skip_missing).first_images(limit)
    with options.encoding() as (model, how):
        report = evaluate_sorec(model, dataset, images, how=how)
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


@dataclass(frozen=True)
class EncodingOptions:
    """The options that all subcommands share: which encoder to use, and where and how it runs.

    Raises:
        ConfigError: --gpu without --num-workers.
    """

    checkpoint: Path | None
    encoder: str | None
    work: Path | None
    num_workers: int | None
    gpu: bool
    threads: int
    large_photos: LargePhotos = LargePhotos.WHOLE

    def __post_init__(self) -> None:
        """Reject an option that would have no effect, before anything is read."""
        if self.gpu and self.num_workers is None:
            raise ConfigError(
                "--gpu gives each Ray worker a GPU, so it needs --num-workers N; without it, a "
                "GPU is used whenever torch finds one"
            )

    @contextmanager
    def encoding(self) -> Iterator[tuple[InstanceEncoder, Encoding]]:
        """Load the encoder, and show progress while the caller encodes with it."""
        from reir.evaluate import Encoding

        spec = encoder_from_options(self.checkpoint, self.encoder) or ""
        # Before the model is loaded, so that a missing app is reported at once.
        runner = self._runner(spec)
        with messages().status("loading the model"):
            model = load_encoder(spec, self.large_photos)
        with self._explain_interrupt(), _progress_bar() as progress:
            yield (
                model,
                Encoding(runner=runner, work=self.work, threads=self.threads, progress=progress),
            )

    def calibration(self, model: InstanceEncoder) -> Calibration | None:
        """Return the calibration of the encoder; None if it has none."""
        from reir.encoders import checkpoint_folder
        from reir.query.presence import load_calibration

        folder = checkpoint_folder(encoder_from_options(self.checkpoint, self.encoder) or "")
        return load_calibration(folder, model.digest) if folder else None

    def _runner(self, spec: str) -> Runner | None:
        """Return the runner that encodes shards on Ray workers; None for this process."""
        if self.num_workers is None:
            return None
        # Found by its entry point, because the platform must not import its apps.
        installed = list(entry_points(group=RUNNERS, name="ray"))
        if not installed:
            raise ConfigError(
                f"--num-workers {self.num_workers} needs the ingestion app: "
                f"pip install 'reir-platform[ingestion]'"
            )
        runner: Runner = installed[0].load()(
            partial(load_encoder, spec, self.large_photos),
            num_workers=self.num_workers,
            use_gpu=self.gpu,
            threads=self.threads,
        )
        return runner

    @contextmanager
    def _explain_interrupt(self) -> Iterator[None]:
        """On Ctrl-C, print how to continue."""
        try:
            yield
        except KeyboardInterrupt:
            kept = f"Encoded photos are kept in {self.work}; run the same command to continue."
            lost = "Nothing is kept; with --work DIR, an interrupted run can be continued."
            messages().print(f"Stopped. {kept if self.work else lost}", markup=False)
            raise


def load_encoder(spec: str, large_photos: LargePhotos) -> InstanceEncoder:
    """Load the encoder of a spec, in this process or on a worker.

    Args:
        spec: as for `load_encoder_spec`.
        large_photos: how to encode large photos.

    Raises:
        ConfigError: the spec cannot be parsed, or the encoder cannot encode parts.
        CheckpointError: the model is missing, incomplete or of another kind.
    """
    from reir.encoders import load_encoder_spec
    from reir.images.large_photos import with_views

    return with_views(load_encoder_spec(spec), large_photos.views)


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


@contextmanager
def _progress_bar() -> Iterator[Progress]:
    """Show photos done, rate and remaining time on standard error."""
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[rate]} photos/s"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("photos", total=None, rate="-")

        def show(done: int, total: int) -> None:
            speed = bar.tasks[0].speed
            rate = f"{speed:.1f}" if speed else "-"
            bar.update(task, completed=done, total=total, rate=rate)

        yield show

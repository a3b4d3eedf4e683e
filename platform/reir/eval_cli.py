"""`reir eval ...`: one subcommand for each published task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from reir.cli_common import AsJson, Checkpoint, chosen_encoder, messages, output, print_json
from reir.errors import ConfigError, DataError

if TYPE_CHECKING:
    from reir.datasets import ReferringDataset
    from reir.evaluate import Encoding, Progress, RecReport, ReirReport, Runner, TirReport
    from reir.models.seams import InstanceEncoder

RUNNERS = "reir.runners"
TRAIN = "train"

Images = Annotated[Path, typer.Option(help="Folder that the file names start from.")]
Annotations = Annotated[
    Path,
    typer.Option(
        help="REIRCOCO json, RefCOCO/+/g json, or a folder with refs(...).p or expressions.json."
    ),
]
SplitBy = Annotated[
    Literal["unc", "umd", "google"] | None,
    typer.Option(help="Which refs(...).p, where the folder has several."),
]
Split = Annotated[str | None, typer.Option(help="Split to measure, where the set has several.")]
Spec = Annotated[
    str | None,
    typer.Option(
        "--encoder", metavar="SPEC", help="Model by name, as `reir index --encoder` takes it."
    ),
]
Work = Annotated[
    Path | None,
    typer.Option(
        help="Folder for finished shards: a killed run goes on from them.", file_okay=False
    ),
]
NumWorkers = Annotated[
    int | None, typer.Option(min=1, help="Encode the photos on so many Ray workers.")
]
Gpu = Annotated[bool, typer.Option("--gpu", help="One GPU a Ray worker.")]
Threads = Annotated[
    int, typer.Option(min=1, help="CPU threads a process; more change the last bits of vectors.")
]
Limit = Annotated[
    int | None,
    typer.Option(
        min=1, help="Only the first N photos (of each split): a quick try, no figure to publish."
    ),
]


def register(app: typer.Typer) -> None:
    """Add `eval` and its subcommands to the command line."""
    group = typer.Typer(no_args_is_help=True, help="Measure a checkpoint on annotated photos.")
    group.command("reir")(reir)
    group.command("rec")(rec)
    group.command("tir")(tir)
    app.add_typer(group, name="eval")


def reir(  # noqa: PLR0913, every argument is an option of the command
    annotations: Annotations,
    images: Images,
    checkpoint: Checkpoint = None,
    encoder: Spec = None,
    split_by: SplitBy = None,
    split: Split = None,
    all_expressions: Annotated[
        bool, typer.Option("--all-expressions", help="Every expression of an instance, not one.")
    ] = False,
    work: Work = None,
    num_workers: NumWorkers = None,
    gpu: Gpu = False,
    threads: Threads = 1,
    limit: Limit = None,
    as_json: AsJson = False,
) -> None:
    """Find each expression's instance among all photos: BR@K, image recall, REC precision."""
    from reir.datasets import read_annotations
    from reir.evaluate import evaluate_reir

    where = Where(checkpoint, encoder, work, num_workers, gpu, threads)
    dataset = one_split(read_annotations(annotations, split_by), split).first_images(limit)
    with where.encoding() as (model, how):
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
        typer.Option(help="Split to measure; may be repeated; without it, all but train."),
    ] = None,
    work: Work = None,
    num_workers: NumWorkers = None,
    gpu: Gpu = False,
    threads: Threads = 1,
    limit: Limit = None,
    as_json: AsJson = False,
) -> None:
    """Find each expression's box in its own photo: P@.5, P@.7, P@.9, mean IoU of each split."""
    from reir.datasets import read_annotations
    from reir.evaluate import evaluate_rec

    where = Where(checkpoint, encoder, work, num_workers, gpu, threads)
    dataset = read_annotations(annotations, split_by)
    with where.encoding() as (model, how):
        report = evaluate_rec(model, dataset, images, splits=split or (), max_photos=limit, how=how)
    show(report, as_json)


def tir(  # noqa: PLR0913, every argument is an option of the command
    images: Images,
    captions: Annotated[
        Path | None, typer.Option(help="Captions in COCO's json form.", dir_okay=False)
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(help="As for `reir eval reir`: its photos and, without captions, its texts."),
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
    """Find each text's photo among all: R@1, 5, 10 by the best instance and by the photo vector."""
    from reir.datasets import read_annotations, read_coco_captions, read_coco_images
    from reir.evaluate import evaluate_tir, texts_of

    where = Where(checkpoint, encoder, work, num_workers, gpu, threads)
    if annotations is not None:
        dataset = one_split(read_annotations(annotations, split_by), split)
    elif captions is not None:
        dataset = read_coco_images(captions)
    else:
        raise ConfigError("nothing to look for: give --captions FILE, --annotations PATH or both")
    dataset = dataset.first_images(limit)
    told = texts_of(dataset) if captions is None else read_coco_captions(captions)
    texts = [text for text in told if text.image_id in dataset.images_by_id]
    with where.encoding() as (model, how):
        report = evaluate_tir(model, dataset, texts, images, how=how)
    show(report, as_json)


@dataclass(frozen=True)
class Where:
    """Which encoder, and where and how it encodes: the options that all subcommands share.

    Raises:
        ConfigError: options that exclude or need one another.
    """

    checkpoint: Path | None
    encoder: str | None
    work: Path | None
    num_workers: int | None
    gpu: bool
    threads: int

    def __post_init__(self) -> None:
        """Refuse options that do nothing, before anything is read."""
        if self.gpu and self.num_workers is None:
            raise ConfigError(
                "--gpu gives each Ray worker a GPU: it needs --num-workers N; without workers a "
                "GPU is used where torch finds one"
            )

    @contextmanager
    def encoding(self) -> Iterator[tuple[InstanceEncoder, Encoding]]:
        """Load the encoder and yield it with how photos are encoded, progress shown."""
        from reir.encoders import load_encoder_spec
        from reir.evaluate import Encoding

        spec = chosen_encoder(self.checkpoint, self.encoder) or ""
        runner = self._runner(spec)
        with messages().status("loading the model"):
            model = load_encoder_spec(spec)
        with self._stoppable(), _progress_bar() as progress:
            yield (
                model,
                Encoding(runner=runner, work=self.work, threads=self.threads, progress=progress),
            )

    def _runner(self, spec: str) -> Runner | None:
        """Return what an app offers to run shards on other processes, None for this one."""
        if self.num_workers is None:
            return None
        from reir.encoders import load_encoder_spec

        offered = list(entry_points(group=RUNNERS, name="ray"))
        if not offered:
            raise ConfigError(
                f"--num-workers {self.num_workers} needs the workers of the ingestion app; "
                f"pip install 'reir-platform[ingestion]'"
            )
        runner: Runner = offered[0].load()(
            partial(load_encoder_spec, spec),
            num_workers=self.num_workers,
            use_gpu=self.gpu,
            threads=self.threads,
        )
        return runner

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Say on Ctrl-C what is kept."""
        try:
            yield
        except KeyboardInterrupt:
            kept = f"Finished shards stay in {self.work}; the same command goes on from there."
            lost = "Nothing is kept; with --work DIR the next run goes on from its last shard."
            messages().print(f"Stopped. {kept if self.work else lost}", markup=False)
            raise


def one_split(dataset: ReferringDataset, name: str | None) -> ReferringDataset:
    """Return a split of a dataset, by default its only one besides "train", else all of it.

    Raises:
        DataError: there is no such split, or the choice is not clear.
    """
    if name is not None:
        return dataset.split(name)
    names = [each for each in dataset.splits if each != TRAIN]
    if len(names) > 1:
        raise DataError(f"{dataset.source} has splits {', '.join(names)}: name one with --split")
    return dataset.split(names[0]) if names else dataset


def show(report: ReirReport | RecReport | TirReport, as_json: bool) -> None:
    """Print a report as tables or as JSON."""
    if as_json:
        print_json(report.to_dict())
    else:
        output().print(report.table(), soft_wrap=False)


@contextmanager
def _progress_bar() -> Iterator[Progress]:
    """Photos done, rate and time left, on standard error."""
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

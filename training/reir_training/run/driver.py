"""The driver of a training run: prepares the cache, starts training and shows its progress."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from reir.config import dump_config
from reir.sinks import JsonLines, records_of
from reir_training.config import (
    ClareTrainConfig,
    NanoTrainConfig,
    PizaTrainConfig,
    TrainConfig,
)
from reir_training.run.num_workers import NumWorkers, check_shares
from reir_training.run.schedule import (
    CANDIDATES,
    COLORS,
    QUERY_ZOOM,
    RERANK,
    best_figure,
    check_stage,
)
from reir_training.run.storage import METRICS, open_checked_storage
from reir_training.weak.config import WeakTrainConfig

if TYPE_CHECKING:
    from reir.models.nano.model import ClareNano
    from reir_training.nano.cache import PhotoFile

POLL_S = 1.0
ANNOTATIONS = "annotations"
"""Folder in the output directory in which workers share the parsed annotations."""
AnyConfig = TypeVar("AnyConfig", bound=TrainConfig)


def run(  # noqa: PLR0913 - most are keyword-only
    preset: str,
    config: TrainConfig,
    *,
    output: Path,
    stage: str,
    init: Path | None,
    num_workers: NumWorkers,
    use_gpu: bool,
    storage: str | None = None,
) -> Path:
    """Prepare the run, train, and return the checkpoint directory.

    Args:
        preset: name of the model.
        config: settings of the run, of the class that the preset needs; saved as `config.yaml`.
        output: output folder.
        stage: "grounding", "clia", "all" (both), or one of `ADDED_PARTS`.
        init: checkpoint to start from; None for the published weights of the parts.
        num_workers: number of Ray Train workers, or a range.
        use_gpu: use one GPU per worker.
        storage: URI of a bucket or folder for the saved states and a copy of the other output.

    Raises:
        ConfigError: the photos of a step cannot be divided among the workers, the stage does not
            fit the preset, `best_by` is a figure of another stage, or the storage cannot be used.
    """
    # Imported here, because a dry run uses this module but needs no Ray.
    from reir_training.run.jobs import train

    # All checks come first, so that a run that cannot succeed leaves no files.
    config = with_absolute_paths(config)
    check_shares(config.optimization, num_workers)
    check_stage(preset, stage, init)
    best_figure(config, stage)  # refuses the figure of another stage
    remote = open_checked_storage(storage) if storage else None
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(dump_config(config))
    if remote is not None:
        remote.push(output / "config.yaml")
        # On a new machine, the log continues that of the earlier starts.
        remote.pull(output / METRICS)
    console = Console(stderr=True)
    with _progress(console) as bars:
        cache = (output / ANNOTATIONS).resolve()
        if isinstance(config, NanoTrainConfig):
            cache = _cache(config, output, stage, init, bars).resolve()
        if isinstance(config, WeakTrainConfig) and config.model.anchors == "candidates":
            cache = _anchor_cache(config, output, init, bars).resolve()
        _log_start(output / METRICS)
        # The first worker may run on another node, and gets the log from the storage.
        if remote is not None:
            remote.push(output / METRICS)
        with _MetricsFollower(output / METRICS, bars):
            checkpoint = train(
                preset,
                config,
                output=output.resolve(),
                cache=cache,
                stage=stage,
                init=init.resolve() if init else None,
                num_workers=num_workers,
                use_gpu=use_gpu,
                storage=storage,
            )
        if remote is not None:
            remote.pull(output / METRICS)
            remote.pull(checkpoint)
    console.print(f"checkpoint: {checkpoint}")
    return checkpoint


def _progress(console: Console) -> Progress:
    """Return progress bars that show a note for each task and the remaining time."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def with_absolute_paths(config: AnyConfig) -> AnyConfig:
    """Make the paths of a configuration absolute, because Ray workers run in another folder."""
    data, evaluation = (
        tuple(s.model_copy(update={"path": s.path.resolve()}) for s in sources)
        for sources in (config.data, config.evaluation)
    )
    changes: dict[str, Any] = {"data": data, "evaluation": evaluation}
    if isinstance(config, NanoTrainConfig):
        changes["weights"] = config.weights.resolve()
    if isinstance(config, WeakTrainConfig):
        paths = {name: getattr(config, name) for name in ("weights", "yolov3", "word_vectors")}
        changes |= {name: path.resolve() for name, path in paths.items() if path is not None}
    if isinstance(config, ClareTrainConfig):
        if config.tokenizer is not None:
            changes["tokenizer"] = config.tokenizer.resolve()
        if config.towers is not None:
            changes["towers"] = _absolute_source(config.towers)
    if isinstance(config, PizaTrainConfig):
        changes["base"] = _absolute_source(config.base)
    return config.model_copy(update=changes)


def _absolute_source(source: str) -> str:
    """Return the absolute path of a folder; leave the name of a model on the hub as it is."""
    return str(Path(source).resolve()) if Path(source).exists() else source


def _cache(
    config: NanoTrainConfig, output: Path, stage: str, init: Path | None, bars: Progress
) -> Path:
    """Compute the output of the frozen part of the model, and return its folder."""
    # Computed before the workers start, because each of them would compute all of it. The imports
    # are here, because the published CLARE needs none of these modules in the driver.
    from reir_training.candidates.task import load_candidate_examples
    from reir_training.colors.data import build_color_cache, with_color_words
    from reir_training.data.leakage import training_photos
    from reir_training.nano.initialization import start_model
    from reir_training.query_zoom.task import build_zoom_cache
    from reir_training.rerank.task import load_rerank_data

    root = config.cache or output / "cache"
    photos = training_photos(config)
    if stage == QUERY_ZOOM:
        assert init is not None
        task = bars.add_task("encoding looks", total=None, note="mosaics")
        build_zoom_cache(
            config, photos, root=root, init=init, on_progress=lambda _: bars.advance(task)
        )
        return root
    if stage == COLORS:
        assert init is not None
        named = with_color_words(photos)
        task = bars.add_task("encoding around instances", total=len(named), note="photos")
        build_color_cache(root, named, init, lambda done: bars.update(task, completed=done))
        return root
    model, _ = start_model(config, init)
    folder = _run_frozen_part(root, model, photos, bars)
    if stage == RERANK:
        assert init is not None
        bars.add_task("encoding with the dual stream", total=None, note="photos and expressions")
        load_rerank_data(config, photos, cache=folder, init=init)
    if stage == CANDIDATES:
        assert init is not None
        bars.add_task("encoding expressions", total=None, note="texts")
        load_candidate_examples(config, photos, cache=folder, init=init)
    return folder


def _anchor_cache(config: WeakTrainConfig, output: Path, init: Path | None, bars: Progress) -> Path:
    """Compute the candidates that are the anchors, and return their folder."""
    from reir_training.weak.data import read_weak_photos
    from reir_training.weak.start import start_nano

    nano, _ = start_nano(config, init)
    photos = read_weak_photos(config).files
    return _run_frozen_part(config.cache or output / "cache", nano, photos, bars)


def _run_frozen_part(
    root: Path, model: ClareNano, photos: Sequence[PhotoFile], bars: Progress
) -> Path:
    """Run the frozen part of a `clare-nano` on photos, and return the folder of its output."""
    from reir_training.nano.cache import build_cache

    task = bars.add_task("caching the frozen part", total=len(photos), note="photos")
    folder = build_cache(root, model, photos, lambda done, _: bars.update(task, completed=done))
    bars.update(task, completed=len(photos))
    return folder


def _log_start(metrics: Path) -> None:
    log = JsonLines(metrics)
    log.write({"event": "start", "time": time.time()})
    log.close()


class _MetricsFollower:
    """Reads the metrics file that the first worker writes, and shows it as a progress bar."""

    def __init__(self, path: Path, bars: Progress) -> None:
        self._path, self._bars = path, bars
        self._task: TaskID | None = None
        # Lines of earlier starts are not shown again.
        self._offset = path.stat().st_size
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        # The last lines may have been written after the thread last read the file.
        self._read()

    def _follow(self) -> None:
        while not self._stop.wait(POLL_S):
            self._read()

    def _read(self) -> None:
        with self._path.open() as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith("\n"):  # the worker has not finished writing this line
                    break
                self._offset += len(line.encode())
                for record in records_of([line]):
                    self._show(record)

    def _show(self, line: dict[str, Any]) -> None:
        if line["event"] == "progress":
            if self._task is None:
                self._task = self._bars.add_task("", total=None, note="")
            done = (line["epoch"] - 1) * line["steps"] + line["step"]
            self._bars.update(
                self._task,
                description=line["stage"],
                total=line["epochs"] * line["steps"],
                completed=done,
                note=f"steps  {line['photos_per_s']} photos/s  loss {line['loss']:.3f}",
            )
        elif line["event"] == "epoch" and "br1_50" in line:
            self._bars.console.print(
                f"epoch {line['epoch']}: BR@1 {line['br1_50']}  BR@10 {line['br10_50']}  "
                f"REC {line['rec_long']}"
            )

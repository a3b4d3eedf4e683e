"""One training run as a person sees it: cache, progress bars with rate and ETA, where it ended."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any, TypeVar

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
from reir_training.checks import RERANK, NumWorkers, check_shares, check_stage
from reir_training.config import ClareTrainConfig, CommonConfig, TrainConfig
from reir_training.storage import METRICS, checked_storage

POLL_S = 1.0
ANNOTATIONS = "annotations"
"""Folder in the output directory in which workers share the annotations that they read."""
Run = TypeVar("Run", bound=CommonConfig)


def run(  # noqa: PLR0913 - one by one is clearer than a bag
    preset: str,
    config: CommonConfig,
    *,
    output: Path,
    stage: str,
    init: Path | None,
    num_workers: NumWorkers,
    use_gpu: bool,
    storage: str | None = None,
) -> Path:
    """Build the cache, train, and return the checkpoint directory.

    Args:
        preset: name of the model.
        config: of the run, of the kind that the preset takes; kept as `config.yaml`.
        output: folder of the run.
        stage: "grounding", "clia", "all" (both) or "rerank".
        init: checkpoint to start from; None for the start weights.
        num_workers: Ray Train workers.
        use_gpu: one GPU a worker.
        storage: URI of a bucket or folder that keeps the states, and a copy of the rest.

    Raises:
        ConfigError: the workers cannot share the photos of a step, or stage or storage do not fit.
    """
    from reir_training.jobs import train

    config = absolute(config)
    check_shares(config.optimisation, num_workers)
    check_stage(preset, stage, init)
    home = checked_storage(storage) if storage else None
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(dump_config(config))
    if home is not None:
        home.push(output / "config.yaml")
        home.pull(output / METRICS)
    console = Console(stderr=True)
    with _progress(console) as bars:
        cache = (output / ANNOTATIONS).resolve()
        if isinstance(config, TrainConfig):
            cache = _cache(config, output, stage, init, bars).resolve()
        _log_start(output / METRICS)
        if home is not None:
            home.push(output / METRICS)
        with _Follower(output / METRICS, bars):
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
        if home is not None:
            home.pull(output / METRICS)
            home.pull(checkpoint)
    console.print(f"checkpoint: {checkpoint}")
    return checkpoint


def _progress(console: Console) -> Progress:
    """Return the bars of a run, each with a note and the time that is left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def absolute(config: Run) -> Run:
    """Resolve the folders of a configuration: workers run in a folder of their own."""
    data, evaluation = (
        tuple(s.model_copy(update={"path": s.path.resolve()}) for s in sources)
        for sources in (config.data, config.evaluation)
    )
    changes: dict[str, Any] = {"data": data, "evaluation": evaluation}
    if isinstance(config, TrainConfig):
        changes["weights"] = config.weights.resolve()
    if isinstance(config, ClareTrainConfig):
        if config.tokenizer is not None:
            changes["tokenizer"] = config.tokenizer.resolve()
        if config.towers is not None and Path(config.towers).exists():
            changes["towers"] = str(Path(config.towers).resolve())
    return config.model_copy(update=changes)


def _cache(
    config: TrainConfig, output: Path, stage: str, init: Path | None, bars: Progress
) -> Path:
    """Build the output of what the stage leaves frozen; returns its folder."""
    from reir_training.assemble import start_model
    from reir_training.cache import build_cache
    from reir_training.leakage import training_photos
    from reir_training.rerank_task import rerank_data

    root = config.cache or output / "cache"
    photos = training_photos(config)
    model, _ = start_model(config, init)
    task = bars.add_task("frozen part", total=len(photos), note="photos")
    folder = build_cache(root, model, photos, lambda done, _: bars.update(task, completed=done))
    bars.update(task, completed=len(photos))
    if stage == RERANK:
        assert init is not None
        bars.add_task("dual stream", total=None, note="photos and expressions")
        rerank_data(config, photos, cache=folder, init=init)
    return folder


def _log_start(metrics: Path) -> None:
    with metrics.open("a") as file:
        file.write(json.dumps({"event": "start", "time": time.time()}) + "\n")


class _Follower:
    """Shows the lines that the first worker writes to the metrics file as a progress bar."""

    def __init__(self, path: Path, bars: Progress) -> None:
        self._path, self._bars = path, bars
        self._task: TaskID | None = None
        self._offset = path.stat().st_size
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._read()

    def _follow(self) -> None:
        while not self._stop.wait(POLL_S):
            self._read()

    def _read(self) -> None:
        with self._path.open() as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith("\n"):
                    break
                self._offset += len(line.encode())
                self._show(json.loads(line))

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

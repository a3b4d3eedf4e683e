"""`build_dataset`: from photos to a folder with expressions; see the stages there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from reir.errors import DataError
from reir_ingestion.build_dataset.files import write_text
from reir_ingestion.build_dataset.look_alikes import find_look_alikes, groups_of_photos
from reir_ingestion.build_dataset.outcomes import Builder, Outcome
from reir_ingestion.build_dataset.output import choose_splits, write_folder
from reir_ingestion.build_dataset.page import statistics_page
from reir_ingestion.build_dataset.photos import PhotoSet
from reir_ingestion.build_dataset.rounds import Progress, build_outcomes
from reir_ingestion.build_dataset.scenes import Scene, SceneReader
from reir_ingestion.build_dataset.statistics import Statistics, statistics_of
from reir_ingestion.build_dataset.tasks import tasks_of

STATISTICS, PAGE = "statistics.json", "statistics.html"
READING = "reading photos"


class Writers(Protocol):
    """Makes the writer and the judges, once the scenes are known."""

    def __call__(self, scenes: Sequence[Scene]) -> Builder:
        """Return the builder of expressions."""
        ...


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Options of a build.

    Attributes:
        val_share: share of the photos in the split "val".
        threads: number of photos that are written about at the same time.
        progress: called after each photo, and after each answer of a batch.
    """

    val_share: float = 0.1
    threads: int = 1
    progress: Progress = lambda _stage, _done, _total: None


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """The result of a build.

    Attributes:
        out: the folder.
        statistics: its counts.
        outcomes: what became of each photo.
    """

    out: Path
    statistics: Statistics
    outcomes: Sequence[Outcome]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"out": str(self.out), **self.statistics.to_dict()}


def work_folder(out: Path) -> Path:
    """Return the folder for what a rerun continues from.

    Raises:
        DataError: it cannot be created.
    """
    work = out / "work"
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot create {work}: {error.strerror}") from error
    return work


def build_dataset(
    photos: PhotoSet,
    out: Path,
    reader: SceneReader,
    writers: Writers,
    options: BuildOptions,
) -> BuildReport:
    """Build a dataset: read the photos, find look-alikes, write and judge, write the folder.

    A run that was interrupted continues: photos that were encoded and answers that a model gave
    are in the work folder. The other stages are repeated, which is fast.

    Args:
        photos: the photos.
        out: folder of the dataset.
        reader: finds the instances of each photo.
        writers: makes the writer and the judges.
        options: see `BuildOptions`.

    Raises:
        ConfigError: a setting does not fit the photos.
        DataError: the folder cannot be written.
    """
    progress = options.progress
    scenes = reader.read(photos.photos, lambda done, total: progress(READING, done, total))
    groups = groups_of_photos(scenes)
    tasks = tasks_of(scenes, find_look_alikes(scenes, groups))
    # Only now, because the parser of the rules needs the class names of all photos.
    builder = writers(scenes)
    outcomes = build_outcomes(builder, tasks, options.threads, progress)
    splits = choose_splits(scenes, groups, options.val_share)
    statistics = statistics_of(outcomes, splits)
    write_folder(out, photos, outcomes, splits, builder)
    write_text(out / STATISTICS, json.dumps(statistics.to_dict(), indent=2) + "\n")
    write_text(out / PAGE, statistics_page(statistics, outcomes))
    return BuildReport(out=out, statistics=statistics, outcomes=outcomes)

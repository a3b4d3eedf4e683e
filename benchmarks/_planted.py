"""Planted faults in written expressions, and how many of them a judge finds; see data_engine.py."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reir.datasets import Expression
from reir.datasets.photos import read_photos
from reir.models.interfaces import InstanceEncoder
from reir.records import FloatArray
from reir_ingestion.build_dataset.look_alikes import find_look_alikes, groups_of_photos
from reir_ingestion.build_dataset.photos import open_photos
from reir_ingestion.build_dataset.scenes import SceneReader
from reir_ingestion.build_dataset.tasks import ExpressionJudge, WritingTask, Written, tasks_of
from reir_testing.data_engine.planted_faults import plant

GOOD, LONG = "good", "long"
FAULTS = ("color", "side", "not_unique", "other_object")
"""The faults of the figure; each counts the same. "other_class" is reported beside them."""


@dataclass(frozen=True)
class Trials:
    """The expressions about one photo to judge.

    Attributes:
        task: the photo.
        kinds: for each expression, the planted fault, or `GOOD`.
        expressions: the expressions.
        long: for each expression, whether it is meant to be unique in the gallery.
    """

    task: WritingTask
    kinds: tuple[str, ...]
    expressions: tuple[Written, ...]
    long: tuple[bool, ...]


class Remembered:
    """Encodes each expression once, so that many thresholds can be tried."""

    def __init__(self, encoder: InstanceEncoder) -> None:
        self._encoder = encoder
        self._known: dict[str, FloatArray] = {}

    def __call__(self, expressions: Sequence[str]) -> FloatArray:
        """(N, D) float32 unit vectors, in the order given."""
        new = sorted({text for text in expressions if text not in self._known}, key=len)
        self._known |= zip(new, self._encoder.encode_expressions(new), strict=True)
        vectors = [self._known[text] for text in expressions]
        return np.stack(vectors) if vectors else np.empty((0, self._encoder.dim), np.float32)


def trials_of(
    folder: Path, split: str, encoder: InstanceEncoder, work: Path, num_photos: int | None
) -> list[Trials]:
    """Plant faults in the written expressions of a split."""
    photos = open_photos(str(folder), split=split).photos[:num_photos]
    scenes = SceneReader(encoder, work).read(photos)
    tasks = tasks_of(scenes, find_look_alikes(scenes, groups_of_photos(scenes)))
    written = read_photos(folder).split(split)
    return list(_trials(tasks, written.expressions))


def _trials(tasks: Sequence[WritingTask], expressions: Sequence[Expression]) -> Iterator[Trials]:
    about: dict[str, list[Expression]] = defaultdict(list)
    for expression in expressions:
        about[str(expression.instance_id)].append(expression)
    for task in tasks:
        good = [
            (Written(number, each.text), each.kind == LONG)
            for number, instance in enumerate(task.scene.instances, start=1)
            if instance.annotation
            for each in about[instance.annotation.instance_id]
        ]
        planted = list(plant(task.scene, [written for written, _ in good]))
        yield Trials(
            task=task,
            kinds=(*(GOOD for _ in good), *(each.kind for each in planted)),
            expressions=(*(w for w, _ in good), *(each.written for each in planted)),
            long=(*(long for _, long in good), *(False for _ in planted)),
        )


def refused_shares(trials: Sequence[Trials], judge: ExpressionJudge) -> Mapping[str, float]:
    """Return the share of the expressions of each kind that a judge refuses."""
    refused: dict[str, list[bool]] = defaultdict(list)
    for each in trials:
        for kind, verdict in zip(each.kinds, judge.judge(each.task, each.expressions), strict=True):
            refused[kind].append(bool(verdict.problems))
    return {kind: float(np.mean(found)) for kind, found in refused.items()} | {
        f"num_{kind}": float(len(found)) for kind, found in refused.items()
    }


def recall_of(shares: Mapping[str, float]) -> float:
    """Return the mean share of the planted faults that are found, over the kinds of faults."""
    return float(np.mean([shares[kind] for kind in FAULTS]))

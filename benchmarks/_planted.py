"""Planted faults in written expressions, and how many of them a judge finds; see data_engine.py."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from reir.datasets import Expression, ReferringDataset, ReferringInstance
from reir.datasets.coco import read_coco_instances
from reir.datasets.photos import read_human_expressions, read_photos
from reir.images.boxes import elementwise_iou
from reir.models.interfaces import InstanceEncoder
from reir.records import FloatArray
from reir_ingestion.build_dataset.judges.rules import Evidence, RulesJudge, Thresholds
from reir_ingestion.build_dataset.look_alikes import find_look_alikes, groups_of_photos
from reir_ingestion.build_dataset.photos import INSTANCES, Photo, open_photos
from reir_ingestion.build_dataset.scenes import SceneReader
from reir_ingestion.build_dataset.tasks import IN_GALLERY, WritingTask, Written, tasks_of
from reir_testing.data_engine.planted_faults import plant

GOOD, LONG = "good", "long"
FAULTS = ("color", "side", "not_unique", "other_object")
"""The faults of the figure; each counts the same. "other_class" is reported beside them."""

SAME_BOX = 0.9
"""IoU above which a box that came with a human expression is that of an annotated instance."""


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
    """Encodes each expression once, and keeps the vectors in a file.

    Args:
        encoder: encodes expressions.
        path: npz file; read if it exists and is of the same encoder.
    """

    def __init__(self, encoder: InstanceEncoder, path: Path) -> None:
        self._encoder, self._path = encoder, path
        self._known: dict[str, FloatArray] = {}
        if path.exists():
            with np.load(path, allow_pickle=False) as saved:
                if str(saved["digest"]) == encoder.digest:
                    self._known = dict(zip(saved["texts"].tolist(), saved["vectors"], strict=True))

    def __call__(self, expressions: Sequence[str]) -> FloatArray:
        """(N, D) float32 unit vectors, in the order given."""
        new = sorted({text for text in expressions if text not in self._known}, key=len)
        self._known |= zip(new, self._encoder.encode_expressions(new), strict=True)
        vectors = [self._known[text] for text in expressions]
        return np.stack(vectors) if vectors else np.empty((0, self._encoder.dim), np.float32)

    def save(self) -> None:
        """Write the file."""
        texts = list(self._known)
        vectors = np.stack([self._known[text] for text in texts])
        np.savez(self._path, digest=self._encoder.digest, texts=texts, vectors=vectors)


@dataclass(frozen=True)
class Judged:
    """What speaks against one expression.

    Attributes:
        photo: number of its photo.
        kind: the planted fault, or `GOOD`.
        long: whether it is meant to be unique in the gallery.
        evidence: of the rules judge, by itself in the photo and in the gallery.
    """

    photo: int
    kind: str
    long: bool
    evidence: Evidence

    def refused(self, thresholds: Thresholds) -> bool:
        """Whether it is refused, apart from its uniqueness in the gallery."""
        return bool(self.evidence.problems(thresholds).keys() - {IN_GALLERY})


def trials_of(folder: Path, split: str, encoder: InstanceEncoder, work: Path) -> list[Trials]:
    """Plant faults in the written expressions of a split."""
    photos = open_photos(str(folder), split=split).photos
    written = read_photos(folder).split(split)
    return list(_trials(_tasks(photos, encoder, work), written.expressions))


def human_trials(folder: Path, encoder: InstanceEncoder, work: Path) -> list[Trials]:
    """Plant faults in the expressions that people wrote about photos of any split."""
    human, annotated = read_human_expressions(folder), read_coco_instances(folder / INSTANCES)
    names = {image.file_name for image in human.images}
    photos = [each for each in open_photos(str(folder)).photos if each.file_name in names]
    return list(_trials(_tasks(photos, encoder, work), _of_annotations(human, annotated)))


def _of_annotations(human: ReferringDataset, annotated: ReferringDataset) -> Iterator[Expression]:
    """Yield human expressions of the annotated instances that have their boxes."""
    boxes: dict[str, list[ReferringInstance]] = defaultdict(list)
    for instance in annotated.instances:
        boxes[instance.image_id].append(instance)
    for each in human.with_targets().expressions:
        own = human.instances_by_id[str(each.instance_id)].box_xyxy_px
        found = boxes[each.image_id]
        overlap = [float(elementwise_iou(own, other.box_xyxy_px)) for other in found]
        if overlap and max(overlap) > SAME_BOX:
            best = found[int(np.argmax(overlap))]
            yield replace(each, instance_id=best.instance_id)


def _tasks(photos: Sequence[Photo], encoder: InstanceEncoder, work: Path) -> Sequence[WritingTask]:
    scenes = SceneReader(encoder, work).read(photos)
    return tasks_of(scenes, find_look_alikes(scenes, groups_of_photos(scenes)))


def _trials(tasks: Sequence[WritingTask], expressions: Iterable[Expression]) -> Iterator[Trials]:
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


def evidence_of(trials: Sequence[Trials], judge: RulesJudge) -> list[Judged]:
    """Return what speaks against each expression."""
    return [
        Judged(photo, kind, long, evidence)
        for photo, each in enumerate(trials)
        for kind, long, evidence in zip(
            each.kinds, each.long, judge.evidence(each.task, each.expressions), strict=True
        )
    ]


def shares(judged: Sequence[Judged], thresholds: Thresholds) -> Mapping[str, float]:
    """Return the share of the expressions of each kind that are refused."""
    refused: dict[str, list[bool]] = defaultdict(list)
    for each in judged:
        refused[each.kind].append(each.refused(thresholds))
    return {kind: float(np.mean(found)) for kind, found in refused.items()}

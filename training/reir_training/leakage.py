"""The guard between training and evaluation: no photo of an evaluation set is trained on.

Published sets share COCO's photos under several names, so photos are compared by COCO's number
where a name has one. Knows annotations and file names, no model.
"""

from __future__ import annotations

import filecmp
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reir.datasets.records import ReferringDataset, ReferringImage
from reir.errors import DataError
from reir_training.config import DataConfig, DataSource
from reir_training.examples import TRAIN, VAL, TrainPhoto, photos_of, read_dataset, use_of_photos

logger = logging.getLogger(__name__)

SHOWN = 3
_COCO_NAME = re.compile(
    r"(?:.*/)?(?:COCO_(?:train|val|test|unlabeled)20\d\d_)?(\d{12})(?:\.\w+)?", re.ASCII
)


@dataclass(frozen=True)
class ReadSet:
    """A declared set and its annotations.

    Attributes:
        source: as configured.
        dataset: what was read.
    """

    source: DataSource
    dataset: ReferringDataset

    def path_of(self, image: ReferringImage) -> Path:
        """Where the photo should be."""
        return self.source.path / self.source.images / image.file_name


@dataclass(frozen=True)
class Leak:
    """Photos of one evaluation set that one training set would be trained on.

    Attributes:
        evaluation: label of the evaluation set.
        training: row of the training set in the configuration.
        training_label: its label.
        image_ids: in the training set.
        file_names: of the same photos, in the same order.
    """

    evaluation: str
    training: int
    training_label: str
    image_ids: tuple[str, ...]
    file_names: tuple[str, ...]

    def __str__(self) -> str:
        """Say which photos, where, and how many."""
        num = len(self.file_names)
        return (
            f"{num} {'photo' if num == 1 else 'photos'} of the evaluation set {self.evaluation} "
            f"would be trained on from {self.training_label}: {shortened(self.file_names)}"
        )


def coco_number(name: str) -> int | None:
    """COCO's number of a photo, or None where the name is not one of COCO's.

    `COCO_train2014_000000123456.jpg`, `val2017/000000123456.jpg` and `000000123456` are 123456:
    the releases of 2014 and 2017 divide the same photos differently.
    """
    found = _COCO_NAME.fullmatch(name)
    return int(found[1]) if found else None


def read_sets(sources: Iterable[DataSource], *, masks: bool = False) -> list[ReadSet]:
    """Read the annotations of several sets, with their masks where `masks` asks for them.

    Raises:
        DataError: a file is malformed or missing.
    """
    return [ReadSet(source, read_dataset(source, masks=masks)) for source in sources]


def find_leaks(training: Sequence[ReadSet], evaluation: Sequence[ReadSet]) -> list[Leak]:
    """Find the training photos that an evaluation set or a held-out split holds too.

    Two photos are one if either their COCO numbers agree, taken from file name and image id, or
    their file names do and, where both files are there, their bytes.
    """
    leaks = []
    for label, guarded in _guarded(training, evaluation):
        for row, each in enumerate(training):
            use = use_of_photos(each.dataset)
            trained = (image for image in each.dataset.images if use.get(image.image_id) == TRAIN)
            found = [image for image in trained if guarded.holds(image, each)]
            if found:
                ids = tuple(image.image_id for image in found)
                names = tuple(image.file_name for image in found)
                leaks.append(Leak(label, row, each.source.label, ids, names))
    return leaks


def left_out(leaks: Iterable[Leak]) -> Mapping[int, frozenset[str]]:
    """Row of a training set -> image ids that must not be trained on."""
    rows: dict[int, set[str]] = defaultdict(set)
    for leak in leaks:
        rows[leak.training].update(leak.image_ids)
    return {row: frozenset(ids) for row, ids in rows.items()}


def training_photos(config: DataConfig, *, masks: bool = False) -> list[TrainPhoto]:
    """Read all photos that a run uses, without those that it will be measured on.

    Args:
        config: of the run.
        masks: read masks too.

    Raises:
        DataError: a file is malformed, a source holds nothing to train on, or a photo of an
            evaluation set would be trained on and `exclude_evaluation` is not set.
    """
    training = read_sets(config.data, masks=masks)
    leaks = find_leaks(training, read_sets(config.evaluation))
    if leaks and not config.exclude_evaluation:
        raise DataError("\n".join([*map(str, leaks), REMEDY]))
    for leak in leaks:
        logger.warning("%s; left out of training", leak)
    rows = left_out(leaks)
    return [
        photo
        for row, each in enumerate(training)
        for photo in photos_of(each.source, each.dataset, rows.get(row, frozenset()))
    ]


REMEDY = (
    "figures on photos that were trained on say nothing: take these photos out of the data, "
    "or set exclude_evaluation: true to leave them out of training"
)


def shortened(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


class _Photos:
    """Photos of one evaluation set, to be asked for."""

    def __init__(self, where: ReadSet, images: Iterable[ReferringImage]) -> None:
        self._numbers: set[int] = set()
        self._named: dict[str, list[tuple[str, Path]]] = defaultdict(list)
        for image in images:
            numbers = _coco_numbers(image)
            self._numbers |= numbers
            if not numbers:
                path = where.path_of(image)
                self._named[path.name].append((image.file_name, path))

    def holds(self, image: ReferringImage, where: ReadSet) -> bool:
        """Whether a photo of another set is one of these."""
        numbers = _coco_numbers(image)
        if numbers:
            return not numbers.isdisjoint(self._numbers)
        path = where.path_of(image)
        return any(
            _same_file(path, other, image.file_name == name)
            for name, other in self._named.get(path.name, ())
        )


def _guarded(
    training: Sequence[ReadSet], evaluation: Sequence[ReadSet]
) -> Iterator[tuple[str, _Photos]]:
    """Yield the declared sets, and the photos that training sets hold out themselves."""
    for each in evaluation:
        yield each.source.label, _Photos(each, each.dataset.images)
    for each in training:
        use = use_of_photos(each.dataset)
        held_out = [i for i in each.dataset.images if use.get(i.image_id) == VAL]
        if held_out:
            yield f"{each.source.label} [{VAL}]", _Photos(each, held_out)


def _coco_numbers(image: ReferringImage) -> set[int]:
    found = (coco_number(image.file_name), coco_number(image.image_id))
    return {number for number in found if number is not None}


def _same_file(one: Path, other: Path, same_name: bool) -> bool:
    """Whether two paths of one last part are one photo; where a file is missing, names decide."""
    if one.is_file() and other.is_file():
        return filecmp.cmp(one, other, shallow=False)
    return same_name

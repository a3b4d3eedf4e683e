"""Prevents leakage: no photo of an evaluation set is trained on.

Published data sets contain COCO's photos under different names, so photos are compared by their
COCO id where the name has one. Uses annotations, file names and bytes, no model.
"""

from __future__ import annotations

import filecmp
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reir.datasets.dataset import ReferringDataset, ReferringImage
from reir.errors import DataError
from reir_training.config import DataConfig, DataSource
from reir_training.data.examples import (
    TRAIN,
    VAL,
    TrainPhoto,
    build_photos,
    photo_uses,
    read_dataset,
)

logger = logging.getLogger(__name__)

MAX_NAMES_SHOWN = 3
# COCO ids are below a million, and padded to 12 digits; cameras name photos by times of 12 digits.
# ASCII only, because `\d` would also match the digits of other scripts.
_COCO_NAME = re.compile(
    r"(?:.*/)?(COCO_(?:train|val|test|unlabeled)20\d\d_)?0{6}(\d{6})(?:\.\w+)?", re.ASCII
)


@dataclass(frozen=True)
class SourceDataset:
    """A data source of the configuration and its annotations.

    Attributes:
        source: its entry in the configuration.
        dataset: its annotations.
    """

    source: DataSource
    dataset: ReferringDataset

    @property
    def folder(self) -> Path:
        """The folder where the photo files should be."""
        return self.source.path / self.source.images

    def path_of(self, image: ReferringImage) -> Path:
        """Return the path where the photo file should be."""
        return self.folder / image.file_name


@dataclass(frozen=True)
class Leak:
    """Photos that are in both an evaluation set and a training set.

    Attributes:
        evaluation: label of the evaluation set.
        training: index of the training set in the configuration.
        training_label: label of the training set.
        image_ids: ids of the photos in the training set.
        file_names: file names of the same photos, in the same order.
    """

    evaluation: str
    training: int
    training_label: str
    image_ids: tuple[str, ...]
    file_names: tuple[str, ...]

    def __str__(self) -> str:
        """Return a sentence that names the sets and some of the photos."""
        num = len(self.file_names)
        return (
            f"{num} {'photo' if num == 1 else 'photos'} of the evaluation set {self.evaluation} "
            f"would be trained on from {self.training_label}: {abbreviate(self.file_names)}"
        )


def coco_number(name: str) -> int | None:
    """Return the COCO id in a photo's name, or None if the name does not follow COCO's pattern.

    `COCO_train2014_000000123456.jpg`, `val2017/000000123456.jpg` and `000000123456` all give
    123456, because the releases of 2014 and 2017 split the same photos differently.
    """
    found = _COCO_NAME.fullmatch(name)
    return int(found[2]) if found else None


def read_sources(sources: Iterable[DataSource], *, masks: bool = False) -> list[SourceDataset]:
    """Read the annotations of several sources, including masks if `masks` is set.

    Raises:
        DataError: a file is malformed or missing.
    """
    return [SourceDataset(source, read_dataset(source, masks=masks)) for source in sources]


def find_leaks(
    training: Sequence[SourceDataset], evaluation: Sequence[SourceDataset]
) -> list[Leak]:
    """Find training photos that are also in an evaluation set or a held-out split.

    Two photos are the same if their COCO ids agree, taken from the file name or the image id. In
    one folder, several cameras may number their photos alike: if neither name has COCO's prefix,
    such as "COCO_train2014_", and both files exist, the bytes must agree too. Photos without a
    COCO id are the same if their file names agree and, if both files exist, their bytes agree too.
    """
    leaks = []
    for label, protected in _protected_sets(training, evaluation):
        for row, each in enumerate(training):
            use = photo_uses(each.dataset)
            trained = (image for image in each.dataset.images if use.get(image.image_id) == TRAIN)
            found = [image for image in trained if protected.contains(image, each)]
            if found:
                ids = tuple(image.image_id for image in found)
                names = tuple(image.file_name for image in found)
                leaks.append(Leak(label, row, each.source.label, ids, names))
    return leaks


def excluded_ids(leaks: Iterable[Leak]) -> Mapping[int, frozenset[str]]:
    """Map the index of each training set to the image ids that must not be trained on."""
    rows: dict[int, set[str]] = defaultdict(set)
    for leak in leaks:
        rows[leak.training].update(leak.image_ids)
    # The keys are indexes, because two sources may have the same label.
    return {row: frozenset(ids) for row, ids in rows.items()}


def training_sources(
    config: DataConfig, *, masks: bool = False
) -> list[tuple[SourceDataset, frozenset[str]]]:
    """Read the sources of a run, each with the ids of its photos that must not be trained on.

    Args:
        config: settings of the run.
        masks: read masks too.

    Raises:
        DataError: a file is malformed, or a photo of an evaluation set would be trained on and
            `exclude_evaluation` is not set.
    """
    training = read_sources(config.data, masks=masks)
    leaks = find_leaks(training, read_sources(config.evaluation))
    if leaks and not config.exclude_evaluation:
        raise DataError("\n".join([*map(str, leaks), REMEDY]))
    for leak in leaks:
        logger.warning("%s; they are excluded from training", leak)
    rows = excluded_ids(leaks)
    return [(each, rows.get(row, frozenset())) for row, each in enumerate(training)]


def training_photos(config: DataConfig, *, masks: bool = False) -> list[TrainPhoto]:
    """Read all photos that a run uses, except those that it will be evaluated on.

    Args:
        config: settings of the run.
        masks: read masks too.

    Raises:
        DataError: as `training_sources`; or a source has nothing to train on.
    """
    return [
        photo
        for each, excluded in training_sources(config, masks=masks)
        for photo in build_photos(each.source, each.dataset, excluded)
    ]


REMEDY = (
    "figures measured on training photos are meaningless: remove these photos from the data, "
    "or set exclude_evaluation: true to exclude them from training"
)


def abbreviate(names: Sequence[str]) -> str:
    """Join the first few names, and say how many more there are."""
    more = f" and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
    return ", ".join(names[:MAX_NAMES_SHOWN]) + more


class _PhotoIndex:
    """The photos of one evaluation set, indexed by COCO id and by base name."""

    def __init__(self, where: SourceDataset, images: Iterable[ReferringImage]) -> None:
        self._where = where
        self._numbered: dict[int, list[ReferringImage]] = defaultdict(list)
        self._named: dict[str, list[ReferringImage]] = defaultdict(list)
        for image in images:
            numbers = _coco_numbers(image)
            for number in numbers:
                self._numbered[number].append(image)
            if not numbers:
                # By the name without its folder: another data set may keep the same file elsewhere.
                self._named[where.path_of(image).name].append(image)

    def contains(self, image: ReferringImage, where: SourceDataset) -> bool:
        """Return whether a photo of another set is one of these."""
        path, numbers = where.path_of(image), _coco_numbers(image)
        if not numbers:
            return any(
                _same_file(
                    path,
                    self._where.path_of(other),
                    if_missing=image.file_name == other.file_name,
                )
                for other in self._named.get(path.name, ())
            )
        # The names are not compared: another data set may list the COCO photo under another name.
        return any(
            _has_coco_prefix(image)
            or _has_coco_prefix(other)
            or where.folder.resolve() != self._where.folder.resolve()
            # Without the files, the numbers alone have to count: a photo that is excluded for
            # nothing does less harm than one that is trained on.
            or _same_file(path, self._where.path_of(other), if_missing=True)
            for number in numbers
            for other in self._numbered.get(number, ())
        )


def _protected_sets(
    training: Sequence[SourceDataset], evaluation: Sequence[SourceDataset]
) -> Iterator[tuple[str, _PhotoIndex]]:
    """Yield the evaluation sets, and the held-out photos of the training sets.

    A photo that one source holds out may be among the training photos of another source.
    """
    for each in evaluation:
        yield each.source.label, _PhotoIndex(each, each.dataset.images)
    for each in training:
        use = photo_uses(each.dataset)
        held_out = [i for i in each.dataset.images if use.get(i.image_id) == VAL]
        if held_out:
            yield f"{each.source.label} [{VAL}]", _PhotoIndex(each, held_out)


def _coco_numbers(image: ReferringImage) -> set[int]:
    found = (coco_number(image.file_name), coco_number(image.image_id))
    return {number for number in found if number is not None}


def _has_coco_prefix(image: ReferringImage) -> bool:
    found = (_COCO_NAME.fullmatch(name) for name in (image.file_name, image.image_id))
    return any(match and match[1] for match in found)


def _same_file(one: Path, other: Path, *, if_missing: bool) -> bool:
    """Return whether two files have the same content; `if_missing` if one does not exist."""
    # Different data sets often use the same names, such as 1.jpg, so a name alone proves little.
    if one == other:
        return True
    if one.is_file() and other.is_file():
        return filecmp.cmp(one, other, shallow=False)
    return if_missing

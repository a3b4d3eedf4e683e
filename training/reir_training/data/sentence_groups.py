"""What learning without boxes sees: photos, and sentences about them in groups.

The sentences of a group describe the same instance. Nothing here depends on a box, neither its
values nor whether it exists, except the held-out photos that a run is validated on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from reir.datasets.dataset import Expression, ReferringDataset
from reir.errors import DataError
from reir_training.config import DataConfig, DataSource
from reir_training.data.examples import (
    VAL,
    TrainPhoto,
    annotated_photos,
    read_dataset,
    used_photos,
)
from reir_training.data.leakage import training_sources

KNOWN_BY_BOX = ("sorec", "sentences")
"""Formats that tell instances apart by their boxes, so that sentences cannot be grouped without."""


@dataclass(frozen=True)
class PhotoSentences:
    """A photo and its sentences, without boxes.

    Attributes:
        path: image file.
        split: "train" or "val".
        groups: the sentences of each described instance; a sentence whose instance is unknown is a
            group of its own.
        size_px: annotated width and height of the photo.
        image_id: id of the photo in its source.
        gallery: as in `TrainPhoto`.
    """

    path: Path
    split: str
    groups: tuple[tuple[str, ...], ...]
    size_px: tuple[int, int]
    image_id: str
    gallery: str


def sentence_groups(source: DataSource) -> list[PhotoSentences]:
    """Read the photos of a source that a run uses and that have sentences.

    Raises:
        DataError: a file is malformed, there is no such split, or there are no sentences.
    """
    return _grouped(source, read_dataset(source))


def held_out_photos(source: DataSource) -> list[TrainPhoto]:
    """Read the photos of the split "val" that have expressions with boxes; often there are none.

    Raises:
        DataError: a file is malformed, or there is no such split.
    """
    return _held_out(source, read_dataset(source))


def read_run_sentences(config: DataConfig) -> tuple[list[PhotoSentences], list[TrainPhoto]]:
    """Read what a run learns from, without photos of evaluation sets, and `held_out_photos`.

    Raises:
        DataError: as `training_sources`; or a source has no sentences, or none to train on.
    """
    train: list[PhotoSentences] = []
    held_out: list[TrainPhoto] = []
    for each, excluded in training_sources(config):
        grouped = _grouped(each.source, each.dataset, excluded)
        train += [photo for photo in grouped if photo.split != VAL]
        held_out += _held_out(each.source, each.dataset, excluded)
    if not train:
        labels = ", ".join(source.label for source in config.data)
        raise DataError(f"{labels}: all photos with sentences are held out; none is left to learn")
    return train, held_out


def _grouped(
    source: DataSource, dataset: ReferringDataset, without: frozenset[str] = frozenset()
) -> list[PhotoSentences]:
    photos = [
        PhotoSentences(
            path=photo.path,
            split=photo.split,
            groups=tuple(_groups(photo.expressions, by_instance=source.format not in KNOWN_BY_BOX)),
            size_px=(photo.image.width_px, photo.image.height_px),
            image_id=photo.image.image_id,
            gallery=photo.gallery,
        )
        for photo in used_photos(source, dataset, without)
        if photo.expressions
    ]
    if not photos:
        excluded = f"; {len(without)} photos of evaluation sets are excluded" if without else ""
        raise DataError(f"{source.label} ({source.format}) has no sentence to learn from{excluded}")
    return photos


def _groups(expressions: Iterable[Expression], *, by_instance: bool) -> Iterator[tuple[str, ...]]:
    """Yield the sentences of each instance, in the order of their first ones."""
    groups: dict[tuple[str, str | None], list[str]] = {}
    for text in expressions:
        known = by_instance and text.instance_id is not None
        # The first part keeps an instance apart from a sentence that happens to have the same id.
        key = ("instance", text.instance_id) if known else ("sentence", text.expression_id)
        groups.setdefault(key, []).append(text.text)
    yield from map(tuple, groups.values())


def _held_out(
    source: DataSource, dataset: ReferringDataset, without: frozenset[str] = frozenset()
) -> list[TrainPhoto]:
    held_out = [each for each in used_photos(source, dataset, without) if each.split == VAL]
    photos = annotated_photos(source, dataset, held_out)
    return [photo for photo in photos if photo.expressions]

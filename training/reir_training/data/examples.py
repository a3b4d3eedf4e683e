"""The annotated photos of a run, independent of the format that they were read from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from reir.datasets.coco import read_coco_captions
from reir.datasets.coco_classes import COCO_CLASSES
from reir.datasets.dataset import (
    Expression,
    ReferringDataset,
    ReferringImage,
    ReferringInstance,
)
from reir.datasets.look_alikes import read_look_alikes
from reir.datasets.photos import read_caption_pairs
from reir.datasets.readers import IN_FOLDERS, read_as
from reir.errors import DataError
from reir.records import FloatArray, MaskRle
from reir_training.config import DataSource

UNKNOWN_CLASS = -1
_CLASS_NUMBERS = {name: i for i, name in enumerate(COCO_CLASSES)}
TRAIN, VAL, TEST = "train", "val", "test"


@dataclass(frozen=True)
class TrainExpression:
    """A written expression, and the row of the box in `TrainPhoto.boxes` that it describes."""

    text: str
    box: int
    kind: str


@dataclass(frozen=True)
class TrainPhoto:
    """A photo with all of its annotations.

    Attributes:
        path: image file.
        split: "train" or "val".
        boxes: (N, 4) xyxy in [0, 1], without crowds.
        categories: (N,) index into `COCO_CLASSES`; -1 for other classes.
        names: N class names.
        expressions: written referring expressions.
        captions: captions of the whole photo.
        near_misses: captions with one wrong word.
        crowded: classes that have a crowd annotation.
        is_wide: whether the photo is wider than high.
        size_px: annotated width and height of the photo; 1 x 1 if they do not matter.
        gallery: name of the set of photos within which an expression describes only one instance,
            which is the smallest split of the data set that contains the photo.
        masks: N masks, None for instances without one; empty if masks were not read, or if no
            instance has one.
        look_alikes: paths of the photos with instances that are easily confused with one of this
            photo, in text form.
    """

    path: Path
    split: str
    boxes: FloatArray
    categories: np.ndarray
    names: tuple[str, ...]
    expressions: tuple[TrainExpression, ...]
    captions: tuple[str, ...] = ()
    near_misses: tuple[str, ...] = ()
    crowded: frozenset[str] = frozenset()
    is_wide: bool = False
    size_px: tuple[int, int] = (1, 1)
    gallery: str = ""
    masks: tuple[MaskRle | None, ...] = ()
    look_alikes: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class UsedPhoto:
    """A photo that a run uses, and what is written about it.

    Attributes:
        image: its annotation.
        path: image file.
        split: "train" or "val".
        gallery: see `TrainPhoto`.
        expressions: those of this split; none if the source is for detection only.
    """

    image: ReferringImage
    path: Path
    split: str
    gallery: str
    expressions: tuple[Expression, ...]


def count_annotations(
    train: Iterable[TrainPhoto], held_out: Sequence[TrainPhoto]
) -> dict[str, int]:
    """Count the photos, boxes, expressions and captions to train on, and the held-out photos."""
    counts = np.array(
        [(1, len(p.boxes), len(p.expressions), len(p.captions)) for p in train], dtype=np.int64
    ).reshape(-1, 4)
    names = ("photos", "boxes", "expressions", "captions")
    totals = dict(zip(names, counts.sum(axis=0).tolist(), strict=True))
    return {**totals, "held_out_photos": len(held_out)}


def split_held_out(photos: Sequence[TrainPhoto]) -> tuple[list[TrainPhoto], list[TrainPhoto]]:
    """Split photos into the training photos and the held-out photos."""
    return [p for p in photos if p.split != VAL], [p for p in photos if p.split == VAL]


def read_dataset(source: DataSource, *, masks: bool = False) -> ReferringDataset:
    """Read the annotations of a source, or of one of its splits if the source names a split.

    Args:
        source: data source.
        masks: also read masks, if the format has them.

    Raises:
        DataError: a file is malformed, or there is no such split.
    """
    path = source.path if source.format in IN_FOLDERS else source.path / source.file
    photos = source.path / source.images
    dataset = read_as(source.format, path, source.split_by, images_dir=photos, masks=masks)
    if source.split:
        dataset = dataset.split(source.split)
    if source.held_out:
        dataset = hold_out(dataset, source.held_out)
    return set_test_photos_aside(dataset, source.test) if source.test else dataset


def set_test_photos_aside(dataset: ReferringDataset, num: int) -> ReferringDataset:
    """Move `num` photos from the split "train" to the split "test", chosen by a hash of their ids.

    Raises:
        DataError: there is no split "train" with more photos, or there is a split "test" already.
    """
    train = dataset.splits.get(TRAIN, frozenset())
    if TEST in dataset.splits or num >= len(train):
        raise DataError(
            f"{dataset.source}: test={num} needs a split train of more photos (it has "
            f"{len(train)}) and no split test; remove it or use a lower number"
        )
    ids = _by_hash(train)
    test = frozenset(ids[:num])
    return replace(dataset, splits={**dataset.splits, TEST: test, TRAIN: train - test})


def _by_hash(image_ids: Iterable[str]) -> list[str]:
    """Order photos by a hash: independent of the order of the file, and without a pattern."""
    return sorted(image_ids, key=lambda each: sha256(each.encode()).digest())


def hold_out(dataset: ReferringDataset, num: int) -> ReferringDataset:
    """Turn `num` photos into the split "val", chosen by a hash of their ids.

    So every run chooses the same photos.

    Raises:
        DataError: no photo would be left to train on, or the data set already has splits, in
            which case the photos of its test splits would be trained on.
    """
    if dataset.splits:
        raise DataError(
            f"{dataset.source}: held_out={num} cannot be used with a data set that has splits, "
            f"{sorted(dataset.splits)}; choose one of them with `split`, or remove held_out"
        )
    ids = _by_hash(dataset.images_by_id)
    if num >= len(ids):
        raise DataError(
            f"{dataset.source}: held_out={num} of {len(ids)} photos leaves none to train on; use "
            f"a lower number"
        )
    return replace(dataset, splits={VAL: frozenset(ids[:num]), TRAIN: frozenset(ids[num:])})


def photo_uses(dataset: ReferringDataset) -> dict[str, str]:
    """Map the image id of each photo that a run uses to "train" or "val".

    Photos of a split "val" are held out, even if they are in "train" too. If there is a split
    "train", only its other photos are trained on, and those of "test" and similar splits are
    unused. Otherwise all remaining photos are trained on.
    """
    # Validation wins: a photo that is in both splits must not be trained on.
    held_out = dataset.splits.get(VAL, frozenset())
    trained = dataset.splits.get(TRAIN, dataset.images_by_id.keys())
    return {
        image.image_id: VAL if image.image_id in held_out else TRAIN
        for image in dataset.images
        if image.image_id in held_out or image.image_id in trained
    }


def used_photos(
    source: DataSource, dataset: ReferringDataset, without: frozenset[str] = frozenset()
) -> Iterator[UsedPhoto]:
    """Yield the photos of a source that a run uses, except those with the ids `without`."""
    expressions: dict[str, list[Expression]] = defaultdict(list)
    for expression in dataset.expressions:
        expressions[expression.image_id].append(expression)
    splits = sorted(dataset.splits, key=lambda name: -len(dataset.splits[name]))
    # A photo may be in several splits; the last one, which is the smallest, wins.
    gallery_of = {each: name for name in splits for each in dataset.splits[name]}
    for image_id, use in photo_uses(dataset).items():
        if image_id in without:
            continue
        image = dataset.images_by_id[image_id]
        # RefCOCOg "google" splits the expressions, not the photos.
        described = (e for e in expressions[image_id] if e.split in (None, use))
        yield UsedPhoto(
            image=image,
            path=source.path / source.images / image.file_name,
            split=use,
            gallery=f"{source.path}:{gallery_of.get(image_id, '')}",
            expressions=tuple(described) if source.task != "detection" else (),
        )


def build_photos(
    source: DataSource, dataset: ReferringDataset, without: frozenset[str] = frozenset()
) -> list[TrainPhoto]:
    """Return the photos of a source that a run uses.

    Args:
        source: data source that `dataset` was read from.
        dataset: its annotations.
        without: image ids to exclude.

    Raises:
        DataError: the source has nothing to train on.
    """
    photos = annotated_photos(source, dataset, used_photos(source, dataset, without))
    # A photo without annotations has no targets, and would only take a place in a batch.
    useful = [p for p in photos if p.expressions or p.captions or len(p.boxes)]
    if not useful:
        excluded = f"; {len(without)} photos of evaluation sets are excluded" if without else ""
        raise DataError(
            f"{source.path} ({source.format}) has no annotated photo to train on{excluded}; "
            f"annotate photos of it, or remove it from `data`"
        )
    return useful


def annotated_photos(
    source: DataSource, dataset: ReferringDataset, photos: Iterable[UsedPhoto]
) -> Iterator[TrainPhoto]:
    """Yield photos of a source with their boxes, expressions, captions and look-alikes."""
    captions, near_misses = read_captions(source.path), read_near_misses(source.path)
    look_alikes, images_dir = read_look_alikes(source.path), source.path / source.images
    instances: dict[str, list[ReferringInstance]] = defaultdict(list)
    for instance in dataset.instances:
        instances[instance.image_id].append(instance)
    for photo in photos:
        image_id = photo.image.image_id
        yield replace(
            _annotated_photo(photo, instances[image_id], source.task),
            captions=tuple(captions[image_id]),
            near_misses=tuple(near_misses[image_id]),
            look_alikes=frozenset(
                str(images_dir / name) for name in look_alikes.get(photo.image.file_name, ())
            ),
        )


def read_captions(folder: Path) -> dict[str, list[str]]:
    """Map image ids to captions, if the folder has a captions.json.

    Raises:
        DataError: the file is malformed.
    """
    found: dict[str, list[str]] = defaultdict(list)
    if (folder / "captions.json").is_file():
        for caption in read_coco_captions(folder / "captions.json"):
            found[caption.image_id].append(caption.text.strip())
    return found


def read_near_misses(folder: Path) -> dict[str, list[str]]:
    """Map image ids to captions with one wrong word, if the folder has such captions.

    Raises:
        DataError: the file is malformed.
    """
    found: dict[str, list[str]] = defaultdict(list)
    if (folder / "sugarcrepe_pairs.json").is_file():
        for pair in read_caption_pairs(folder / "sugarcrepe_pairs.json"):
            found[pair.image_id].append(pair.negative_caption.strip())
    return found


def _annotated_photo(
    photo: UsedPhoto, instances: Iterable[ReferringInstance], task: str
) -> TrainPhoto:
    """Return a photo with its boxes and expressions, ignoring crowds and empty boxes.

    With the task "grounding", all classes are unknown, so that detection does not use the photo.
    """
    image = photo.image
    # The annotated size, which is that of the boxes, and not the size of the file.
    size = np.array([image.width_px, image.height_px] * 2, dtype=np.float32)
    rows: dict[str, int] = {}
    boxes: list[np.ndarray] = []
    names: list[str] = []
    masks: list[MaskRle | None] = []
    crowded: set[str] = set()
    for instance in instances:
        box = np.clip(np.asarray(instance.box_xyxy_px, dtype=np.float32) / size, 0, 1)
        # A crowd is not one instance, so it is no target. But its class is remembered, because a
        # generated expression about that class could mean one of the crowd.
        if instance.is_crowd:
            crowded.add(instance.category or "")
        elif (box[2:] > box[:2]).all():
            rows[instance.instance_id] = len(boxes)
            boxes.append(box)
            names.append(instance.category or "")
            masks.append(instance.mask)
    known = {} if task == "grounding" else _CLASS_NUMBERS
    return TrainPhoto(
        path=photo.path,
        split=photo.split,
        boxes=np.asarray(boxes, dtype=np.float32).reshape(-1, 4),
        categories=np.array([known.get(n, UNKNOWN_CLASS) for n in names], dtype=np.int64),
        names=tuple(names),
        expressions=tuple(
            # Most formats name no kind. "long" gives full weight in the losses across photos.
            TrainExpression(e.text, rows[e.instance_id], e.kind or "long")
            for e in photo.expressions
            if e.instance_id in rows
        ),
        crowded=frozenset(crowded),
        is_wide=image.width_px > image.height_px,
        size_px=(image.width_px, image.height_px),
        gallery=photo.gallery,
        masks=tuple(masks) if any(masks) else (),
    )

"""Annotated photos as training sees them, whatever format they were read from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from reir.datasets.coco import read_coco_captions, read_coco_instances
from reir.datasets.coco_classes import COCO_CLASSES
from reir.datasets.photos import read_caption_pairs, read_photos
from reir.datasets.records import Expression, ReferringImage, ReferringInstance
from reir.datasets.reircoco import read_reircoco
from reir.errors import DataError
from reir.records import FloatArray
from reir_training.config import DataSource

UNKNOWN_CLASS = -1
VAL = "val"


@dataclass(frozen=True)
class Written:
    """One written expression and the box it describes, as row of `TrainPhoto.boxes`."""

    text: str
    box: int
    kind: str


@dataclass(frozen=True)
class TrainPhoto:
    """One photo with everything that is annotated on it.

    Attributes:
        path: of the file.
        split: "train" or "val".
        boxes: (N, 4) xyxy in [0, 1], crowds left out.
        categories: (N,) index into `COCO_CLASSES`, -1 for other classes.
        names: N class names.
        expressions: written ones.
        captions: of the whole photo.
        near_misses: captions that are wrong by one word.
        crowded: classes with a crowd annotation.
        is_wide: wider than high.
    """

    path: Path
    split: str
    boxes: FloatArray
    categories: np.ndarray
    names: tuple[str, ...]
    expressions: tuple[Written, ...]
    captions: tuple[str, ...] = ()
    near_misses: tuple[str, ...] = ()
    crowded: frozenset[str] = frozenset()
    is_wide: bool = False


def read_source(source: DataSource) -> list[TrainPhoto]:
    """Read one source.

    Raises:
        DataError: a file is malformed, or nothing in it can be trained on.
    """
    if source.format == "photos":
        dataset = read_photos(source.path)
    elif source.format == "coco":
        dataset = read_coco_instances(source.path / "instances.json")
    else:
        dataset = read_reircoco(source.path / source.annotations)
    captions, near_misses = _captions(source.path), _near_misses(source.path)
    instances: dict[str, list[ReferringInstance]] = defaultdict(list)
    expressions: dict[str, list[Expression]] = defaultdict(list)
    for instance in dataset.instances:
        instances[instance.image_id].append(instance)
    for expression in dataset.expressions:
        expressions[expression.image_id].append(expression)
    held_out = dataset.splits.get(VAL, frozenset())
    photos = []
    for image in dataset.images:
        boxed = _boxed(image, instances[image.image_id], expressions[image.image_id])
        photos.append(
            replace(
                boxed,
                path=source.path / source.images / image.file_name,
                split=VAL if image.image_id in held_out else "train",
                captions=tuple(captions[image.image_id]),
                near_misses=tuple(near_misses[image.image_id]),
            )
        )
    useful = [p for p in photos if p.expressions or p.captions or len(p.boxes)]
    if not useful:
        raise DataError(f"{source.path} ({source.format}) holds no annotated photo to train on")
    return useful


def _captions(folder: Path) -> dict[str, list[str]]:
    """Captions of each photo, where the folder has them."""
    found: dict[str, list[str]] = defaultdict(list)
    if (folder / "captions.json").is_file():
        for caption in read_coco_captions(folder / "captions.json"):
            found[caption.image_id].append(caption.text.strip())
    return found


def _near_misses(folder: Path) -> dict[str, list[str]]:
    """Captions that are wrong by one word, where the folder has them."""
    found: dict[str, list[str]] = defaultdict(list)
    if (folder / "sugarcrepe_pairs.json").is_file():
        for pair in read_caption_pairs(folder / "sugarcrepe_pairs.json"):
            found[pair.image_id].append(pair.negative_caption.strip())
    return found


def _boxed(
    image: ReferringImage,
    instances: Iterable[ReferringInstance],
    expressions: Iterable[Expression],
) -> TrainPhoto:
    """Boxes and expressions of a photo; those of crowds and of boxes without area are left out."""
    size = np.array([image.width_px, image.height_px] * 2, dtype=np.float32)
    rows: dict[str, int] = {}
    boxes: list[np.ndarray] = []
    names: list[str] = []
    crowded: set[str] = set()
    for instance in instances:
        box = np.clip(np.asarray(instance.box_xyxy_px, dtype=np.float32) / size, 0, 1)
        if instance.is_crowd:
            crowded.add(instance.category or "")
        elif (box[2:] > box[:2]).all():
            rows[instance.instance_id] = len(boxes)
            boxes.append(box)
            names.append(instance.category or "")
    known = {name: i for i, name in enumerate(COCO_CLASSES)}
    return TrainPhoto(
        path=Path(image.file_name),
        split="train",
        boxes=np.asarray(boxes, dtype=np.float32).reshape(-1, 4),
        categories=np.array([known.get(n, UNKNOWN_CLASS) for n in names], dtype=np.int64),
        names=tuple(names),
        expressions=tuple(
            Written(e.text, rows[e.instance_id], e.kind or "long")
            for e in expressions
            if e.instance_id in rows
        ),
        crowded=frozenset(crowded),
        is_wide=image.width_px > image.height_px,
    )

"""Reads and writes the published JSON format of REIRCOCO.

The file has COCO's layout, with one entry in `images` for each described instance: `{id, file_name,
width, height, expressions: [...]}`. The box of the instance is in `annotations`. Entries with the
same `file_name` are one photo of the gallery. Entries without expressions are photos of the
gallery, too.

An annotation whose box a model found also has a `score` in [0, 1]. It is not part of the published
format, whose other readers ignore it.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reir.datasets.coco import image_of, mask_of
from reir.datasets.dataset import Expression, ReferringDataset, ReferringImage, ReferringInstance
from reir.datasets.json_entries import Entry, read_object
from reir.errors import DataError

logger = logging.getLogger(__name__)

_NO_CLASS = "object"


def read_reircoco(path: str | Path, *, masks: bool = False) -> ReferringDataset:
    """Read an annotation file as published.

    The image ids of the dataset are the file names. If an entry with expressions has several
    annotations, the last one is the target, as in the published loader; the others become instances
    without expressions.

    Args:
        path: path of the file.
        masks: also read masks.

    Raises:
        DataError: the file is malformed; the message names file, entry and what was expected.
    """
    document = read_object(path)
    categories = _categories(document)
    annotations = _annotations_by_entry(document)
    photos: dict[str, ReferringImage] = {}
    instances: list[ReferringInstance] = []
    expressions: list[Expression] = []
    entry_ids: set[str] = set()
    num_ambiguous = 0
    for entry in document.entries("images"):
        photo = _photo(entry, photos)
        entry_id = entry.identifier("id")
        if entry_id in entry_ids:
            entry.fail("id", "an id that no earlier entry has")
        entry_ids.add(entry_id)
        # Taken out, so that annotations without an entry remain at the end.
        boxes = annotations.pop(entry_id, [])
        found = [_instance(box, photo, categories, masks) for box in boxes]
        texts = entry.texts("expressions")
        if texts and not found:
            entry.fail("id", "an annotation with this image_id, since it has expressions")
        num_ambiguous += bool(texts) and len(found) > 1
        instances += found
        expressions += _expressions(entry, photo, texts, found)
    for strays in annotations.values():
        strays[0].fail("image_id", "the id of an entry of images")
    if num_ambiguous:
        logger.warning(
            "%s: %d entries have several annotations; the last one is used as the target",
            path,
            num_ambiguous,
        )
    return ReferringDataset(
        source=str(path),
        images=tuple(photos.values()),
        instances=tuple(instances),
        expressions=tuple(expressions),
    )


def write_reircoco(
    dataset: ReferringDataset, path: str | Path, *, every_instance: bool = False
) -> None:
    """Write a dataset in the published format.

    It stores photos, described instances and their expressions, but no kinds of expressions and no
    splits.

    Args:
        dataset: photos, instances and expressions.
        path: file to write.
        every_instance: also store the other instances, as entries without expressions.

    Raises:
        DataError: an expression has no instance, which the format cannot express.
    """
    texts: dict[str, list[str]] = defaultdict(list)
    for expression in dataset.expressions:
        if expression.instance_id is None:
            raise DataError(
                f"{dataset.source}: expression {expression.expression_id!r} has no instance, "
                f"which REIRCOCO's format requires; remove such expressions with with_targets()"
            )
        texts[expression.instance_id].append(expression.text)
    written = dataset.instances_by_id if every_instance else texts
    referred = [dataset.instances_by_id[instance_id] for instance_id in written]
    # Annotations refer to a category by number, so there must be at least one.
    names = sorted({instance.category or _NO_CLASS for instance in referred}) or [_NO_CLASS]
    images, annotations = [], []
    for number, instance in enumerate(referred, start=1):
        photo = dataset.images_by_id[instance.image_id]
        category_id = 1 + names.index(instance.category or _NO_CLASS)
        images.append(_photo_json(number, photo, texts.get(instance.instance_id, [])))
        annotations.append(_annotation_json(number, instance, category_id))
    shown = {instance.image_id for instance in referred}
    # Photos without described instances make the gallery larger, so they are entries as well.
    bare = (photo for photo in dataset.images if photo.image_id not in shown)
    for number, photo in enumerate(bare, start=len(referred) + 1):
        images.append(_photo_json(number, photo, []))
    document = {
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": number, "name": name, "supercategory": _NO_CLASS}
            for number, name in enumerate(names, start=1)
        ],
    }
    Path(path).write_text(json.dumps(document), encoding="utf-8")


def _categories(document: Entry) -> dict[str, str]:
    entries = document.entries("categories") if document.has("categories") else []
    return {entry.identifier("id"): entry.text("name") for entry in entries}


def _annotations_by_entry(document: Entry) -> dict[str, list[Entry]]:
    grouped: dict[str, list[Entry]] = defaultdict(list)
    for annotation in document.entries("annotations"):
        grouped[annotation.identifier("image_id")].append(annotation)
    return grouped


def _photo(entry: Entry, photos: dict[str, ReferringImage]) -> ReferringImage:
    """Return the photo of an entry; all entries with the same file name have the same photo."""
    # An id belongs to an entry, of which a photo has one per instance. Only the file name
    # identifies the photo.
    stated = image_of(entry)
    photo = ReferringImage(
        image_id=stated.file_name,
        file_name=stated.file_name,
        width_px=stated.width_px,
        height_px=stated.height_px,
    )
    known = photos.setdefault(photo.file_name, photo)
    if known != photo:
        entry.fail(
            "file_name",
            f"{known.width_px} x {known.height_px} px as in the earlier entry of this file, "
            f"not {photo.width_px} x {photo.height_px} px",
        )
    return known


def _instance(
    entry: Entry, photo: ReferringImage, categories: dict[str, str], masks: bool
) -> ReferringInstance:
    # The published fields of an annotation are image_id and bbox; the others may be missing.
    category = categories.get(entry.identifier("category_id")) if entry.has("category_id") else None
    return ReferringInstance(
        instance_id=entry.identifier("id") if entry.has("id") else entry.where,
        image_id=photo.image_id,
        box_xyxy_px=entry.box("bbox"),
        category=category,
        is_crowd=entry.flag("iscrowd"),
        mask=mask_of(entry, photo) if masks else None,
        score=entry.share("score") if entry.has("score") else None,
    )


def _expressions(
    entry: Entry, photo: ReferringImage, texts: list[str], found: list[ReferringInstance]
) -> Iterator[Expression]:
    for number, text in enumerate(texts):
        yield Expression(
            expression_id=f"{entry.identifier('id')}/{number}",
            image_id=photo.image_id,
            instance_id=found[-1].instance_id,
            text=text,
        )


def _photo_json(number: int, photo: ReferringImage, expressions: list[str]) -> dict[str, Any]:
    return {
        "id": number,
        "file_name": photo.file_name,
        "width": photo.width_px,
        "height": photo.height_px,
        "expressions": expressions,
    }


def _annotation_json(number: int, instance: ReferringInstance, category_id: int) -> dict[str, Any]:
    x1, y1, x2, y2 = instance.box_xyxy_px
    return {
        "id": number,
        "image_id": number,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": (x2 - x1) * (y2 - y1),
        "iscrowd": int(instance.is_crowd),
        "category_id": category_id,
        **({} if instance.mask is None else {"segmentation": asdict(instance.mask)}),
        **({} if instance.score is None else {"score": round(instance.score, 4)}),
    }

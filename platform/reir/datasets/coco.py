"""Reads COCO's JSON files: `instances_*.json` (boxes, classes, masks) and `captions_*.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from reir.datasets.dataset import ReferringDataset, ReferringImage, ReferringInstance
from reir.datasets.json_entries import Entry, read_object
from reir.records import MaskRle


@dataclass(frozen=True, slots=True, kw_only=True)
class Caption:
    """One sentence about a whole photo."""

    caption_id: str
    image_id: str
    text: str


def read_coco_instances(path: str | Path, *, masks: bool = False) -> ReferringDataset:
    """Read an instances file: a dataset without expressions.

    Crowd boxes are included and marked. The few boxes without area are included, too.

    Args:
        path: path of the file.
        masks: also read segmentations, which takes about 0.1 ms for each.

    Raises:
        DataError: the file is malformed; the message names file, entry and what was expected.
    """
    document = read_object(path)
    names = {item.identifier("id"): item.text("name") for item in document.entries("categories")}
    images = tuple(map(image_of, document.entries("images")))
    # A polygon can only be turned into a mask if the size of its photo is known.
    masked = {image.image_id: image for image in images} if masks else {}
    return ReferringDataset(
        source=str(path),
        images=images,
        instances=tuple(_instance(item, names, masked) for item in document.entries("annotations")),
        expressions=(),
    )


def read_coco_captions(path: str | Path) -> tuple[Caption, ...]:
    """Read a captions file.

    Raises:
        DataError: the file is malformed; the message names file, entry and what was expected.
    """
    return tuple(
        Caption(
            caption_id=item.identifier("id"),
            image_id=item.identifier("image_id"),
            text=item.text("caption"),
        )
        for item in read_object(path).entries("annotations")
    )


def read_coco_images(path: str | Path) -> ReferringDataset:
    """Read only the list of photos of a COCO file.

    Raises:
        DataError: the file is malformed; the message names file, entry and what was expected.
    """
    images = tuple(map(image_of, read_object(path).entries("images")))
    return ReferringDataset(source=str(path), images=images, instances=(), expressions=())


def image_of(entry: Entry) -> ReferringImage:
    """Return one `images` entry of a COCO-style file.

    Raises:
        DataError: a field is missing or malformed.
    """
    return ReferringImage(
        image_id=entry.identifier("id"),
        file_name=entry.text("file_name"),
        width_px=entry.pixels("width"),
        height_px=entry.pixels("height"),
    )


def mask_of(entry: Entry, image: ReferringImage | None) -> MaskRle | None:
    """Return the mask of one `annotations` entry of a COCO-style file.

    Args:
        entry: the entry.
        image: the photo that the annotation is in; without it, the mask is None.

    Raises:
        DataError: the segmentation is malformed.
    """
    if image is None:
        return None
    return entry.mask("segmentation", image.height_px, image.width_px)


def _instance(
    entry: Entry, names: Mapping[str, str], masked: Mapping[str, ReferringImage]
) -> ReferringInstance:
    category_id = entry.identifier("category_id")
    if category_id not in names:
        entry.fail("category_id", "the id of one of the file's categories")
    image_id = entry.identifier("image_id")
    return ReferringInstance(
        instance_id=entry.identifier("id"),
        image_id=image_id,
        box_xyxy_px=entry.box("bbox"),
        category=names[category_id],
        is_crowd=entry.flag("iscrowd"),
        # An unknown photo gives no mask here; `ReferringDataset` refuses the photo with a message
        # that names it.
        mask=mask_of(entry, masked.get(image_id)),
    )

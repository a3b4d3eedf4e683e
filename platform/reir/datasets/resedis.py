"""Reads ReSeDis as published: a folder with one JSON file for each expression.

A file has the keys `image_id` (the number of a COCO photo), `expression`, `category` and
`target_annotation`: name -> segmentation of one described instance, as polygons or runs. Files with
the same expression are one query, which may then have several true photos. Case, white space and
invisible characters make no difference.

The files state neither names nor sizes of photos. Both come from the photos themselves, in one of
the folders that COCO has: `train2014`, `val2014`, `train2017` or `val2017`. So these must have the
size that they were annotated at.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from reir.datasets.dataset import Expression, ReferringDataset, ReferringImage, ReferringInstance
from reir.datasets.json_entries import Entry, read_object
from reir.datasets.photo_sizes import measured_photo
from reir.errors import DataError
from reir.images.rle import box_px
from reir.records import MaskRle
from reir.text import normalize_expression

logger = logging.getLogger(__name__)

PHOTO_FOLDERS = (".", "train2014", "val2014", "train2017", "val2017")
PHOTO_NAMES = ("{:012}.jpg", "COCO_train2014_{:012}.jpg", "COCO_val2014_{:012}.jpg")
_MAX_DIGITS = 12


def read_resedis(
    folder: str | Path, images_dir: str | Path, *, masks: bool = False
) -> ReferringDataset:
    """Read the expressions of a folder, and the sizes of their photos.

    A target that an earlier file has for the same expression, pixel by pixel, is left out and
    counted in a warning.

    Args:
        folder: folder of the JSON files.
        images_dir: folder of the photos, or the folder that contains COCO's folders of photos.
        masks: also keep the masks; without them, only their boxes are kept.

    Raises:
        DataError: a file is malformed or its photo is missing; the message names file and key.
    """
    # Sorted, because `glob` has no fixed order, and of equal targets the first one is kept.
    paths = sorted(Path(folder).glob("*.json"))
    if not paths:
        raise DataError(
            f"{folder} contains no .json file; give the folder with one file for each expression"
        )
    photos = _Photos(Path(images_dir))
    instances: dict[tuple[str, str, MaskRle], ReferringInstance] = {}
    expressions: list[Expression] = []
    num_repeated = 0
    for path in paths:
        entry = read_object(path)
        photo = photos.of(entry)
        text, query_id = _sentence(entry)
        for instance in _instances(entry, photo, path.stem):
            assert instance.mask is not None
            known = (query_id, photo.image_id, instance.mask)
            if known in instances:
                num_repeated += 1
                continue
            instances[known] = instance
            expressions.append(
                Expression(
                    expression_id=instance.instance_id,
                    image_id=photo.image_id,
                    instance_id=instance.instance_id,
                    text=text,
                    query_id=query_id,
                )
            )
    if num_repeated:
        logger.warning(
            "%s: %d targets were left out, because another file has the same expression for the "
            "same pixels",
            folder,
            num_repeated,
        )
    kept = instances.values()
    return ReferringDataset(
        source=str(folder),
        images=tuple(photos.known.values()),
        # Until here, masks are always needed, for the boxes and to recognize repeated targets.
        instances=tuple(kept if masks else (replace(each, mask=None) for each in kept)),
        expressions=tuple(expressions),
    )


class _Photos:
    """The photos of the files read so far, each looked up and measured once.

    Attributes:
        known: image id -> photo.
    """

    def __init__(self, images_dir: Path) -> None:
        self._images_dir = images_dir
        self.known: dict[str, ReferringImage] = {}

    def of(self, entry: Entry) -> ReferringImage:
        """Return the photo of a file.

        Raises:
            DataError: `image_id` is malformed, or its photo is missing or cannot be decoded.
        """
        number = entry.identifier("image_id")
        # `isdecimal` alone also accepts the digits of other scripts.
        if not (number.isascii() and number.isdecimal()) or len(number) > _MAX_DIGITS:
            entry.fail("image_id", f"the number of a COCO photo, of up to {_MAX_DIGITS} digits")
        # So that 7 and "007" are the same photo.
        image_id = str(int(number))
        if image_id not in self.known:
            self.known[image_id] = self._measured(entry, image_id)
        return self.known[image_id]

    def _measured(self, entry: Entry, image_id: str) -> ReferringImage:
        names = [
            f"{folder}/{name.format(int(image_id))}".removeprefix("./")
            for folder in PHOTO_FOLDERS
            for name in PHOTO_NAMES
        ]
        found = next((name for name in names if (self._images_dir / name).exists()), None)
        if found is None:
            entry.fail(
                "image_id",
                f"the number of a photo in {self._images_dir}, such as {names[0]} or {names[-1]}",
            )
        return measured_photo(entry, "image_id", self._images_dir, found, image_id=image_id)


def _sentence(entry: Entry) -> tuple[str, str]:
    """Return the expression as written, and the id that equal expressions share."""
    text = entry.sentence("expression")
    return text, normalize_expression(text)


def _instances(entry: Entry, photo: ReferringImage, stem: str) -> Iterator[ReferringInstance]:
    """Yield the targets of a file, with their masks."""
    category = entry.text("category")
    targets = entry.object("target_annotation")
    if not targets.value:
        entry.fail("target_annotation", "at least one target")
    for name in targets.value:
        mask = targets.mask(name, photo.height_px, photo.width_px)
        if mask is None:
            targets.fail(name, "a segmentation that covers at least one pixel of the photo")
        yield ReferringInstance(
            instance_id=f"{stem}/{name}",
            image_id=photo.image_id,
            box_xyxy_px=box_px(mask),
            category=category,
            mask=mask,
        )

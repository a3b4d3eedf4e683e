"""Reads the JSON form that SimREC gives to RefCOCO, RefCOCO+, RefCOCOg and ReferIt.

RefCLIP and its successors use it too. A file is one object: name of a split -> list of items. An
item has `iid` (the number of its photo), `bbox` ([left, top, width, height] in pixels), `refs` (its
sentences), `cat_id` (place of its class among COCO's 80 classes) and `mask_id` (number of the
described instance). In "train", an instance is one item with all of its sentences; in the other
splits, each sentence is an item of its own.

The files state neither names nor sizes of photos. The names follow from the numbers:
`COCO_train2014_000000000072.jpg` for RefCOCO/+/g, and `72.jpg` for ReferIt. The sizes are taken
from the photos themselves, which must have the size that they were annotated at.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from reir.datasets.coco_classes import COCO_CLASSES
from reir.datasets.dataset import Expression, ReferringDataset, ReferringImage, ReferringInstance
from reir.datasets.json_entries import Entry, read_object
from reir.datasets.photo_sizes import absent_photos, box_inside, measured_photo
from reir.errors import DataError

COCO_NAME, REFERIT_NAME = "COCO_train2014_{:012}.jpg", "{}.jpg"
_MAX_DIGITS = 12


def read_simrec(path: str | Path, images_dir: str | Path) -> ReferringDataset:
    """Read all splits of a file, and the sizes of their photos. There are no masks.

    Items with the same `mask_id` describe one instance; an item without it is an instance of its
    own. Classes are only read if the photos have COCO's names, because ReferIt has other classes.

    Args:
        path: the JSON file.
        images_dir: folder of the photos.

    Raises:
        DataError: the file is malformed; the message names file, item and key. Or photos are
            missing or cannot be read.
    """
    # A mistake in any item is reported before thousands of photos are opened, which takes longer.
    items = _items(path)
    folder = Path(images_dir)
    name = _photo_name(path, [entry for _, entry in items], folder)
    images: dict[str, ReferringImage] = {}
    instances: dict[str, ReferringInstance] = {}
    expressions: list[Expression] = []
    splits: dict[str, set[str]] = defaultdict(set)
    for split, entry in items:
        number = _number(entry)
        image_id = str(number)
        if image_id not in images:
            images[image_id] = measured_photo(
                entry, "iid", folder, name.format(number), image_id=image_id
            )
        splits[split].add(image_id)
        found = _instance(entry, images[image_id], with_class=name == COCO_NAME)
        known = instances.setdefault(found.instance_id, found)
        if known != found:
            entry.fail(
                "mask_id",
                f"the mask_id of one instance, but an earlier item has it for photo "
                f"{known.image_id} and the box {known.box_xyxy_px} (xyxy)",
            )
        expressions += [
            Expression(
                expression_id=f"{entry.where}/{at}",
                image_id=image_id,
                instance_id=found.instance_id,
                text=text,
                split=split,
            )
            for at, text in enumerate(entry.sentences("refs"))
        ]
    return ReferringDataset(
        source=str(path),
        images=tuple(images.values()),
        instances=tuple(instances.values()),
        expressions=tuple(expressions),
        splits={split: frozenset(members) for split, members in splits.items()},
    )


def _items(path: str | Path) -> list[tuple[str, Entry]]:
    """Return (split, item) of all items, after checking what does not depend on photos."""
    document = read_object(path)
    items = [(split, entry) for split in document.value for entry in document.entries(split)]
    for _, entry in items:
        _number(entry)
        entry.box("bbox")
        entry.sentences("refs")
    if not items:
        raise DataError(f"{path} has no items; expected the name of a split -> a list of items")
    return items


def _number(entry: Entry) -> int:
    """Return the number of an item's photo."""
    number = entry.identifier("iid")
    if not (number.isascii() and number.isdecimal()) or len(number) > _MAX_DIGITS:
        entry.fail("iid", f"the number of a photo, of up to {_MAX_DIGITS} digits")
    return int(number)


def _photo_name(path: str | Path, items: list[Entry], folder: Path) -> str:
    """Return the pattern of the photos' names, after checking that all photos exist."""
    numbers = dict.fromkeys(map(_number, items))
    patterns = (COCO_NAME, REFERIT_NAME)
    used = (each for each in patterns if any((folder / each.format(n)).exists() for n in numbers))
    # If no photo is there under either name, the message below names those of COCO.
    name = next(used, COCO_NAME)
    _, what = absent_photos(path, (name.format(number) for number in numbers), folder)
    if what:
        raise DataError(f"{what}; add them, or remove their items from a copy of the file")
    return name


def _instance(entry: Entry, photo: ReferringImage, *, with_class: bool) -> ReferringInstance:
    """Return the described instance of an item."""
    category = None
    if with_class and entry.has("cat_id"):
        number = entry.value["cat_id"]
        if isinstance(number, bool) or number not in range(len(COCO_CLASSES)):
            entry.fail("cat_id", f"a whole number from 0 to {len(COCO_CLASSES) - 1}")
        # 3.0 is in the range, too, because it equals 3, but it is no index.
        category = COCO_CLASSES[int(number)]
    return ReferringInstance(
        # Without a number, the place of the item is its id.
        instance_id=entry.identifier("mask_id") if entry.has("mask_id") else entry.where,
        image_id=photo.image_id,
        box_xyxy_px=box_inside(entry, "bbox", photo),
        category=category,
    )

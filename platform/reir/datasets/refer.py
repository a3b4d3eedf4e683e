"""Reads RefCOCO, RefCOCO+ and RefCOCOg, in the two forms in which they are distributed.

* a folder with `refs(<split by>).p` (a pickle, which is read without running code) and
  `instances.json`;
* a JSON list for each split, with `img_id`, `sents`, `bbox`, `width`, `height`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from reir.datasets.coco import read_coco_instances
from reir.datasets.dataset import Expression, ReferringDataset, ReferringImage, ReferringInstance
from reir.datasets.json_entries import Entry, entries_of, read_list
from reir.datasets.plain_pickle import read_plain_pickle


def read_refer(folder: str | Path, split_by: str, *, masks: bool = False) -> ReferringDataset:
    """Read `refs(<split_by>).p` with the photos and instances of `instances.json` beside it.

    The text of an expression is the cleaned field `sent`. Splits have the names in the file:
    "train", "val" and, depending on the data set, "test" or "testA" and "testB". RefCOCOg by
    "google" splits instances instead of photos. There, a photo may be in several splits, and each
    split has only its own expressions.

    Args:
        folder: folder of the data set, for example `.../refcoco`.
        split_by: "unc" (RefCOCO, RefCOCO+), "umd" or "google".
        masks: also read segmentations.

    Raises:
        DataError: a file is malformed, or refers to code; the message names file and entry.
    """
    gallery = read_coco_instances(Path(folder) / "instances.json", masks=masks)
    path = Path(folder) / f"refs({split_by}).p"
    expressions: list[Expression] = []
    splits: dict[str, set[str]] = defaultdict(set)
    for ref in entries_of(str(path), "refs", read_plain_pickle(path)):
        splits[ref.text("split")].add(ref.identifier("image_id"))
        expressions += _expressions(ref)
    return ReferringDataset(
        source=str(path),
        images=gallery.images,
        instances=gallery.instances,
        expressions=tuple(expressions),
        splits={name: frozenset(members) for name, members in splits.items()},
    )


def read_refer_json(path: str | Path) -> ReferringDataset:
    """Read one split in JSON form. Entries with the same `img_id` describe the same instance.

    An `img_id` is the photo's file name without suffix, then "_" and the number of the instance.

    Raises:
        DataError: the file is malformed; the message names file, entry and what was expected.
    """
    images: dict[str, ReferringImage] = {}
    instances: dict[str, ReferringInstance] = {}
    expressions = []
    for number, entry in enumerate(read_list(path)):
        stated = _json_image(entry)
        image = images.setdefault(stated.image_id, stated)
        instance = ReferringInstance(
            instance_id=entry.text("img_id"),
            image_id=image.image_id,
            box_xyxy_px=entry.box("bbox"),
        )
        # An instance has an entry for each of its expressions, which must agree on the box.
        known = instances.setdefault(instance.instance_id, instance)
        if known != instance:
            entry.fail("bbox", f"the box of the earlier entry, {known.box_xyxy_px} (xyxy)")
        expressions.append(
            Expression(
                expression_id=str(number),
                image_id=image.image_id,
                instance_id=instance.instance_id,
                text=entry.text("sents"),
            )
        )
    return ReferringDataset(
        source=str(path),
        images=tuple(images.values()),
        instances=tuple(instances.values()),
        expressions=tuple(expressions),
    )


def _expressions(ref: Entry) -> Iterator[Expression]:
    for sentence in ref.entries("sentences"):
        yield Expression(
            expression_id=sentence.identifier("sent_id"),
            image_id=ref.identifier("image_id"),
            instance_id=ref.identifier("ann_id"),
            text=sentence.text("sent"),
            split=ref.text("split"),
        )


def _json_image(entry: Entry) -> ReferringImage:
    # The names of COCO's photos contain underscores themselves, so the last one counts.
    name, underscore, number = entry.text("img_id").rpartition("_")
    if not (name and underscore and number.isdecimal()):
        entry.fail("img_id", "a photo's name, '_' and a number")
    return ReferringImage(
        image_id=name,
        file_name=f"{name}.jpg",
        width_px=entry.pixels("width"),
        height_px=entry.pixels("height"),
    )

"""Reads annotations next to a folder of COCO photos: `expressions.json` and two human-written sets.

* `expressions.json`: referring expressions, long and short, with train and val photos;
* `refcocos_human.json`: human-written multi-hop expressions, some without a matching instance;
* `sugarcrepe_pairs.json`: captions, each with a slightly changed, wrong caption.

Photo names and sizes come from the `instances.json` in the same folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from reir.datasets.coco import read_coco_instances
from reir.datasets.dataset import Expression, ReferringDataset, ReferringInstance
from reir.datasets.json_entries import Entry, read_list, read_object

HUMAN_KIND = "human"
EXPRESSIONS = "expressions.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionPair:
    """A caption of a photo, and a wrong caption that differs a little.

    Attributes:
        image_id: id of the photo.
        kind: kind of change, for example "swap_att".
        caption: the right caption.
        negative_caption: the wrong caption.
    """

    image_id: str
    kind: str
    caption: str
    negative_caption: str


def read_photos(folder: str | Path, *, masks: bool = False) -> ReferringDataset:
    """Read `instances.json` and `expressions.json`, with the splits "train" and "val".

    All annotated instances are included, with or without expressions; `masks` also reads masks.

    Raises:
        DataError: a file is malformed, or the files contradict each other.
    """
    gallery = read_coco_instances(Path(folder) / "instances.json", masks=masks)
    document = read_object(Path(folder) / EXPRESSIONS)
    return ReferringDataset(
        source=document.source,
        images=gallery.images,
        instances=gallery.instances,
        expressions=tuple(_expression(item, gallery) for item in document.entries("expressions")),
        splits=_splits(document),
    )


def read_splits(folder: str | Path) -> dict[str, frozenset[str]]:
    """Read only the splits of `expressions.json`: the name of each -> ids of its photos.

    Raises:
        DataError: the file is malformed.
    """
    return _splits(read_object(Path(folder) / EXPRESSIONS))


def read_human_expressions(folder: str | Path) -> ReferringDataset:
    """Read `refcocos_human.json` and the photos that it names.

    The boxes are taken from that file. An expression marked `empty_case` describes no instance.

    Raises:
        DataError: a file is malformed; the message names file and entry.
    """
    gallery = read_coco_instances(Path(folder) / "instances.json")
    entries = read_list(Path(folder) / "refcocos_human.json")
    instances, expressions = [], []
    for number, entry in enumerate(entries):
        image_id = entry.identifier("image_id")
        target = None
        if not entry.object("categories").flag("empty_case"):
            target = ReferringInstance(
                instance_id=f"{HUMAN_KIND}/{number}",
                image_id=image_id,
                box_xyxy_px=entry.box("bbox"),
            )
            instances.append(target)
        expressions.append(
            Expression(
                expression_id=str(number),
                image_id=image_id,
                instance_id=target.instance_id if target else None,
                text=entry.text("expression"),
                kind=HUMAN_KIND,
            )
        )
    # `instances.json` describes the whole folder of photos, which is larger than this set.
    named = {expression.image_id for expression in expressions}
    return ReferringDataset(
        source=str(Path(folder) / "refcocos_human.json"),
        images=tuple(image for image in gallery.images if image.image_id in named),
        instances=tuple(instances),
        expressions=tuple(expressions),
    )


def read_caption_pairs(path: str | Path) -> tuple[CaptionPair, ...]:
    """Read `sugarcrepe_pairs.json`.

    Raises:
        DataError: the file is malformed; the message names file and entry.
    """
    return tuple(
        CaptionPair(
            image_id=entry.identifier("image_id"),
            kind=entry.text("type"),
            caption=entry.text("caption"),
            negative_caption=entry.text("negative_caption"),
        )
        for entry in read_list(path)
    )


def _splits(document: Entry) -> dict[str, frozenset[str]]:
    splits = document.object("splits")
    return {name: frozenset(splits.identifiers(name)) for name in splits.value}


def _expression(entry: Entry, gallery: ReferringDataset) -> Expression:
    instance_id = entry.identifier("ann_id")
    instance = gallery.instances_by_id.get(instance_id)
    if instance is None:
        entry.fail("ann_id", f"the id of an annotation in {gallery.source}")
    # The box is stored twice. If both files were made from different annotations, they would
    # differ.
    if entry.box("bbox") != instance.box_xyxy_px:
        entry.fail("bbox", f"the box of annotation {instance_id} in {gallery.source}")
    return Expression(
        expression_id=entry.identifier("id"),
        image_id=entry.identifier("image_id"),
        instance_id=instance_id,
        text=entry.text("expression"),
        kind=entry.text("kind"),
    )

"""Reads gRefCOCO as published: `grefs(unc).json` with `instances.json` beside it.

Unlike in RefCOCO, an expression may describe several instances of its photo, or none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from reir.datasets.coco import read_coco_instances
from reir.datasets.dataset import Expression, ReferringDataset
from reir.datasets.json_entries import Entry, read_list

REFS = "grefs(unc).json"
# What `ann_id` lists for an expression that describes nothing in its photo.
_NO_TARGET = ["-1"]


def read_grefcoco(folder: str | Path, *, masks: bool = False) -> ReferringDataset:
    """Read the expressions of all splits: "train", "val", "testA" and "testB".

    The text of an expression is the cleaned field `sent`. An expression without target has no
    instance: its photo is known not to show what it describes.

    Args:
        folder: folder of the two files.
        masks: also read segmentations.

    Raises:
        DataError: a file is malformed; the message names file, entry and what was expected.
    """
    gallery = read_coco_instances(Path(folder) / "instances.json", masks=masks)
    path = Path(folder) / REFS
    expressions: list[Expression] = []
    splits: dict[str, set[str]] = defaultdict(set)
    for ref in read_list(path):
        image_id = ref.identifier("image_id")
        if image_id not in gallery.images_by_id:
            ref.fail("image_id", f"the id of a photo in {gallery.source}")
        splits[ref.text("split")].add(image_id)
        expressions += _expressions(ref, _targets(ref, gallery))
    # `instances.json` may describe more photos than these expressions are about.
    named = {expression.image_id for expression in expressions}
    shown = gallery.of_images(named)
    return ReferringDataset(
        source=str(path),
        images=shown.images,
        instances=shown.instances,
        expressions=tuple(expressions),
        splits={name: frozenset(members & named) for name, members in splits.items()},
    )


def _targets(ref: Entry, gallery: ReferringDataset) -> list[str | None]:
    """Return the ids of the described instances; [None] if there is none."""
    found = ref.identifiers("ann_id")
    absent = found == _NO_TARGET
    if ref.has("no_target") and ref.flag("no_target") != absent:
        ref.fail("ann_id", "ids of annotations" if absent else "[-1], since no_target is true")
    if absent:
        return [None]
    if not found or len(set(found)) < len(found):
        ref.fail("ann_id", "at least one id, and none of them twice")
    for instance_id in found:
        instance = gallery.instances_by_id.get(instance_id)
        if instance is None or instance.image_id != ref.identifier("image_id"):
            ref.fail("ann_id", f"ids of annotations of its photo in {gallery.source}")
    return list(found)


def _expressions(ref: Entry, targets: list[str | None]) -> Iterator[Expression]:
    for sentence in ref.entries("sentences"):
        query_id = f"{ref.identifier('ref_id')}/{sentence.identifier('sent_id')}"
        for number, instance_id in enumerate(targets):
            yield Expression(
                expression_id=f"{query_id}/{number}",
                image_id=ref.identifier("image_id"),
                instance_id=instance_id,
                text=sentence.text("sent"),
                split=ref.text("split"),
                query_id=query_id,
            )

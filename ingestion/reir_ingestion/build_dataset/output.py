"""Writes the folder of a finished dataset: annotations, provenance, refusals and look-alikes.

reircoco_train.json, reircoco_val.json    photos, boxes, masks where known, and expressions
data.yaml          names both files, for `reir train --data`
photos.jsonl       what became of each photo
provenance.jsonl   where each expression comes from
refused.jsonl      what was not kept, and why
look_alikes.json   for each described instance, similar instances of other photos
captions.json      sentences about whole photos, if there are any; training contrasts them too
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from reir.datasets import (
    Expression,
    ReferringDataset,
    ReferringImage,
    ReferringInstance,
    write_reircoco,
)
from reir.datasets.look_alikes import LOOK_ALIKES
from reir_ingestion.build_dataset.files import put_in_place, write_text
from reir_ingestion.build_dataset.outcomes import Builder, Outcome, Status
from reir_ingestion.build_dataset.photos import CAPTIONS, PhotoSet
from reir_ingestion.build_dataset.scenes import Scene

TRAIN, VAL = "train", "val"
PHOTOS, PROVENANCE, REFUSED = "photos.jsonl", "provenance.jsonl", "refused.jsonl"
DATA = "data.yaml"


def annotations_file(split: str) -> str:
    """Return the name of the annotation file of a split."""
    return f"reircoco_{split}.json"


def choose_splits(scenes: Sequence[Scene], groups: Sequence[int], val_share: float) -> list[str]:
    """Return the split of each scene: photos of a group are in the same split.

    The choice depends on the content of the photos alone, so a rerun makes the same one.
    """
    members: dict[int, list[Scene]] = defaultdict(list)
    for scene, group in zip(scenes, groups, strict=True):
        members[group].append(scene)
    split_of = {
        # The smallest hash does not depend on the order in which the photos are listed.
        group: VAL if _share(min(each.content_hash for each in found)) < val_share else TRAIN
        for group, found in members.items()
    }
    return [split_of[group] for group in groups]


def _share(text: str) -> float:
    """Return a number in [0, 1) that depends on a text alone, and is spread evenly."""
    # 48 bits, which a float represents exactly; more could be rounded to 1.
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16) / 16**12


def write_folder(
    out: Path,
    photos: PhotoSet,
    outcomes: Sequence[Outcome],
    splits: Sequence[str],
    builder: Builder,
) -> None:
    """Write the files of the module's description; each is complete or unchanged."""
    # A failed photo is in no split: another run may still write about it.
    splits = [
        "" if each.status is Status.FAILED else own
        for each, own in zip(outcomes, splits, strict=True)
    ]
    for split in (TRAIN, VAL):
        part = [each for each, own in zip(outcomes, splits, strict=True) if own == split]
        # `write_reircoco` writes in place, so an interruption would leave only a part of the file.
        partial = out / f".{annotations_file(split)}.part"
        write_reircoco(_dataset(photos, part), partial, every_instance=True)
        put_in_place(partial, out / annotations_file(split))
    lines = [
        (PHOTOS, map(_photo_line, outcomes, splits)),
        (PROVENANCE, (line for each in outcomes for line in _provenance(each, builder))),
        (REFUSED, (line for each in outcomes for line in _refused(each))),
    ]
    for name, values in lines:
        # `json.dumps` writes ASCII, which also expresses file names that are no valid UTF-8.
        write_text(out / name, "".join(json.dumps(value) + "\n" for value in values))
    write_text(out / LOOK_ALIKES, json.dumps(_look_alikes(outcomes)))
    _write_captions(out / CAPTIONS, outcomes)
    write_text(out / DATA, yaml.safe_dump(_training_data(out, photos, splits), sort_keys=False))


def _dataset(photos: PhotoSet, outcomes: Iterable[Outcome]) -> ReferringDataset:
    images: list[ReferringImage] = []
    instances: list[ReferringInstance] = []
    expressions: list[Expression] = []
    for outcome in outcomes:
        scene = outcome.task.scene
        name = scene.photo.file_name
        # The size that the annotated boxes, which are written unchanged, refer to.
        width, height = scene.photo.annotated_px or scene.size_px
        images.append(
            # `read_reircoco` makes the file name the id of a photo, too.
            ReferringImage(image_id=name, file_name=name, width_px=width, height_px=height)
        )
        instances += _instances(scene, (width, height), photos.crowds.get(name, ()))
        expressions += (
            Expression(
                expression_id=f"{name}#{each.number}/{at}",
                image_id=name,
                instance_id=_instance_id(name, each.number),
                text=each.text,
            )
            for at, each in enumerate(outcome.kept)
        )
    return ReferringDataset(
        source=photos.source,
        images=tuple(images),
        instances=tuple(instances),
        expressions=tuple(expressions),
    )


def _instances(
    scene: Scene, size_px: tuple[int, int], crowds: Sequence[ReferringInstance]
) -> Iterator[ReferringInstance]:
    name, (width, height) = scene.photo.file_name, size_px
    for number, instance in enumerate(scene.instances, start=1):
        x1, y1, x2, y2 = instance.box
        box_px = (x1 * width, y1 * height, x2 * width, y2 * height)
        annotation = instance.annotation
        yield ReferringInstance(
            instance_id=_instance_id(name, number),
            image_id=name,
            # As annotated: `instance.box` was clipped to the photo and rounded to float32.
            box_xyxy_px=annotation.box_xyxy_px if annotation else box_px,
            category=instance.category or None,
            mask=instance.mask,
        )
    for number, crowd in enumerate(crowds, start=1):
        yield ReferringInstance(
            instance_id=f"{name}#crowd{number}",
            image_id=name,
            box_xyxy_px=crowd.box_xyxy_px,
            category=crowd.category,
            is_crowd=True,
            mask=crowd.mask,
        )


def _instance_id(file_name: str, number: int) -> str:
    return f"{file_name}#{number}"


def _photo_line(outcome: Outcome, split: str) -> dict[str, Any]:
    return {
        "photo": outcome.task.scene.photo.file_name,
        "status": outcome.status.value,
        "reason": outcome.reason,
        "split": split,
        "instances": len(outcome.task.scene.instances),
        "expressions": len(outcome.kept),
    }


def _provenance(outcome: Outcome, builder: Builder) -> Iterator[dict[str, Any]]:
    for each in outcome.kept:
        yield {
            "photo": outcome.task.scene.photo.file_name,
            "instance": each.number,
            "expression": each.text,
            "writer": {"name": builder.writer.name, "version": builder.writer.version},
            "judges": [
                {"name": judge.name, "version": judge.version, "problems": {}}
                for judge in builder.judges
            ],
            "time": _iso(outcome.finished_s),
        }


def _refused(outcome: Outcome) -> Iterator[dict[str, Any]]:
    name = outcome.task.scene.photo.file_name
    if outcome.reason:
        yield {"photo": name, "status": outcome.status.value, "reason": outcome.reason}
    for number, reason in outcome.refused:
        yield {"photo": name, "instance": number, "reason": reason}
    for each in outcome.expressions:
        if each.reason:
            yield {
                "photo": name,
                "instance": each.number,
                "expression": each.text,
                "reason": each.reason,
                "problems": dict(each.verdict.problems),
            }


def _look_alikes(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    return [
        {
            "photo": outcome.task.scene.photo.file_name,
            "instance": number,
            "look_alikes": [
                {
                    "photo": each.scene.photo.file_name,
                    "instance": each.index + 1,
                    "similarity": round(each.similarity, 4),
                }
                for each in similar
            ],
        }
        for outcome in outcomes
        for number, similar in outcome.task.look_alikes.items()
        if similar
    ]


def _write_captions(path: Path, outcomes: Iterable[Outcome]) -> None:
    """Write the captions in COCO's format; remove those of an earlier run if there are none."""
    photos = [each.task.scene.photo for each in outcomes if each.status is not Status.FAILED]
    captions = [
        {"image_id": photo.file_name, "caption": text}
        for photo in photos
        for text in photo.captions
    ]
    if captions:
        numbered = [{"id": number, **each} for number, each in enumerate(captions, start=1)]
        write_text(path, json.dumps({"annotations": numbered}))
    else:
        path.unlink(missing_ok=True)


def _training_data(out: Path, photos: PhotoSet, splits: Sequence[str]) -> Mapping[str, Any]:
    """Return the keys `data` and `evaluation` of a training configuration."""
    # Absolute, so that `reir train` can be started in any folder.
    where = {"format": "reircoco", "path": str(out.absolute())}
    images = {"images": str(photos.images_dir.absolute())}
    source = {
        split: [{**where, **images, "annotations": annotations_file(split)}]
        for split in (TRAIN, VAL)
    }
    return {"data": source[TRAIN], "evaluation": source[VAL] if VAL in splits else []}


def _iso(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="seconds")

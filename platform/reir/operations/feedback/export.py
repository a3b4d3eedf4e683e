"""Writes what users agree on as a data set in REIRCOCO's format, to train or evaluate a model."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reir.datasets.dataset import (
    BoxPx,
    Expression,
    ReferringDataset,
    ReferringImage,
    ReferringInstance,
)
from reir.datasets.reircoco import write_reircoco
from reir.errors import DataError
from reir.images.decode import path_of_uri
from reir.operations.feedback.agreement import Answer, agree
from reir.operations.feedback.database import require_feedback
from reir.records import Box, ImageRecord
from reir.store.contract import InstanceStore
from reir.text import without_controls

SCHEME = "file:///"


@dataclass(frozen=True, kw_only=True)
class FeedbackExport:
    """What was exported, and what was left out.

    Attributes:
        photos: folder of the photos, which the file names in the data set are relative to.
        num_expressions, num_instances, num_photos: what the data set contains.
        num_feedback: all feedback about the gallery.
        num_used: feedback that supports an exported box; several users may support the same one.
        left_out: reason -> number of other feedback; see `Agreement`. "photo gone": the live
            version no longer has the photo. "remote": the photo is not a file of this machine.
    """

    photos: Path
    num_expressions: int
    num_instances: int
    num_photos: int
    num_feedback: int
    num_used: int
    left_out: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "photos": str(self.photos),
            "expressions": self.num_expressions,
            "instances": self.num_instances,
            "images": self.num_photos,
            "feedback": self.num_feedback,
            "used": self.num_used,
            "left_out": self.left_out,
        }


def export_feedback(store: InstanceStore, gallery: str, folder: Path, out: Path) -> FeedbackExport:
    """Write what users said about a gallery as REIRCOCO's JSON.

    Args:
        store: store of the gallery, which knows the sizes of the photos.
        gallery: its name.
        folder: folder of the search log.
        out: file to write.

    Raises:
        DataError: there is no feedback, or none of it says where an object is.
        GalleryNotFound: the gallery has no live version.
    """
    feedback = require_feedback(folder, gallery)
    agreement = agree(feedback)
    left_out = Counter(agreement.left_out)
    version = store.live_version(gallery)
    ids = sorted({answer.newest.image_id for answer in agreement.answers})
    records = store.get_images(gallery, version, ids)
    kept: list[tuple[Answer, ImageRecord]] = []
    for answer in agreement.answers:
        record = records.get(answer.newest.image_id)
        # A photo that failed since may have no size, which the boxes in pixels need.
        if record is None or not record.width_px:
            left_out["photo gone"] += answer.num_for
        elif not record.uri.startswith(SCHEME):
            left_out["remote"] += answer.num_for
        else:
            kept.append((answer, record))
    if not kept:
        raise DataError(
            f"none of the {len(feedback)} verdicts about gallery '{gallery}' can be exported: "
            + ", ".join(f"{number} {reason}" for reason, number in left_out.items())
        )
    photos = _common_folder(path_of_uri(record.uri) for _, record in kept)
    dataset = dataset_of_answers(
        ((answer, _photo(record, photos)) for answer, record in kept), f"feedback on {gallery}"
    )
    write_reircoco(dataset, out)
    return FeedbackExport(
        photos=photos,
        num_expressions=len(dataset.expressions),
        num_instances=len(dataset.instances),
        num_photos=len(dataset.images),
        num_feedback=len(feedback),
        num_used=sum(answer.num_for for answer, _ in kept),
        left_out=dict(left_out),
    )


def dataset_of_answers(
    answers: Iterable[tuple[Answer, ReferringImage]], source: str
) -> ReferringDataset:
    """Return answers as a data set, without splits.

    Args:
        answers: each with its photo.
        source: where they come from, for messages.
    """
    images: dict[str, ReferringImage] = {}
    instances: dict[tuple[str, Box | None], ReferringInstance] = {}
    expressions = []
    for number, (answer, photo) in enumerate(answers):
        said = answer.newest
        image = images.setdefault(photo.image_id, photo)
        # Expressions with the same box in a photo describe the same instance.
        instance = instances.setdefault(
            (image.image_id, said.box),
            ReferringInstance(
                instance_id=f"{image.image_id}/{len(instances)}",
                image_id=image.image_id,
                box_xyxy_px=_pixels(said.box, image),
            ),
        )
        expressions.append(
            Expression(
                expression_id=str(number),
                image_id=image.image_id,
                instance_id=instance.instance_id,
                # Anybody may have sent it, and people read the data set in their terminals.
                text=" ".join(without_controls(said.expression).split()),
            )
        )
    return ReferringDataset(
        source=source,
        images=tuple(images.values()),
        instances=tuple(instances.values()),
        expressions=tuple(expressions),
    )


def _photo(record: ImageRecord, folder: Path) -> ReferringImage:
    assert record.width_px
    assert record.height_px
    return ReferringImage(
        image_id=record.image_id,
        file_name=path_of_uri(record.uri).relative_to(folder).as_posix(),
        width_px=record.width_px,
        height_px=record.height_px,
    )


def _common_folder(paths: Iterable[Path]) -> Path:
    return Path(os.path.commonpath([path.parent for path in paths]))


def _pixels(box: Box | None, image: ReferringImage) -> BoxPx:
    assert box is not None
    x1, y1, x2, y2 = box
    width, height = image.width_px, image.height_px
    return round(x1 * width, 2), round(y1 * height, 2), round(x2 * width, 2), round(y2 * height, 2)

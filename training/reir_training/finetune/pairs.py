"""What a fine-tune learns from: sentences about photos of a gallery, wherever they come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from reir.datasets.dataset import ReferringDataset
from reir.datasets.photo_sentences import read_sentence_list
from reir.datasets.sentence_rows import PHOTO, read_rows
from reir.operations.canary import Canary
from reir.records import Box
from reir.store.contract import InstanceStore
from reir_training.data.examples import hold_out
from reir_training.finetune.photos import GalleryPhotos
from reir_training.finetune.trust import FeedbackSummary


@dataclass(frozen=True)
class GalleryPairs:
    """Sentences about photos of a gallery.

    Attributes:
        dataset: the photos, under their image ids, and the sentences; those without an instance
            have no box.
        uris: image id -> URI.
        skipped: rows that were left out, with the reason, because their photo is unknown.
        feedback: what became of the feedback, if they come from feedback.
    """

    dataset: ReferringDataset
    uris: Mapping[str, str]
    skipped: tuple[str, ...] = ()
    feedback: FeedbackSummary | None = None

    @property
    def digest(self) -> str:
        """Sha256 of photos, sentences and boxes."""
        rows = [
            [each.image_id, each.text, _box(self.dataset, each.instance_id)]
            for each in self.dataset.expressions
        ]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def read_pairs(
    store: InstanceStore, gallery: str, path: Path, *, skip_unknown: bool = False
) -> GalleryPairs:
    """Read a list of photos and sentences, and find the photos in the live version of a gallery.

    Args:
        store: has the gallery.
        gallery: its name.
        path: CSV or JSON lines; see `reir.datasets.photo_sentences`. Photos are named by file name,
            path or URI.
        skip_unknown: leave out rows whose photo the gallery does not have, or could not index.

    Raises:
        DataError: rows cannot be used; the message lists them.
        GalleryNotFound: there is no such gallery.
    """
    # The list is read twice: its names must be known before the ledger, which may be very long.
    names = {str(row.values.get(PHOTO) or "").strip() for row in read_rows(path)}
    photos = GalleryPhotos(store, gallery, store.live_version(gallery), names)
    skipped: list[str] = []
    dataset = read_sentence_list(path, photos, skipped=skipped if skip_unknown else None)
    return GalleryPairs(dataset, photos.uris, tuple(skipped))


def split_pairs(
    dataset: ReferringDataset, held_out: float
) -> tuple[ReferringDataset, ReferringDataset]:
    """Return the sentences to train on, and those of photos that are held out.

    The held-out photos are chosen by a hash of their image ids, so that repeated runs choose the
    same ones.

    Args:
        dataset: without splits.
        held_out: share of the photos, of which at least one is held out.

    Raises:
        DataError: no photo would be left to train on.
    """
    num = max(1, round(held_out * len(dataset.images)))
    split = hold_out(dataset, num)
    return split.split("train"), split.split("val")


def canaries_of_pairs(held_out: ReferringDataset, uris: Mapping[str, str]) -> list[Canary]:
    """Return held-out sentences with their answers, by which `reir reindex` judges a version.

    Repeated sentences are one canary, as they are for the gate.
    """
    canaries = [
        Canary(
            expression=each.text,
            uri=uris[each.image_id],
            box=_canary_box(held_out, each.image_id, each.instance_id),
        )
        for each in held_out.expressions
    ]
    return list(dict.fromkeys(canaries))


def _canary_box(dataset: ReferringDataset, image_id: str, instance_id: str | None) -> Box | None:
    """Return a box that `read_canaries` accepts, and which is the same after it is read."""
    if instance_id is None:
        return None
    image = dataset.images_by_id[image_id]
    x1, y1, x2, y2 = dataset.instances_by_id[instance_id].box_xyxy_px
    width, height = image.width_px, image.height_px
    # Drawn boxes may reach a little beyond the photo.
    left, top = round(max(x1 / width, 0.0), 4), round(max(y1 / height, 0.0), 4)
    right, bottom = round(min(x2 / width, 1.0), 4), round(min(y2 / height, 1.0), 4)
    # Rounding may leave no area of a thin box; the photo is still the right one.
    return (left, top, right, bottom) if left < right and top < bottom else None


def _box(dataset: ReferringDataset, instance_id: str | None) -> list[float] | None:
    if instance_id is None:
        return None
    return list(dataset.instances_by_id[instance_id].box_xyxy_px)

"""Measures how well a model finds what sentences describe, before and after a fine-tune."""

# Shapes: M sentences

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reir.cores import num_cores
from reir.datasets.dataset import Expression, ReferringDataset
from reir.evaluate.encoded_gallery import (
    Encoding,
    encode_expressions,
    encode_gallery,
    image_positions,
)
from reir.metrics import Gallery, Interval, Queries, bootstrap_intervals, reir_ranks
from reir.models.interfaces import InstanceEncoder
from reir.records import FloatArray

KS = (1, 5, 10)
MIN_IOU = 0.5
# Stands for an unknown box: it overlaps nothing, and its rank is not used (`has_box`).
NO_BOX = (0.0, 0.0, 0.0, 0.0)

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Ranks:
    """Ranks of the right answers to M sentences, from 0, in a gallery of all photos of a set.

    Attributes:
        photos: (M,) position of the right photo of each.
        photo_ranks: (M,) rank of the right photo among all photos.
        box_ranks: (M,) rank of the first right instance among all instances: it is in the right
            photo, and its IoU with the true box is at least `MIN_IOU`. Meaningless without a box.
        has_box: (M,) whether the true box is known.
    """

    photos: Ints
    photo_ranks: Ints
    box_ranks: Ints
    has_box: npt.NDArray[np.bool_]

    def hits(self) -> dict[str, npt.NDArray[np.float64]]:
        """Return 1 or 0 for each sentence: figure -> (M,), NaN where the true box is unknown.

        `photo_p1`, `photo_p5` and `photo_p10`: the right photo is among the first 1, 5 or 10.
        `br1`, `br5`, `br10`: a right instance is among the first ones; missing if no box is known.
        """
        found = {f"photo_p{k}": (self.photo_ranks < k).astype(float) for k in KS}
        if self.has_box.any():
            for k in KS:
                found[f"br{k}"] = np.where(self.has_box, self.box_ranks < k, np.nan)
        return found

    def figures(self) -> dict[str, float]:
        """Return the percentages of `hits`; empty without sentences."""
        if not len(self.photos):
            return {}
        return {name: round(100 * float(np.nanmean(hit)), 2) for name, hit in self.hits().items()}

    def gain_over(self, before: Ranks) -> dict[str, Interval]:
        """Return by how many points each figure is higher than before, with 95 % intervals.

        Photos are resampled, since the sentences about a photo often succeed or fail together.
        """
        gains = {}
        for name, now in self.hits().items():
            steps = 100 * (now - before.hits()[name])
            known = ~np.isnan(steps)
            (gains[name],) = bootstrap_intervals(steps[known, None], clusters=self.photos[known])
        return gains

    def to_dict(self) -> dict[str, list[Any]]:
        """Return plain JSON values."""
        return {name: values.tolist() for name, values in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Sequence[Any]]) -> Ranks:
        """Inverse of `to_dict`."""
        return cls(
            photos=np.array(values["photos"], dtype=np.int64),
            photo_ranks=np.array(values["photo_ranks"], dtype=np.int64),
            box_ranks=np.array(values["box_ranks"], dtype=np.int64),
            has_box=np.array(values["has_box"], dtype=np.bool_),
        )


def rank_sentences(gallery: Gallery, texts_MD: FloatArray, dataset: ReferringDataset) -> Ranks:
    """Rank a gallery for the expressions of a data set.

    Args:
        gallery: instances of all its photos, with positions in `dataset.images`.
        texts_MD: vectors of its expressions.
        dataset: says which photo and which box is right.
    """
    photos = image_positions(dataset, [each.image_id for each in dataset.expressions])
    # Reshaped, because without expressions the array would have one axis only.
    boxes = np.array([_box_px(dataset, each) for each in dataset.expressions]).reshape(-1, 4)
    ranks = reir_ranks(Queries(texts_MD, photos, boxes), gallery, iou_thresholds=(MIN_IOU,))
    has_box = np.array([e.instance_id is not None for e in dataset.expressions], dtype=np.bool_)
    return Ranks(photos, ranks.image_rank, ranks.fitting_rank[:, 0], has_box)


def measure(
    encoder: InstanceEncoder,
    dataset: ReferringDataset,
    images_dir: Path,
    on_progress: Callable[[int, int], None] | None = None,
) -> Ranks:
    """Encode the photos of a data set, and rank them for its expressions.

    Args:
        encoder: the model.
        dataset: photos and expressions, with or without boxes.
        images_dir: folder of the photos.
        on_progress: called with the number of finished photos and of all photos.
    """
    how = Encoding(threads=num_cores(), progress=on_progress)
    gallery = encode_gallery(encoder, dataset, images_dir, how=how).arrays
    texts = encode_expressions(encoder, [each.text for each in dataset.expressions])
    return rank_sentences(gallery, texts, dataset)


def _box_px(dataset: ReferringDataset, text: Expression) -> tuple[float, float, float, float]:
    if text.instance_id is None:
        return NO_BOX
    return dataset.instances_by_id[text.instance_id].box_xyxy_px

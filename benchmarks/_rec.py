"""Looks for the boxes of expressions in the photos that they describe, as `reir localize` does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from reir.datasets.dataset import Expression, ReferringDataset
from reir.images.boxes import elementwise_iou
from reir.images.decode import read_image
from reir.query.localize import PixelLocalizer
from reir_testing.boxes import target_box


def right_boxes(
    localizer: PixelLocalizer, dataset: ReferringDataset, photos: Path, asked: Sequence[Expression]
) -> npt.NDArray[np.bool_]:
    """Return for each expression whether its best box in its own photo has an IoU of .5."""
    right = np.zeros(len(asked), dtype=np.bool_)
    of_image: dict[str, list[int]] = defaultdict(list)
    for number, each in enumerate(asked):
        of_image[each.image_id].append(number)
    for image_id, numbers in of_image.items():
        pixels = read_image(photos / dataset.images_by_id[image_id].file_name)
        found = localizer.locate(pixels, [asked[number].text for number in numbers], k=1)
        for number, answer in zip(numbers, found, strict=True):
            target = np.array(target_box(dataset, asked[number]))
            right[number] = any(
                elementwise_iou(target, np.array(each.box)) >= 0.5 for each in answer.boxes
            )
    return right

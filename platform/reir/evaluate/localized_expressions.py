"""Lets a localizer find each expression of a dataset in its own photo.

A photo is read once, for all of its expressions.
"""

# Shapes: M expressions, T expressions of one photo, K boxes of each

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

import reir
from reir.datasets import Expression, ReferringDataset
from reir.errors import ImageError
from reir.evaluate.encoded_gallery import (
    Encoding,
    Targets,
    hash_of_photos,
    hash_of_texts,
    is_misshapen,
    photo_paths,
    targets_of,
)
from reir.evaluate.shards import read_photo, torch_threads
from reir.evaluate.work_folder import WorkFolder
from reir.metrics.reir import Floats, Ints
from reir.models.interfaces import ExpressionLocalizer
from reir.records import FloatArray

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalizedPhoto:
    """What a localizer found in one photo.

    Attributes:
        boxes: (T, K, 4) best boxes for each expression, best first, xyxy in [0, 1]; rows of NaN
            where there are fewer.
        size_px: (2,) width and height of the photo; 0 if it cannot be decoded.
        failure: reason why the photo cannot be decoded; empty if it can.
    """

    boxes: FloatArray
    size_px: Ints
    failure: str

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays under the names that they are saved by."""
        return {"boxes": self.boxes, "size_px": self.size_px, "failure": np.array(self.failure)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        """Inverse of `to_arrays`; raises `KeyError` if an array is missing."""
        return cls(arrays["boxes"], arrays["size_px"], str(arrays["failure"]))


@dataclass(frozen=True)
class LocalizedExpressions:
    """What a localizer found in the photos of a dataset.

    Attributes:
        targets: the true answers of the M expressions.
        boxes_px: (M, K, 4) best boxes for each expression, best first, xyxy in pixels of the
            annotated size; rows of NaN where a photo has fewer, or cannot be decoded.
        num_photos: number of photos that have expressions.
        num_unreadable: number of photos that cannot be decoded.
        num_misshapen: number of photos whose aspect ratio is not the annotated one.
        threads: CPU threads of torch that found them.
    """

    targets: Targets
    boxes_px: Floats
    num_photos: int
    num_unreadable: int
    num_misshapen: int
    threads: int


def localize_expressions(  # noqa: PLR0913, all but the four parts are by name
    localizer: ExpressionLocalizer,
    dataset: ReferringDataset,
    images_dir: str | Path,
    expressions: Sequence[Expression],
    *,
    num_boxes: int,
    how: Encoding | None = None,
) -> LocalizedExpressions:
    """Find each expression in its own photo.

    A photo that cannot be decoded has no boxes, and is logged and counted. A missing photo is an
    error.

    Args:
        localizer: the model.
        dataset: the data set of the expressions; photos without expressions are not read.
        images_dir: folder of the photos.
        expressions: describe one instance each.
        num_boxes: number K of boxes to keep for each expression.
        how: `work`, `threads` and `progress`; the localizer runs in this process.

    Raises:
        DataError: there are no expressions, photos are missing, or a file name points outside
            `images_dir`.
    """
    how = how or Encoding()
    # Photos without expressions are not asked about, so they need not be read.
    dataset = dataset.of_images({text.image_id for text in expressions})
    targets = targets_of(dataset, expressions)
    paths = photo_paths(dataset, Path(images_dir).absolute())
    texts = [each.text for each in expressions]
    # Everything that a result depends on becomes a part of the name of its folder, so a result that
    # is found is never wrong.
    about = {
        "version": reir.__version__,
        "digest": localizer.digest,
        "threads": how.threads,
        "photos": hash_of_photos(dataset, paths),
        "expressions": hash_of_texts(targets.images, texts),
        "num_boxes": num_boxes,
    }
    work = WorkFolder(LocalizedPhoto, how.work, about) if how.work else None
    boxes_px = np.full((len(targets), num_boxes, 4), np.nan)
    found: list[LocalizedPhoto] = []
    for at, (photo, path) in enumerate(zip(dataset.images, paths, strict=True)):
        rows = np.flatnonzero(targets.images == at).tolist()
        one = work.load(at) if work else None
        if one is None:
            with torch_threads(how.threads):
                one = _localized(localizer, path, [texts[row] for row in rows], num_boxes)
            if work:
                work.save(at, one)
        # The true boxes are in pixels of the annotated size, even if the file has another size.
        boxes_px[rows] = one.boxes * np.array([photo.width_px, photo.height_px] * 2)
        found.append(one)
        if how.progress is not None:
            how.progress(len(found), len(paths))
    return LocalizedExpressions(
        targets=targets,
        boxes_px=boxes_px,
        num_photos=len(found),
        num_unreadable=sum(bool(one.failure) for one in found),
        num_misshapen=sum(
            not one.failure and is_misshapen(photo, one.size_px)
            for photo, one in zip(dataset.images, found, strict=True)
        ),
        threads=how.threads,
    )


def _localized(
    localizer: ExpressionLocalizer, path: Path, texts: Sequence[str], num_boxes: int
) -> LocalizedPhoto:
    """Find expressions in one photo."""
    boxes = np.full((len(texts), num_boxes, 4), np.nan, dtype=np.float32)
    try:
        pixels = read_photo(path)
    except ImageError as error:
        logger.warning("%s: cannot be decoded (%s); nothing is found in it", path.name, error)
        return LocalizedPhoto(boxes, np.zeros(2, dtype=np.int64), error.reason.value)
    # The same array each time, since localizers prepare a photo that is given repeatedly only
    # once, and recognize it by its identity.
    for row, found in enumerate(localizer.localize([pixels] * len(texts), texts)):
        best = found.boxes[:num_boxes]
        boxes[row, : len(best)] = best
    return LocalizedPhoto(boxes, np.array(pixels.shape[1::-1], dtype=np.int64), "")

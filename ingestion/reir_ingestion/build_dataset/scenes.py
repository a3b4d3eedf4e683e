"""Scenes: what is known about each photo before anything is written about it.

A scene lists the instances of a photo with class, box, colors and vector. The boxes are those of
the annotations, or else the candidates of the model. Finished scenes are kept in a folder, so that
a rerun does not encode a photo again.
"""

# Shapes: P photos, N instances of one photo, J instances of all photos, C color words, D dimension

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from reir.datasets.coco_classes import COCO_CLASSES
from reir.datasets.dataset import ReferringInstance
from reir.datasets.generated_expressions import (
    COLOR_WORDS,
    MIN_AREA,
    AnnotatedInstance,
    central_color,
    color_word,
)
from reir.errors import ConfigError, ImageError
from reir.evaluate.work_folder import WorkFolder
from reir.images.boxes import area, pairwise_iou
from reir.images.decode import content_hash, decode, read_bytes
from reir.models.interfaces import ClassifyingEncoder, InstanceEncoder
from reir.records import Box, FloatArray, Instances, MaskRle, RgbImage
from reir_ingestion.build_dataset.photos import Photo
from reir_ingestion.loading import failure_of, perceptual_hash

MATCH_IOU = 0.5
"""An annotated instance gets the vector of the candidate that overlaps it at least so much."""
CERTAIN_SCORE, SEEN_SCORE = 0.4, 0.2
"""Candidates with a class score from the first number on are described. Those between the two may
be wrong; they are not described, but can make an expression about another instance ambiguous."""
SAME_SHARE = 0.7
"""If a candidate shares so much of its area, or of that of a better one of its class, with it, both
are taken for the same instance."""

_GRID = 8
_SHARD_PHOTOS = 32

Progress = Callable[[int, int], None]
"""Called with the number of photos done and of all photos."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SceneInstance:
    """One instance of a scene.

    Attributes:
        category: class name; empty if unknown.
        box: xyxy in [0, 1] of the upright photo.
        color: word for its color; empty if it has no clear one.
        color_shares: (C,) share of its box that has each of the colors in `COLOR_WORDS`.
        vector: (D,) instance vector; None if no candidate of the model overlaps the box enough.
        certain: whether it is annotated, or has a high class score.
        described: whether expressions may be written about it: it is certain, and large enough.
        annotation: its annotation; None for a candidate of the model.
    """

    category: str
    box: Box
    color: str
    color_shares: FloatArray
    vector: FloatArray | None
    certain: bool
    described: bool
    annotation: ReferringInstance | None = None

    @property
    def annotated(self) -> AnnotatedInstance:
        """The instance as the generator of expressions takes it."""
        return AnnotatedInstance(self.category, self.box, self.color)

    @property
    def mask(self) -> MaskRle | None:
        """Its pixels, if they are annotated."""
        return self.annotation.mask if self.annotation else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """One photo and its instances.

    Attributes:
        photo: the photo.
        size_px: width and height of the upright photo; (0, 0) if it cannot be decoded.
        perceptual_hash: 16 hex digits; photos that look alike differ in few bits.
        content_hash: SHA-256 of the file.
        instances: its instances; an expression names one by its position, counted from 0.
        failure: why the photo cannot be used; empty if it can.
    """

    photo: Photo
    size_px: tuple[int, int]
    perceptual_hash: str
    content_hash: str
    instances: tuple[SceneInstance, ...]
    failure: str = ""

    @property
    def annotated(self) -> list[AnnotatedInstance]:
        """The instances as the generator of expressions takes them."""
        return [each.annotated for each in self.instances]


@dataclass(frozen=True)
class _SceneArrays:
    """The scenes of P photos as flat arrays; those of one photo follow those of the previous one.

    Attributes:
        counts: (P,) number of instances.
        sizes_px: (P, 2) width and height.
        hashes: (P, 2) perceptual hash and content hash.
        failures: (P,) why a photo cannot be used; empty text if it can.
        boxes, scores, colors: (J, 4), (J,) and (J,).
        categories: (J,) class names.
        shares: (J, C).
        vectors: (J, D); NaN if unknown.
    """

    counts: npt.NDArray[np.int64]
    sizes_px: npt.NDArray[np.int64]
    hashes: npt.NDArray[np.str_]
    failures: npt.NDArray[np.str_]
    boxes: FloatArray
    scores: FloatArray
    categories: npt.NDArray[np.str_]
    colors: npt.NDArray[np.str_]
    shares: FloatArray
    vectors: FloatArray

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays under the names that they are saved by."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> _SceneArrays:
        """Inverse of `to_arrays`; raises `KeyError` if an array is missing."""
        return cls(**{each.name: arrays[each.name] for each in fields(cls)})

    def scenes(self, photos: Sequence[Photo]) -> Iterator[Scene]:
        """Yield the scenes of these photos."""
        ends = np.cumsum(self.counts)
        for row, (photo, end) in enumerate(zip(photos, ends.tolist(), strict=True)):
            rows = range(end - int(self.counts[row]), end)
            annotations = photo.instances if photo.annotated_px else (None,) * len(rows)
            width, height = self.sizes_px[row].tolist()
            yield Scene(
                photo=photo,
                size_px=(width, height),
                perceptual_hash=str(self.hashes[row, 0]),
                content_hash=str(self.hashes[row, 1]),
                instances=tuple(
                    self._instance(at, annotation)
                    # A photo that cannot be decoded has annotations, but no rows.
                    for at, annotation in zip(rows, annotations, strict=False)
                ),
                failure=str(self.failures[row]),
            )

    def _instance(self, row: int, annotation: ReferringInstance | None) -> SceneInstance:
        x1, y1, x2, y2 = self.boxes[row].tolist()
        vector = self.vectors[row]
        certain = bool(self.scores[row] >= CERTAIN_SCORE)
        category = str(self.categories[row])
        return SceneInstance(
            category=category,
            box=(x1, y1, x2, y2),
            # The class "orange" is named like a color: "orange orange" says nothing.
            color="" if category in COLOR_WORDS else str(self.colors[row]),
            color_shares=self.shares[row],
            vector=None if np.isnan(vector).any() else vector,
            certain=certain,
            described=certain and (x2 - x1) * (y2 - y1) >= MIN_AREA,
            annotation=annotation,
        )


@dataclass(frozen=True, kw_only=True)
class _Found:
    """The instances of one photo before they are put into arrays; see `_SceneArrays`."""

    boxes: FloatArray
    scores: FloatArray
    categories: tuple[str, ...]
    vectors: FloatArray


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """One photo before it is put into arrays; see `_SceneArrays`."""

    size_px: tuple[int, int] = (0, 0)
    hashes: tuple[str, str] = ("", "")
    failure: str = ""
    found: _Found
    grids: tuple[FloatArray, ...] = ()


class SceneReader:
    """Reads scenes from photos.

    Args:
        encoder: finds instances and encodes them. For photos without annotations it must also name
            their classes, as the shipped checkpoint does.
        work: folder that keeps finished scenes.
    """

    def __init__(self, encoder: InstanceEncoder, work: Path) -> None:
        self._encoder, self._work = encoder, work

    def read(
        self, photos: Sequence[Photo], progress: Progress = lambda _done, _all: None
    ) -> list[Scene]:
        """Return the scene of each photo, in the order given.

        Raises:
            ConfigError: a photo has no annotations, and the encoder cannot name classes.
            DataError: the folder for finished scenes cannot be created.
        """
        finished = WorkFolder(_SceneArrays, self._work, self._about(photos))
        scenes: list[Scene] = []
        for number, start in enumerate(range(0, len(photos), _SHARD_PHOTOS)):
            part = photos[start : start + _SHARD_PHOTOS]
            arrays = finished.load(number)
            if arrays is None:
                seen = []
                for photo in part:
                    seen.append(self._see(photo))
                    progress(start + len(seen), len(photos))
                arrays = _flat(seen)
                finished.save(number, arrays)
            scenes += arrays.scenes(part)
            # For a shard that an earlier run has finished, nothing else reports its photos.
            progress(len(scenes), len(photos))
        return scenes

    def _about(self, photos: Sequence[Photo]) -> dict[str, Any]:
        """Return what the scenes depend on: the model, the files and their annotations."""
        listed = hashlib.sha256()
        for photo in photos:
            status = photo.path.stat() if photo.path.exists() else None
            # A hash of the content would be surer, but takes reading every photo in each rerun.
            changed = (status.st_size, status.st_mtime_ns) if status else None
            boxes = [(each.box_xyxy_px, each.category) for each in photo.instances]
            listed.update(repr((photo.file_name, changed, photo.annotated_px, boxes)).encode())
        # `format` has to be raised with every change of what a shard contains.
        return {"digest": self._encoder.digest, "format": 2, "photos": listed.hexdigest()}

    def _see(self, photo: Photo) -> _Seen:
        try:
            data = read_bytes(photo.path)
            image = decode(data)
            hashes = (perceptual_hash(image.pixels), content_hash(data))
        except (ImageError, MemoryError) as error:
            return _Seen(failure=str(failure_of(error)), found=self._nothing())
        see = self._annotated if photo.annotated_px else self._candidates
        found = see(photo, image.pixels)
        return _Seen(
            size_px=(image.width_px, image.height_px),
            hashes=hashes,
            found=found,
            grids=tuple(_mean_colors(image.pixels, box) for box in found.boxes),
        )

    def _nothing(self) -> _Found:
        empty = np.empty((0, 4), np.float32)
        vectors = np.empty((0, self._encoder.dim), np.float32)
        return _Found(boxes=empty, scores=empty[:, 0], categories=(), vectors=vectors)

    def _annotated(self, photo: Photo, pixels: RgbImage) -> _Found:
        assert photo.annotated_px is not None, "only annotated photos have annotated boxes"
        # Width, height, width, height: what each of x1, y1, x2, y2 is divided by.
        sides = np.array(photo.annotated_px * 2, dtype=np.float32)
        boxes_px = np.array([each.box_xyxy_px for each in photo.instances], dtype=np.float32)
        # Reshaped for photos without instances, for which the array is (0,).
        boxes = np.clip(boxes_px.reshape(-1, 4) / sides, 0, 1)
        (found,) = self._encoder.encode_images([pixels])
        return _Found(
            boxes=boxes,
            scores=np.ones(len(boxes), np.float32),
            categories=tuple(each.category or "" for each in photo.instances),
            vectors=_matched(found, boxes),
        )

    def _candidates(self, photo: Photo, pixels: RgbImage) -> _Found:
        if not isinstance(self._encoder, ClassifyingEncoder):
            raise ConfigError(
                f"{photo.path} has no annotations, and this checkpoint does not name the classes "
                f"of what it finds; use the shipped checkpoint, or photos with boxes"
            )
        ((found, class_scores),) = self._encoder.encode_with_classes([pixels])
        best = class_scores.max(axis=1, initial=0.0)
        kept = _distinct(found.boxes, best, class_scores.argmax(axis=1))
        return _Found(
            boxes=found.boxes[kept],
            scores=best[kept],
            categories=tuple(COCO_CLASSES[i] for i in class_scores[kept].argmax(axis=1)),
            vectors=found.vectors[kept],
        )


def _distinct(boxes: FloatArray, scores: FloatArray, classes: npt.NDArray[np.int64]) -> list[int]:
    """Return the candidates with at least `SEEN_SCORE` that are not a part of a better one."""
    kept: list[int] = []
    for one in np.argsort(-scores, kind="stable").tolist():
        better = [other for other in kept if classes[other] == classes[one]]
        low = np.maximum(boxes[better, :2], boxes[one, :2])
        high = np.minimum(boxes[better, 2:], boxes[one, 2:])
        # Not the IoU, which is small for a part within the whole, such as an upper body.
        shared = np.maximum(high - low, 0).prod(axis=1)
        smaller = np.minimum(area(boxes[better]), area(boxes[one]))
        if scores[one] >= SEEN_SCORE and not (shared >= SAME_SHARE * smaller).any():
            kept.append(one)
    return kept


def _flat(photos: Sequence[_Seen]) -> _SceneArrays:
    grids = [grid for each in photos for grid in each.grids]
    found = [each.found for each in photos]
    return _SceneArrays(
        counts=np.array([len(each.boxes) for each in found], dtype=np.int64),
        sizes_px=np.array([each.size_px for each in photos], dtype=np.int64),
        hashes=np.array([each.hashes for each in photos], dtype=np.str_),
        failures=np.array([each.failure for each in photos], dtype=np.str_),
        boxes=np.concatenate([each.boxes for each in found]),
        scores=np.concatenate([each.scores for each in found]),
        categories=np.array([c for each in found for c in each.categories], dtype=np.str_),
        colors=np.array([_clear_color(grid) for grid in grids], dtype=np.str_),
        shares=np.array([_shares(grid) for grid in grids], np.float32).reshape(
            -1, len(COLOR_WORDS)
        ),
        vectors=np.concatenate([each.vectors for each in found]),
    )


def _matched(found: Instances, boxes: FloatArray) -> FloatArray:
    """(N, D) vectors of the candidates that overlap the boxes most; NaN below `MATCH_IOU`."""
    vectors = np.full((len(boxes), found.vectors.shape[1]), np.nan, dtype=np.float32)
    if len(found) and len(boxes):
        overlap = pairwise_iou(boxes, found.boxes)
        best = overlap.argmax(axis=1)
        clear = overlap.max(axis=1) >= MATCH_IOU
        vectors[clear] = found.vectors[best[clear]]
    return vectors


def _mean_colors(pixels: RgbImage, box: FloatArray) -> FloatArray:
    """(8, 8, 3) mean RGB in [0, 1] of a grid over a box."""
    height, width = pixels.shape[:2]
    x1, y1 = int(box[0] * width), int(box[1] * height)
    # At least one pixel, also for a box that is narrower or that lies at the right or lower edge.
    x2, y2 = max(x1 + 1, round(box[2] * width)), max(y1 + 1, round(box[3] * height))
    crop = Image.fromarray(pixels[min(y1, height - 1) : y2, min(x1, width - 1) : x2])
    grid = np.asarray(crop.resize((_GRID, _GRID), Image.Resampling.BOX), np.float32)
    return grid / np.float32(255)


def _clear_color(grid: FloatArray) -> str:
    # Means of 2 x 2 cells make the (4, 4, 3) grid that `central_color` takes.
    return central_color(grid.reshape(4, _GRID // 4, 4, _GRID // 4, 3).mean(axis=(1, 3)))


def _shares(grid: FloatArray) -> list[float]:
    words = [color_word(cell) for cell in grid.reshape(-1, 3).tolist()]
    return [words.count(word) / len(words) for word in COLOR_WORDS]

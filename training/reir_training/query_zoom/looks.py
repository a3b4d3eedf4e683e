"""The mosaics that a zoom policy is trained on, and a cache of looks at them.

Looks do not depend on the expression, so each of them is encoded once for all expressions. Photos
of several sources that show the same file become one. Large photos are shrunk, so that a mosaic has
room for any number of them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from reir.datasets.dataset import (
    Expression,
    ReferringDataset,
    ReferringImage,
    ReferringInstance,
)
from reir.images.decode import decode, fitted_size, read_bytes
from reir.models.interfaces import InstanceEncoder
from reir.models.query_zoom.frames import WHOLE, FrameGrid
from reir.models.query_zoom.looks import Look, look_at
from reir.records import FloatArray, RgbImage
from reir_training.data.examples import TrainPhoto
from reir_training.zoom.mosaics import MosaicSet, MosaicSettings

ROOT = Path("/")
"""Folder of the photos of mosaics, whose names are absolute paths."""


@dataclass(frozen=True)
class Target:
    """An expression, and the instance of a mosaic that it describes.

    Attributes:
        mosaic: number of the mosaic.
        text: the expression.
        box: (4,) xyxy in [0, 1] of the mosaic.
    """

    mosaic: int
    text: str
    box: FloatArray


class ZoomMosaics:
    """Mosaics of annotated photos, with what is searched for in them.

    Args:
        photos: annotated photos; only as many as fit are used.
        num_mosaics: maximum number of mosaics.
        seed: of all random choices.

    Raises:
        ConfigError: there are too few photos for a mosaic.

    Attributes:
        mosaics: their plans.
        targets: what is searched for.
    """

    def __init__(self, photos: Sequence[TrainPhoto], num_mosaics: int, seed: int) -> None:
        settings, photos = MosaicSettings(), _one_per_file(photos)
        order = np.random.default_rng(seed).permutation(len(photos)).tolist()
        # Enough even if all mosaics have the largest number of photos. Others would be opened for
        # nothing, since `dataset_of` reads the size of each.
        most = num_mosaics * settings.num_photos[1]
        dataset = dataset_of([photos[i] for i in order[:most]], _photo_px(settings))
        self._set = MosaicSet(dataset, ROOT, settings, seed=seed)
        self.mosaics = self._set.mosaics[:num_mosaics]
        places = {each.image.image_id: number for number, each in enumerate(self.mosaics)}
        found = self._set.dataset
        self.targets: tuple[Target, ...] = tuple(
            Target(
                places[each.image_id],
                each.text,
                _unit_box(found.instances_by_id[each.instance_id], found),
            )
            for each in found.expressions
            if each.image_id in places and each.instance_id is not None
        )

    def grid(self, number: int) -> FrameGrid:
        """Return the frames of a mosaic."""
        image = self.mosaics[number].image
        return FrameGrid(image.width_px, image.height_px)

    def frames(self, number: int) -> list[FloatArray]:
        """Return the (4,) frames of a mosaic that are encoded.

        They are the whole mosaic, all frames of the first level, and of the others those around
        the described instances.
        """
        grid = self.grid(number)
        boxes = np.array([each.box for each in self.targets if each.mosaic == number])
        centers = boxes.reshape(-1, 2, 2).mean(1).astype(np.float32)
        frames = [WHOLE]
        for level in range(len(grid.sides_px)):
            frames += grid.every(level) if level == 0 else list(grid.around(level, centers))
        # Neighboring instances share frames, which are encoded once.
        return [np.array(each) for each in dict.fromkeys(map(tuple, frames))]

    def draw(self, number: int) -> RgbImage:
        """Return the (H, W, 3) pixels of a mosaic.

        Raises:
            ImageError: one of its photos cannot be read.
        """
        return self._set.draw(number)

    def look(self, encoder: InstanceEncoder, number: int) -> list[Look]:
        """Encode the frames of a mosaic.

        Raises:
            ImageError: one of its photos cannot be read.
        """
        pixels = self.draw(number)
        return [look_at(encoder, pixels, frame) for frame in self.frames(number)]


def _one_per_file(photos: Sequence[TrainPhoto]) -> list[TrainPhoto]:
    """Return one photo for each file, with all of its boxes and expressions.

    In a mosaic, a second copy of a photo would also be what an expression describes.
    """
    same: dict[Path, TrainPhoto] = {}
    for photo in photos:
        path = photo.path.resolve()
        same[path] = _joined(same[path], photo) if path in same else photo
    return list(same.values())


def _joined(one: TrainPhoto, other: TrainPhoto) -> TrainPhoto:
    """Return the first photo with the boxes and expressions of both.

    Nothing else is joined: mosaics do not use it. Masks are left out, since there would not be one
    for each box.
    """
    moved = (replace(each, box=each.box + len(one.boxes)) for each in other.expressions)
    return replace(
        one,
        boxes=np.concatenate([one.boxes, other.boxes]),
        categories=np.concatenate([one.categories, other.categories]),
        names=(*one.names, *other.names),
        expressions=(*one.expressions, *moved),
        masks=(),
    )


def _photo_px(settings: MosaicSettings) -> int:
    """Return the longest side of photos of which any mosaic has room for the largest number."""
    per_row = math.isqrt(settings.num_photos[1] - 1) + 1
    return settings.side_px[0] // per_row


def dataset_of(photos: Sequence[TrainPhoto], longest_px: int) -> ReferringDataset:
    """Return training photos as a data set of absolute file names.

    Args:
        photos: of different files.
        longest_px: photos with a longer side are listed with this one.

    Raises:
        ImageError: the size of a photo cannot be read.
    """
    images, instances, expressions = [], [], []
    for photo in photos:
        name = str(photo.path.absolute())
        # The size of the file and not the annotated one, because mosaics copy its pixels. These are
        # not needed here, so as few as possible are decoded.
        found = decode(read_bytes(photo.path), at_least_px=1)
        size_px = found.width_px, found.height_px
        if max(size_px) > longest_px:
            size_px = fitted_size(*size_px, longest_px, longest_px)
        images.append(
            ReferringImage(image_id=name, file_name=name, width_px=size_px[0], height_px=size_px[1])
        )
        for row, box in enumerate(photo.boxes * np.tile(size_px, 2)):
            x1, y1, x2, y2 = box.tolist()
            instances.append(
                ReferringInstance(
                    instance_id=f"{name}#{row}", image_id=name, box_xyxy_px=(x1, y1, x2, y2)
                )
            )
        for row, each in enumerate(photo.expressions):
            expressions.append(
                Expression(
                    expression_id=f"{name}#{row}",
                    image_id=name,
                    instance_id=f"{name}#{each.box}",
                    text=each.text,
                    kind=each.kind,
                )
            )
    return ReferringDataset(
        source="the training photos",
        images=tuple(images),
        instances=tuple(instances),
        expressions=tuple(expressions),
    )


def _unit_box(instance: ReferringInstance, dataset: ReferringDataset) -> FloatArray:
    image = dataset.images_by_id[instance.image_id]
    sides = np.tile([image.width_px, image.height_px], 2)
    return np.asarray(np.array(instance.box_xyxy_px) / sides, dtype=np.float32)


def build_look_cache(
    root: Path,
    encoder: InstanceEncoder,
    mosaics: ZoomMosaics,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Path:
    """Encode the frames of all mosaics that are not encoded yet, and return the folder.

    Args:
        root: folder that contains the caches.
        encoder: that of the checkpoint.
        mosaics: of the run.
        on_progress: called with the number of finished mosaics.

    Raises:
        ImageError: a photo cannot be read.
    """
    folder = root / _fingerprint(encoder, mosaics)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(len(mosaics.mosaics)):
        path = looks_path(folder, number)
        if not path.exists():
            save_looks(path, mosaics.look(encoder, number))
        on_progress(number + 1)
    return folder


def read_looks(path: Path) -> list[Look]:
    """Return the looks of a file in their order."""
    with np.load(path) as stored:
        ends = np.cumsum(stored["counts"])[:-1]
        parts = (np.split(stored[name], ends) for name in ("boxes", "objectness", "vectors"))
        return [
            Look(frame, boxes, objectness, vectors.astype(np.float32))
            for frame, boxes, objectness, vectors in zip(stored["frames"], *parts, strict=True)
        ]


def save_looks(path: Path, looks: Sequence[Look]) -> None:
    """Write looks to a file."""
    # Renamed when complete, so that an interrupted run leaves no damaged file.
    unfinished = path.with_suffix(".unfinished.npz")
    np.savez(
        unfinished,
        counts=[len(look.boxes) for look in looks],
        frames=np.stack([look.frame for look in looks]),
        boxes=np.concatenate([look.boxes for look in looks]),
        objectness=np.concatenate([look.objectness for look in looks]),
        # Half precision, which halves the disk space; the error is about .1 %.
        vectors=np.concatenate([look.vectors for look in looks]).astype(np.float16),
    )
    unfinished.rename(path)


def looks_path(folder: Path, number: int) -> Path:
    """Return the file of the looks at a mosaic."""
    return folder / f"{number:05}.npz"


def _fingerprint(encoder: InstanceEncoder, mosaics: ZoomMosaics) -> str:
    """Return the name of the cache: a hash of all that determines the looks."""
    digest = hashlib.sha256(encoder.digest.encode())
    for number in range(len(mosaics.mosaics)):
        # The pixels themselves, and not the names of the photos: a file may have changed. Drawing
        # takes little time compared with encoding.
        pixels = mosaics.draw(number)
        digest.update(json.dumps(pixels.shape).encode())
        digest.update(pixels.tobytes())
        digest.update(np.stack(mosaics.frames(number)).tobytes())
    return digest.hexdigest()[:16]

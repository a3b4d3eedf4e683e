"""`MosaicSet`: annotated photos combined into large pictures, in which every instance is small.

Photos have the size that their data set lists, to which larger files are shrunk, and lie at random
places without overlap. Their annotated instances become instances of the mosaic. Of the
expressions, only those are kept whose kind is unique in a whole gallery, because one that is unique
within its photo may describe several instances of the mosaic. Words for a place ("on the left")
still refer to the photo, which makes such expressions harder for every way to search alike.
"""

# Shapes: P photos of a mosaic, H x W pixels

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from reir.datasets.dataset import (
    Expression,
    ReferringDataset,
    ReferringImage,
    ReferringInstance,
)
from reir.errors import ConfigError, DataError
from reir.images.decode import fitted_size, read_image
from reir.records import RgbImage

Background = Literal["plain", "texture"]
PATCH_PX = 96
"""Side of the part of a photo that is repeated as a background."""
_TRIES = 50


@dataclass(frozen=True, kw_only=True)
class MosaicSettings:
    """How photos are combined.

    Attributes:
        num_photos: smallest and largest number of photos in a mosaic; each number is as likely.
        side_px: smallest and largest side of a mosaic; width and height are drawn separately.
        dense: fill the mosaic with as many photos as it has room for, instead of `num_photos`.
        backgrounds: "plain" is one color; "texture" repeats a part of a photo without annotated
            instances. Each is as likely.
        kind: kind of the expressions that are kept; None keeps all.

    Raises:
        ConfigError: a range is empty, or there is no such background.
    """

    num_photos: tuple[int, int] = (6, 16)
    side_px: tuple[int, int] = (3000, 4000)
    dense: bool = False
    backgrounds: tuple[Background, ...] = ("plain", "texture")
    kind: str | None = "long"

    def __post_init__(self) -> None:
        """Check the values."""
        for name, low in (("num_photos", 1), ("side_px", PATCH_PX)):
            first, last = getattr(self, name)
            if not low <= first <= last:
                raise ConfigError(
                    f"{name} must be two ascending numbers from {low} on, got {first}, {last}"
                )
        known = get_args(Background)
        if not self.backgrounds or not set(self.backgrounds) <= set(known):
            raise ConfigError(f"backgrounds must be some of {known}, got {self.backgrounds}")


@dataclass(frozen=True, kw_only=True)
class Mosaic:
    """The plan of one mosaic.

    Attributes:
        image: the mosaic as a photo of its data set.
        photos: the P photos in it.
        frames_px: (P, 4) xyxy of the photos, in pixels of the mosaic.
        background: its kind.
        seed: of its background.
    """

    image: ReferringImage
    photos: tuple[ReferringImage, ...]
    frames_px: npt.NDArray[np.int64]
    background: Background
    seed: tuple[int, int]


class MosaicSet:
    """Mosaics of the photos of a data set, each photo in at most one of them.

    The same arguments give the same mosaics. They are planned at once and drawn on demand.

    Args:
        photos: annotated photos, for example of one split.
        folder: of their image files.
        settings: how they are combined. Photos that are left over, too few for a mosaic, are not
            used.
        seed: of all random choices.

    Raises:
        ConfigError: a mosaic has too little room for its photos, or there are too few photos.
    """

    def __init__(
        self,
        photos: ReferringDataset,
        folder: Path,
        settings: MosaicSettings | None = None,
        *,
        seed: int = 0,
    ) -> None:
        self.settings = settings or MosaicSettings()
        self._photos, self._folder, self._seed = photos, folder, seed
        self.mosaics: tuple[Mosaic, ...] = tuple(self._plan())
        if not self.mosaics:
            raise ConfigError(
                f"{photos.source} has {len(photos.images)} photos, too few for one mosaic; use "
                f"more photos, or lower num_photos (now {self.settings.num_photos})"
            )

    def __len__(self) -> int:
        """Return the number of mosaics."""
        return len(self.mosaics)

    @cached_property
    def dataset(self) -> ReferringDataset:
        """The mosaics as photos, with instances and expressions under their own ids."""
        instances: list[ReferringInstance] = []
        expressions: list[Expression] = []
        owner = {}
        for mosaic in self.mosaics:
            for photo, frame in zip(mosaic.photos, mosaic.frames_px, strict=True):
                owner[photo.image_id] = (mosaic.image.image_id, frame[:2].tolist())
        for each in self._photos.instances:
            if each.image_id in owner:
                name, (x, y) = owner[each.image_id]
                x1, y1, x2, y2 = each.box_xyxy_px
                box = (x1 + x, y1 + y, x2 + x, y2 + y)
                # Without masks, whose pixels are those of the photo and not those of the mosaic.
                instances.append(replace(each, image_id=name, box_xyxy_px=box, mask=None))
        for text in self._photos.expressions:
            if text.image_id in owner and self.settings.kind in (None, text.kind):
                expressions.append(replace(text, image_id=owner[text.image_id][0]))
        return ReferringDataset(
            source=f"mosaics of {self._photos.source}",
            images=tuple(each.image for each in self.mosaics),
            instances=tuple(instances),
            expressions=tuple(expressions),
        )

    def draw(self, number: int) -> RgbImage:
        """Return the (H, W, 3) pixels of a mosaic.

        Raises:
            DataError: a photo has another aspect ratio than listed, or is smaller.
            ImageError: a photo cannot be read.
        """
        mosaic = self.mosaics[number]
        photos = [
            _shrunk(self._folder / each.file_name, each.width_px, each.height_px)
            for each in mosaic.photos
        ]
        pixels = self._background(mosaic, photos)
        for photo, (x1, y1, x2, y2) in zip(photos, mosaic.frames_px.tolist(), strict=True):
            pixels[y1:y2, x1:x2] = photo
        return pixels

    def write(self, folder: Path) -> None:
        """Write the mosaics as PNG files under the names that `dataset` has for them."""
        folder.mkdir(parents=True, exist_ok=True)
        for number, mosaic in enumerate(self.mosaics):
            Image.fromarray(self.draw(number)).save(folder / mosaic.image.file_name)

    def _plan(self) -> Iterator[Mosaic]:
        """Yield mosaics until the photos are used up."""
        rng = np.random.default_rng(self._seed)
        order = rng.permutation(len(self._photos.images)).tolist()
        waiting = [self._photos.images[i] for i in order]
        while waiting:
            number = int(rng.integers(2**31))
            width_px, height_px = rng.integers(*self.settings.side_px, size=2, endpoint=True)
            # With room for any waiting photo: how many of them are taken depends on these cells.
            cells = _Cells(int(width_px), int(height_px), waiting)
            wanted = int(rng.integers(*self.settings.num_photos, endpoint=True))
            # At least one, so that a photo without room is refused below.
            wanted = max(len(cells), 1) if self.settings.dense else wanted
            if wanted > len(cells):
                raise ConfigError(
                    f"a mosaic of {width_px} x {height_px} px has room for {len(cells)} photos of "
                    f"up to {cells.photo_px[0]} x {cells.photo_px[1]} px, but {wanted} are wanted; "
                    f"use a larger side_px, smaller photos, or fewer num_photos"
                )
            if len(waiting) < min(wanted, self.settings.num_photos[0]):
                return
            chosen, waiting = waiting[:wanted], waiting[wanted:]
            yield Mosaic(
                image=ReferringImage(
                    image_id=f"mosaic-{number:010}",
                    file_name=f"mosaic-{number:010}.png",
                    width_px=int(width_px),
                    height_px=int(height_px),
                ),
                photos=tuple(chosen),
                frames_px=cells.place(chosen, rng),
                background=self.settings.backgrounds[
                    int(rng.integers(len(self.settings.backgrounds)))
                ],
                seed=(self._seed, number),
            )

    def _background(self, mosaic: Mosaic, photos: Sequence[RgbImage]) -> RgbImage:
        """Return a new picture of the mosaic's size."""
        rng = np.random.default_rng(mosaic.seed)
        height_px, width_px = mosaic.image.height_px, mosaic.image.width_px
        patch = self._patch(mosaic, photos, rng) if mosaic.background == "texture" else None
        if patch is None:
            pixels = np.empty((height_px, width_px, 3), dtype=np.uint8)
            pixels[:] = rng.integers(256, size=3)
            return pixels
        # Mirrored, so that the copies meet without an edge.
        pair = np.concatenate([patch, patch[:, ::-1]], axis=1)
        block = np.concatenate([pair, pair[::-1]])
        copies = (-(-height_px // len(block)), -(-width_px // block.shape[1]), 1)
        return np.tile(block, copies)[:height_px, :width_px]

    def _patch(
        self, mosaic: Mosaic, photos: Sequence[RgbImage], rng: np.random.Generator
    ) -> RgbImage | None:
        """Return a square of a photo without annotated instances; None if none is found."""
        for _ in range(_TRIES):
            place = int(rng.integers(len(photos)))
            height_px, width_px = photos[place].shape[:2]
            if min(height_px, width_px) < PATCH_PX:
                continue
            y, x = (int(rng.integers(side - PATCH_PX + 1)) for side in (height_px, width_px))
            boxes = self._boxes_px[mosaic.photos[place].image_id]
            apart = (boxes[:, :2] >= (x + PATCH_PX, y + PATCH_PX)) | (boxes[:, 2:] <= (x, y))
            if apart.any(axis=1).all():
                return photos[place][y : y + PATCH_PX, x : x + PATCH_PX]
        return None

    @cached_property
    def _boxes_px(self) -> dict[str, npt.NDArray[np.float64]]:
        """Photo id -> the (N, 4) boxes of its annotated instances."""
        boxes: dict[str, list[Sequence[float]]] = {
            each.image_id: [] for each in self._photos.images
        }
        for each in self._photos.instances:
            boxes[each.image_id].append(each.box_xyxy_px)
        return {name: np.array(found).reshape(-1, 4) for name, found in boxes.items()}


def _shrunk(path: Path, width_px: int, height_px: int) -> RgbImage:
    """Read a photo in the listed size.

    Raises:
        DataError: the photo would be stretched or enlarged.
        ImageError: it cannot be read.
    """
    photo, size = read_image(path), (width_px, height_px)
    file_height_px, file_width_px = photo.shape[:2]
    if size == (file_width_px, file_height_px):
        return photo
    fitting = fitted_size(file_width_px, file_height_px, max(size), max(size))
    if size != fitting or width_px > file_width_px:
        # The boxes would lie elsewhere, for example if a camera turned the photo by its metadata.
        raise DataError(
            f"{path} has {file_width_px} x {file_height_px} px, but is listed as "
            f"{width_px} x {height_px} px; list the size of the upright photo, or of a smaller one "
            f"with the same aspect ratio"
        )
    return np.asarray(Image.fromarray(photo).resize(size, Image.Resampling.LANCZOS))


class _Cells:
    """A grid over a mosaic; each cell has room for any of the photos.

    Args:
        width_px, height_px: of the mosaic.
        photos: those that may be placed.
    """

    def __init__(self, width_px: int, height_px: int, photos: Sequence[ReferringImage]) -> None:
        self.photo_px = (
            max(each.width_px for each in photos),
            max(each.height_px for each in photos),
        )
        columns, rows = width_px // self.photo_px[0], height_px // self.photo_px[1]
        self._cells = list(product(range(columns), range(rows)))
        # `max` is for a mosaic without room for a photo: it has no cells, so any size will do.
        self._side_px = (width_px / max(columns, 1), height_px / max(rows, 1))

    def __len__(self) -> int:
        """Return the number of cells."""
        return len(self._cells)

    def place(
        self, photos: Sequence[ReferringImage], rng: np.random.Generator
    ) -> npt.NDArray[np.int64]:
        """Return (P, 4) xyxy: each photo at a random place within a cell of its own."""
        frames = []
        chosen = rng.permutation(len(self._cells))[: len(photos)].tolist()
        for photo, number in zip(photos, chosen, strict=True):
            size_px = (photo.width_px, photo.height_px)
            start = [
                # Both parts are rounded down, so that no photo reaches into the next cell.
                int(index * side) + int(rng.integers(int(side) - length + 1))
                for index, side, length in zip(
                    self._cells[number], self._side_px, size_px, strict=True
                )
            ]
            frames.append((*start, start[0] + size_px[0], start[1] + size_px[1]))
        return np.array(frames, dtype=np.int64)

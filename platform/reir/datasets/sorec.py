"""Reads SOREC as published: one JSON list for each split, about large photos of SODA-D.

The lists `trainS.json`, `trainL.json`, `val.json`, `testA.json` and `testB.json` have entries with
`image` (the name of a photo), `bbox` ([left, top, width, height] in its pixels), `ref` (the
expression) and `id`. Entries about the same box of the same photo describe one instance.

The lists do not state the sizes of photos, so these are taken from the photos themselves, which
must have the size that they were annotated at.
"""

from __future__ import annotations

import logging
from pathlib import Path, PurePosixPath

from reir.datasets.dataset import (
    BoxPx,
    Expression,
    ReferringDataset,
    ReferringImage,
    ReferringInstance,
    is_inside,
)
from reir.datasets.json_entries import Entry, read_list
from reir.datasets.photo_sizes import measured_photo
from reir.errors import DataError

logger = logging.getLogger(__name__)

_MAX_NAME_BYTES = 255  # the limit of common file systems


def read_sorec(
    path: str | Path, images_dir: str | Path, *, skip_missing: bool = False
) -> ReferringDataset:
    """Read the expressions of one split, and the sizes of their photos. There are no masks.

    Args:
        path: the JSON file of the split.
        images_dir: folder of the photos.
        skip_missing: leave out expressions whose photo is not in the folder, with a warning that
            states how many, instead of raising an error.

    Raises:
        DataError: the file is malformed; the message names file, entry and key. Or photos are
            missing or cannot be decoded.
    """
    entries = read_list(path)
    if not entries:
        raise DataError(f"{path} has no entries; expected one for each expression")
    names = [_photo_name(entry) for entry in entries]
    folder = Path(images_dir)
    missing = _missing_photos(path, names, folder, skip_missing=skip_missing)
    images: dict[str, ReferringImage] = {}
    instances: dict[tuple[str, BoxPx], ReferringInstance] = {}
    expressions: dict[str, Expression] = {}
    for entry, name in zip(entries, names, strict=True):
        expression_id = entry.identifier("id")
        if expression_id in expressions:
            entry.fail("id", "an id that no earlier entry has")
        text, box = entry.sentence("ref"), entry.box("bbox")
        if name in missing:
            continue
        if name not in images:
            images[name] = measured_photo(entry, "image", folder, name, image_id=name)
        instance = instances.setdefault(
            (name, box),
            ReferringInstance(instance_id=expression_id, image_id=name, box_xyxy_px=box),
        )
        if not is_inside(images[name], box):
            size = f"{images[name].width_px} x {images[name].height_px} px"
            entry.fail("bbox", f"a box with an area inside its photo, which has {size}")
        expressions[expression_id] = Expression(
            expression_id=expression_id,
            image_id=name,
            instance_id=instance.instance_id,
            text=text,
        )
    return ReferringDataset(
        source=str(path),
        images=tuple(images.values()),
        instances=tuple(instances.values()),
        expressions=tuple(expressions.values()),
    )


def _photo_name(entry: Entry) -> str:
    """Return the file name of an entry's photo, which must not point outside of the folder."""
    name = entry.text("image")
    is_plain = PurePosixPath(name).name == name and name != ".." and name.isprintable()
    if not is_plain or len(name.encode()) > _MAX_NAME_BYTES:
        entry.fail("image", "the name of a photo without a folder, such as 10849.jpg")
    return name


def _missing_photos(
    path: str | Path, names: list[str], images_dir: Path, *, skip_missing: bool
) -> set[str]:
    """Return the names of photos that are not in the folder; see `read_sorec`."""
    photos = dict.fromkeys(names)
    missing = [name for name in photos if not (images_dir / name).exists()]
    if not missing:
        return set()
    what = (
        f"{len(missing):,} of {len(photos):,} photos of {path} are not in {images_dir}, "
        f"e.g. {missing[0]}"
    )
    if not skip_missing:
        raise DataError(
            f"{what}; add them, or leave out their expressions with --skip-missing "
            f"(in Python: skip_missing=True)"
        )
    if len(missing) == len(photos):
        raise DataError(f"{what}; there is nothing to measure without any photo")
    left_out = sum(name in set(missing) for name in names)
    logger.warning(
        "%s; %s of %s expressions are left out", what, f"{left_out:,}", f"{len(names):,}"
    )
    return set(missing)

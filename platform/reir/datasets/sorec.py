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
)
from reir.datasets.json_entries import Entry, read_list
from reir.datasets.photo_sizes import absent_photos, box_inside, measured_photo
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
    entries = _entries(path)
    folder = Path(images_dir)
    missing = _missing_photos(path, list(entries.values()), folder, skip_missing=skip_missing)
    images: dict[str, ReferringImage] = {}
    instances: dict[tuple[str, BoxPx], ReferringInstance] = {}
    expressions: list[Expression] = []
    for expression_id, entry in entries.items():
        name = entry.text("image")
        if name in missing:
            continue
        if name not in images:
            images[name] = measured_photo(entry, "image", folder, name, image_id=name)
        box = box_inside(entry, "bbox", images[name])
        instance = instances.setdefault(
            (name, box),
            ReferringInstance(instance_id=expression_id, image_id=name, box_xyxy_px=box),
        )
        expressions.append(
            Expression(
                expression_id=expression_id,
                image_id=name,
                instance_id=instance.instance_id,
                text=entry.sentence("ref"),
            )
        )
    return ReferringDataset(
        source=str(path),
        images=tuple(images.values()),
        instances=tuple(instances.values()),
        expressions=tuple(expressions),
    )


def _entries(path: str | Path) -> dict[str, Entry]:
    """Return the entries by id, after checking everything that does not depend on photos."""
    entries: dict[str, Entry] = {}
    for entry in read_list(path):
        expression_id = entry.identifier("id")
        if expression_id in entries:
            entry.fail("id", "an id that no earlier entry has")
        if not _is_photo_name(entry.text("image")):
            entry.fail("image", "the name of a photo without a folder, such as 10849.jpg")
        entry.box("bbox")
        entry.sentence("ref")
        entries[expression_id] = entry
    if not entries:
        raise DataError(f"{path} has no entries; expected one for each expression")
    return entries


def _is_photo_name(name: str) -> bool:
    """Return whether a file of this name lies in the folder of photos itself."""
    # Printable, so that it has no lone surrogates, which `encode` in the next line would refuse.
    is_plain = PurePosixPath(name).name == name and name != ".." and name.isprintable()
    return is_plain and len(name.encode()) <= _MAX_NAME_BYTES


def _missing_photos(
    path: str | Path, entries: list[Entry], images_dir: Path, *, skip_missing: bool
) -> frozenset[str]:
    """Return the names of photos that are not in the folder; see `read_sorec`."""
    names = [entry.text("image") for entry in entries]
    missing, what = absent_photos(path, names, images_dir)
    if not missing:
        return missing
    if not skip_missing:
        raise DataError(
            f"{what}; add them, or leave out their expressions with --skip-missing "
            f"(in Python: skip_missing=True)"
        )
    if missing == set(names):
        raise DataError(f"{what}; there is nothing to measure without any photo")
    num_left_out = sum(name in missing for name in names)
    logger.warning("%s; %d of %d expressions are left out", what, num_left_out, len(names))
    return missing

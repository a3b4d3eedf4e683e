"""Takes the sizes of photos from their files, for annotations that do not state them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from reir.datasets.dataset import BoxPx, ReferringImage, is_inside
from reir.datasets.json_entries import Entry
from reir.errors import ImageError
from reir.images.decode import read_bytes, upright_size


def measured_photo(
    entry: Entry, key: str, images_dir: Path, file_name: str, *, image_id: str
) -> ReferringImage:
    """Return a photo with the size of its file, upright; its pixels are not decoded.

    Args:
        entry: an annotation of the photo.
        key: the key of the entry that names the photo.
        images_dir: folder of the photos.
        file_name: path of the file, relative to this folder.
        image_id: id that the photo gets.

    Raises:
        DataError: the photo cannot be read; the message names file, entry and key.
    """
    try:
        width_px, height_px = upright_size(read_bytes(images_dir / file_name))
    except ImageError as error:
        entry.fail(key, f"a photo that can be decoded ({file_name}: {error})")
    return ReferringImage(
        image_id=image_id, file_name=file_name, width_px=width_px, height_px=height_px
    )


def box_inside(entry: Entry, key: str, photo: ReferringImage) -> BoxPx:
    """Return an xywh box of the file as xyxy.

    Raises:
        DataError: it is malformed, or has no area inside the photo; the message names file, entry
            and key.
    """
    box = entry.box(key)
    if not is_inside(photo, box):
        size = f"{photo.width_px} x {photo.height_px} px"
        entry.fail(key, f"a box with an area inside its photo, which has {size}")
    return box


def absent_photos(
    source: str | Path, names: Iterable[str], images_dir: Path
) -> tuple[frozenset[str], str]:
    """Return the photos that are not in the folder, and a clause that counts them.

    Args:
        source: the annotation file, for the message.
        names: paths of the photos, relative to the folder; may repeat.
        images_dir: folder of the photos.
    """
    photos = dict.fromkeys(names)
    absent = [name for name in photos if not (images_dir / name).exists()]
    if not absent:
        return frozenset(), ""
    return frozenset(absent), (
        f"{len(absent):,} of {len(photos):,} photos of {source} are not in {images_dir}, "
        f"e.g. {absent[0]}"
    )


def leaves_folder(file_name: str) -> bool:
    """Whether a path of an annotation file, which is untrusted, is not one below a folder."""
    name = PurePosixPath(file_name)
    return name.is_absolute() or ".." in name.parts or "\0" in file_name

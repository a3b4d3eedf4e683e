"""Takes the sizes of photos from their files, for annotations that do not state them."""

from __future__ import annotations

from pathlib import Path

from reir.datasets.dataset import ReferringImage
from reir.datasets.json_entries import Entry
from reir.errors import ImageError
from reir.images.decode import decode, read_bytes


def measured_photo(
    entry: Entry, key: str, images_dir: Path, file_name: str, *, image_id: str
) -> ReferringImage:
    """Return a photo with the size of its file, upright.

    Args:
        entry: an annotation of the photo.
        key: the key of the entry that names the photo.
        images_dir: folder of the photos.
        file_name: path of the file, relative to this folder.
        image_id: id that the photo gets.

    Raises:
        DataError: the photo cannot be decoded; the message names file, entry and key.
    """
    try:
        # The smallest scale, because only the size of the photo is needed.
        photo = decode(read_bytes(images_dir / file_name), at_least_px=1)
    except ImageError as error:
        entry.fail(key, f"a photo that can be decoded ({file_name}: {error})")
    return ReferringImage(
        image_id=image_id,
        file_name=file_name,
        width_px=photo.width_px,
        height_px=photo.height_px,
    )

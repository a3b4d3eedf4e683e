"""Reads a photo by its URI, from this machine or a bucket; deletes uploads."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from reir.errors import ImageError, ImageFailure
from reir.images.decode import DEFAULT_MAX_BYTES, decode_image, path_of_uri, read_bytes
from reir.records import RgbImage

BUCKET_SCHEMES = ("s3://", "gs://")


def delete_upload(path: Path) -> None:
    """Delete an uploaded photo, and the folders of the photo and the gallery if they are empty."""
    path.unlink(missing_ok=True)
    for folder in (path.parent, path.parent.parent):
        with suppress(OSError):  # the folder is not empty, or was never created
            folder.rmdir()


def read_photo(uri: str, *, max_bytes: int = DEFAULT_MAX_BYTES) -> bytes:
    """Return the bytes of a photo.

    Args:
        uri: `file:///PATH`, `s3://BUCKET/KEY` or `gs://BUCKET/KEY`.
        max_bytes: refuse larger files before they are read.

    Raises:
        ImageError: MISSING, UNREADABLE, TOO_LARGE, or UNREACHABLE (also for any other URI).
    """
    if uri.startswith(BUCKET_SCHEMES):
        return _read_object(uri, max_bytes)
    if not uri.startswith("file:///"):
        raise ImageError(
            ImageFailure.UNREACHABLE,
            f"photos are read from files and from s3:// and gs:// buckets, not from {uri!r}",
        )
    return read_bytes(path_of_uri(uri), max_bytes=max_bytes)


def photo_at(uri: str) -> RgbImage:
    """Return the (H, W, 3) uint8 pixels of a photo.

    Raises:
        ImageError: it cannot be read (see `read_photo`), or not decoded.
    """
    return decode_image(read_photo(uri))


def file_state(uri: str) -> tuple[int, ...] | None:
    """Return numbers that change with the file of a local photo.

    None for photos of other sources, and for a file that is gone.
    """
    if not uri.startswith("file:///"):
        return None
    try:
        status = os.stat(path_of_uri(uri))
    except (OSError, ValueError):  # a path with a zero byte is a ValueError
        return None
    # The time of the last change of the inode too, because copying may keep that of the content.
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read_object(uri: str, max_bytes: int) -> bytes:
    # Imported only for photos in buckets: pyarrow is optional, and takes long to import.
    try:
        from reir.object_storage import STORAGE_ERRORS, open_filesystem, without_secrets
    except ImportError as error:
        raise ImageError(
            # Without the URI, which may contain credentials; the function that hides them needs
            # pyarrow, too.
            ImageFailure.UNREACHABLE,
            "reading photos in buckets needs pyarrow; pip install pyarrow",
        ) from error
    try:
        filesystem, path = open_filesystem(uri)
        with filesystem.open_input_file(path) as file:
            if file.size() > max_bytes:
                raise ImageError(
                    ImageFailure.TOO_LARGE, f"{file.size()} bytes, at most {max_bytes} are read"
                )
            return bytes(file.read())
    except STORAGE_ERRORS as error:
        place = without_secrets(uri)
        raise ImageError(ImageFailure.UNREACHABLE, f"{place} cannot be read: {error}") from error

"""Finds the photos of a gallery by the names that a list of sentences gives them."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import unquote

from reir.datasets.dataset import ReferringImage
from reir.errors import DataError, ImageError, UnknownPhoto
from reir.images.decode import canonical_uri, path_of_uri
from reir.images.photo_files import read_photo
from reir.records import ImageRecord
from reir.store.contract import InstanceStore


class GalleryPhotos:
    """The photos of a gallery version that have certain names.

    A name is a URI, a path, or the end of a path, such as a file name. Photos with the same content
    are one photo, as for searches.

    Args:
        store: has the ledger.
        gallery, version: which ledger.
        names: all names that will be asked for. The ledger may list millions of photos, so only
            those that have one of these names are kept.
    """

    def __init__(
        self, store: InstanceStore, gallery: str, version: str, names: Iterable[str]
    ) -> None:
        self._gallery = gallery
        wanted = {_file_name(name) for name in names}
        self._by_file_name: dict[str, list[ImageRecord]] = defaultdict(list)
        for record in store.iter_images(gallery, version):
            if (file_name := _file_name(record.uri)) in wanted:
                self._by_file_name[file_name].append(record)
        # The photo that holds the instances of a duplicate may have another name, so it may not be
        # among the rows above.
        holders = {r.same_as for rows in self._by_file_name.values() for r in rows if r.same_as}
        self._holders = store.get_images(gallery, version, sorted(holders))
        self.uris: dict[str, str] = {}
        """Image id -> URI of the photos that were asked for."""

    def of(self, name: str) -> ReferringImage:
        """Return the photo of this name; its file name is its image id.

        Raises:
            UnknownPhoto: the gallery has no such photo, or could not index it.
            DataError: the name is blank, or several photos have it.
        """
        if not name:
            raise DataError("the photo is blank; give the file name, path or URI of a photo")
        found = self._found(name)
        if not found:
            raise UnknownPhoto(
                f"the photo {name!r} is not in gallery '{self._gallery}'; index it first, or leave "
                f"such rows out with --skip-unknown"
            )
        if len(found) > 1:
            first, second, *_ = (record.uri for record in found.values())
            raise DataError(
                f"the photo {name!r} may be {len(found)} photos of the gallery, such as {first} "
                f"and {second}; give the whole path or URI"
            )
        (record,) = found.values()
        if record.status != "indexed":
            raise UnknownPhoto(
                f"the photo {name!r} could not be indexed ({record.reason}: {record.detail})"
            )
        self.uris[record.image_id] = record.uri
        return ReferringImage(
            image_id=record.image_id,
            file_name=record.image_id,
            width_px=record.width_px,
            height_px=record.height_px,
        )

    def _found(self, name: str) -> Mapping[str, ImageRecord]:
        """Return the different photos that may be meant, by image id."""
        rows = self._by_file_name.get(_file_name(name), ())
        uri = name if "://" in name else canonical_uri(os.path.expanduser(name))
        exact = [record for record in rows if record.uri == uri]
        # With the slash, so that "b/1.jpg" does not mean "ab/1.jpg".
        end = "/" + os.path.normpath(name).lstrip("/")
        alike = [record for record in rows if unquote(record.uri).endswith(end)]
        # A complete path or URI means one photo, even if the paths of others end with it.
        holders = (self._holders.get(record.same_as, record) for record in exact or alike)
        return {record.image_id: record for record in holders}


def _file_name(name: str) -> str:
    """Return the last part of a path or URI, decoded."""
    last = name.rpartition("/")[2]
    # Only URIs are percent-encoded: in a path, a percent sign is a part of the name.
    return unquote(last) if "://" in name else last


def gather_photos(folder: Path, uris: Mapping[str, str]) -> None:
    """Make photos available in one folder, under their image ids.

    Local files are linked; photos in buckets are downloaded, unless an earlier run did.

    Args:
        folder: created if it does not exist.
        uris: image id -> URI.

    Raises:
        DataError: photos cannot be read; the message names the first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    problems = []
    for image_id, uri in uris.items():
        target = folder / image_id
        if target.exists():
            continue
        try:
            if uri.startswith("file:///") and path_of_uri(uri).is_file():
                target.unlink(missing_ok=True)  # a link to where the photo was
                target.symlink_to(path_of_uri(uri))
            else:
                # A local file that does not exist comes here, too, so that the error says so.
                _download(uri, target)
        except ImageError as error:
            problems.append(f"{uri}: {error}")
    if problems:
        raise DataError(
            f"{len(problems):,} of {len(uris):,} photos cannot be read, such as {problems[0]}; "
            f"training reads photos from files and from s3:// and gs:// buckets"
        )


def _download(uri: str, target: Path) -> None:
    """Write the bytes of a photo atomically."""
    part = target.with_suffix(".part")
    part.write_bytes(read_photo(uri))
    part.replace(target)

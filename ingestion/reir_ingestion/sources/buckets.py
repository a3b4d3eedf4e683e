"""The image files of a bucket: `s3://bucket/prefix`, a glob below it, or one object.

Listing goes folder by folder, of S3 in pages of a thousand; of Google's storage, what one folder
holds is the most that sits in memory. Whether an image has changed is told by size and time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from urllib.parse import unquote_to_bytes

from reir.errors import SourceError
from reir.images import DEFAULT_MAX_BYTES
from reir.object_storage import without_secrets
from reir_ingestion.sources.contract import (
    IMAGE_ENDINGS,
    NOWHERE,
    OnError,
    SourceFile,
    ignore_error,
)
from reir_ingestion.sources.listed import UriSet
from reir_ingestion.sources.objects import ObjectName, Objects, split_uri
from reir_ingestion.sources.patterns import (
    ANY_DEPTH,
    Parts,
    has_magic,
    is_listed,
    matches,
    may_lie_below,
    split_pattern,
)
from reir_ingestion.sources.retrying import listing


@dataclass(frozen=True)
class BucketSource:
    """Objects of one bucket.

    Attributes:
        text: as the user wrote it.
        root: the folder, without a slash at its end, or the one object.
        pattern: segments that a key below `root` must match, `**` for any number of folders;
            empty when `root` is an object.
        endings: of the keys that are listed, in lower case.
        objects: reads them.
    """

    text: str
    root: ObjectName
    pattern: Parts
    endings: tuple[str, ...] = IMAGE_ENDINGS
    objects: Objects = field(default_factory=Objects)

    def files(self, on_error: OnError = ignore_error) -> Iterator[SourceFile]:
        """The images, sorted within each folder, the folders depth first; hidden ones left out.

        Raises:
            SourceError: a folder cannot be listed, also after retries.
        """
        del on_error  # a bucket is listed whole or not at all
        self.__dict__.pop("_listed", None)  # of an earlier run
        if not self.pattern:
            (status,) = listing(partial(self.objects.statuses, [self.root.uri]), self.root.uri)
            yield SourceFile(self.root.uri, *(status or NOWHERE))
            return
        waiting: deque[Parts] = deque([()])
        while waiting:
            parts = waiting.popleft()
            folders: list[Parts] = []
            for name, status in self.objects.folder(self._below(parts)):
                below = (*parts, name.encode())
                if status is not None and self._is_wanted(below):
                    yield SourceFile(self._below(below).uri, *status)
                elif status is None and not name.startswith("."):
                    folders.append(below)
            waiting.extendleft(
                each for each in reversed(folders) if may_lie_below(each, self.pattern)
            )

    def uris(self, on_error: OnError = ignore_error) -> Iterator[str]:
        """Canonical URIs of the images, in the order of `files`."""
        return (file.uri for file in self.files(on_error))

    def read(self, file: SourceFile) -> bytes:
        """The bytes of a listed object.

        Raises:
            ImageError: MISSING, UNREADABLE, UNREACHABLE or TOO_LARGE.
        """
        return self.objects.read(file.uri, DEFAULT_MAX_BYTES)

    def has_lost(self, uri: str) -> bool:
        """Whether `uri` names an object of this source that is no longer in the bucket.

        Lists the bucket once more, which takes one request for a thousand objects instead of one
        each; what is not on that list is asked for by name.
        """
        if not self._covers(uri) or uri in self._listed:
            return False
        return listing(partial(self.objects.statuses, [uri]), uri) == [None]

    @cached_property
    def _listed(self) -> UriSet:
        return UriSet(self.uris())

    def _covers(self, uri: str) -> bool:
        if not self.pattern:
            return uri == self.root.uri
        above = self._below(()).uri.rstrip("/") + "/"
        if not uri.startswith(above):
            return False
        parts = tuple(unquote_to_bytes(uri.removeprefix(above)).split(b"/"))
        return matches(parts, self.pattern) and is_listed(parts[-1], self.endings)

    def _is_wanted(self, parts: Parts) -> bool:
        return is_listed(parts[-1], self.endings) and matches(parts, self.pattern)

    def _below(self, parts: Parts) -> ObjectName:
        """The folder or object at these segments below the root; a segment may be empty."""
        above = [self.root.key] if self.root.key else []
        return self.root._replace(key="/".join([*above, *(part.decode() for part in parts)]))


def open_bucket(text: str, endings: tuple[str, ...]) -> BucketSource:
    """Return the files of "s3://bucket/prefix", of a glob such as "s3://bucket/a/**/*.jpg", or one.

    Raises:
        SourceError: there is no such bucket, object or prefix, or it cannot be reached.
    """
    name = split_uri(text)
    objects = Objects(name.login, name.options)
    key = name.key.strip("/").encode()
    (status,) = listing(partial(objects.statuses, [name.uri]), name.uri) if key else (None,)
    if status is not None:
        return BucketSource(text, name, (), endings, objects)
    root, pattern = split_pattern(key) if has_magic(key) else (key, (ANY_DEPTH,))
    found = BucketSource(text, name._replace(key=root.decode()), pattern, endings, objects)
    if next(objects.folder(found.root), None) is None:
        raise SourceError(
            f"source {without_secrets(text)!a} does not exist: nothing lies below "
            f"{found.root.uri!a}"
        )
    return found

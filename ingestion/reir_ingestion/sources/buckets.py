"""The image files in a bucket: those under a prefix, those that match a pattern, or one object.

A bucket is listed folder by folder. On S3, a folder comes in pages of a thousand objects; on Google
Cloud Storage, a folder is held in memory as a whole. An image has changed if its size or time has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from urllib.parse import unquote_to_bytes

from reir.errors import SourceError
from reir.images.decode import DEFAULT_MAX_BYTES
from reir.object_storage import without_secrets
from reir_ingestion.sources.bucket_reader import BucketReader, ObjectUri, split_uri
from reir_ingestion.sources.contract import (
    ABSENT_FILE,
    IMAGE_SUFFIXES,
    OnError,
    SourceFile,
    ignore_error,
)
from reir_ingestion.sources.network_retries import list_with_retries
from reir_ingestion.sources.patterns import (
    ANY_DEPTH,
    Segments,
    has_wildcard,
    is_listed,
    matches,
    may_match_below,
    split_pattern,
)
from reir_ingestion.sources.uri_set import UriSet


@dataclass(frozen=True)
class BucketSource:
    """Image files in one bucket.

    Attributes:
        text: the source as the user wrote it.
        root: the folder, without a slash at the end, or the one object.
        pattern: segments that a key below `root` must match, `**` for any number of folders;
            empty if `root` is an object.
        suffixes: suffixes of the keys to list, in lower case.
        reader: reads the bucket.
    """

    text: str
    root: ObjectUri
    pattern: Segments
    suffixes: tuple[str, ...] = IMAGE_SUFFIXES
    reader: BucketReader = field(default_factory=BucketReader)

    def files(self, on_error: OnError = ignore_error) -> Iterator[SourceFile]:
        """Yield the images that are not hidden, sorted within each folder, folders depth first.

        Raises:
            SourceError: a folder cannot be listed, even after retries.
        """
        del on_error  # a folder of a bucket that cannot be listed stops the run
        # The same source may serve several runs, and `has_lost` must compare with this listing. The
        # dataclass is frozen, but `cached_property` keeps its value in `__dict__`.
        self.__dict__.pop("_listed", None)
        if not self.pattern:
            (status,) = list_with_retries(
                partial(self.reader.statuses, [self.root.uri]), self.root.uri
            )
            yield SourceFile(self.root.uri, *(status or ABSENT_FILE))
            return
        waiting: deque[Segments] = deque([()])
        while waiting:
            parts = waiting.popleft()
            folders: list[Segments] = []
            for name, status in self.reader.folder(self._below(parts)):
                below = (*parts, name.encode())
                if status is not None and self._is_wanted(below):
                    yield SourceFile(self._below(below).uri, *status)
                elif status is None and not name.startswith("."):
                    folders.append(below)
            # `extendleft` reverses what it is given, so this puts the first folder first.
            waiting.extendleft(
                each for each in reversed(folders) if may_match_below(each, self.pattern)
            )

    def uris(self, on_error: OnError = ignore_error) -> Iterator[str]:
        """Yield the canonical URIs of the images, in the order of `files`."""
        return (file.uri for file in self.files(on_error))

    def read(self, file: SourceFile) -> bytes:
        """Return the bytes of an image.

        Raises:
            ImageError: MISSING, UNREADABLE, UNREACHABLE or TOO_LARGE.
        """
        return self.reader.read(file.uri, DEFAULT_MAX_BYTES)

    def has_lost(self, uri: str) -> bool:
        """Return whether `uri` is an object of this source that is no longer in the bucket.

        The first call lists the bucket once more, which takes one request per thousand objects
        instead of one per object. Only objects that are not in that list are looked up by name.
        """
        if not self._covers(uri) or uri in self._listed:
            return False
        return list_with_retries(partial(self.reader.statuses, [uri]), uri) == [None]

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
        return matches(parts, self.pattern) and is_listed(parts[-1], self.suffixes)

    def _is_wanted(self, parts: Segments) -> bool:
        return is_listed(parts[-1], self.suffixes) and matches(parts, self.pattern)

    def _below(self, parts: Segments) -> ObjectUri:
        """Return the folder or object at these segments below the root.

        A segment may be empty, because a key such as "a//b" is valid.
        """
        above = [self.root.key] if self.root.key else []
        return self.root._replace(key="/".join([*above, *(part.decode() for part in parts)]))


def open_bucket(text: str, suffixes: tuple[str, ...]) -> BucketSource:
    """Open the files of a bucket.

    Args:
        text: "s3://bucket/prefix", a pattern such as "s3://bucket/**/*.jpg", or one object.
        suffixes: suffixes of the keys to list, in lower case.

    Raises:
        SourceError: there is no such bucket, object or prefix, or it cannot be reached.
    """
    name = split_uri(text)
    reader = BucketReader(name.login, name.options)
    key = name.key.strip("/").encode()
    # An object with exactly this key comes first, because a key may contain wildcards itself.
    (status,) = (
        list_with_retries(partial(reader.statuses, [name.uri]), name.uri) if key else (None,)
    )
    if status is not None:
        return BucketSource(text, name, (), suffixes, reader)
    root, pattern = split_pattern(key) if has_wildcard(key) else (key, (ANY_DEPTH,))
    found = BucketSource(text, name._replace(key=root.decode()), pattern, suffixes, reader)
    # A folder of a bucket exists only as the beginning of keys, so this has to list it.
    if next(reader.folder(found.root), None) is None:
        raise SourceError(
            f"source {without_secrets(text)!a} does not exist: there is nothing under "
            f"{found.root.uri!a}"
        )
    return found

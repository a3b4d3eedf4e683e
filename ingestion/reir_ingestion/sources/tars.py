"""Images in tar archives, as WebDataset lays them out.

The members of one name up to the first dot are one sample: its images, and in `.json` and `.txt`
the columns of the user. Members are read from where the listing found them, so archives must not
be compressed.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import IO, Any, NamedTuple

from reir.attributes import BadRow, checked
from reir.records import Attributes
from reir_ingestion.sources.attributes import flat
from reir_ingestion.sources.contract import IMAGE_ENDINGS, OnError, SourceFile
from reir_ingestion.sources.held import HeldSource
from reir_ingestion.sources.places import MAX_NAME_CHARS

MAX_SIDECAR_BYTES = 1024**2

_PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
"""First bytes of compressed archives, whatever their file name."""

_SIDECARS = (".json", ".txt")


@dataclass(frozen=True)
class TarSource(HeldSource):
    """The images in archives; one has changed when its archive has and its bytes have."""

    kind = "tar"

    def images(self, holder: SourceFile, on_error: OnError) -> Iterator[SourceFile]:
        """The images of an archive, a sample at a time.

        Raises:
            OSError: it is damaged, or compressed.
        """
        seen: set[str] = set()
        with self.places.stream(holder.uri) as stream:
            for key, members in groupby(_members(stream), lambda member: member.key):
                try:
                    images, attributes = _sample(members)
                except BadRow as error:
                    on_error(f"{holder.uri}#{key}", error)
                    continue
                for image in images:
                    uri = self.uri_of(holder, image.name)
                    if image.name in seen:
                        on_error(
                            uri,
                            BadRow(
                                "the archive has two members of this name; only the first is used"
                            ),
                        )
                        continue
                    seen.add(image.name)
                    yield SourceFile(
                        uri, image.size_bytes, self.time_of(holder), attributes, image.offset
                    )

    def read(self, file: SourceFile) -> bytes:
        """The bytes of a member.

        Raises:
            ImageError: MISSING, UNREADABLE, UNREACHABLE or TOO_LARGE.
        """
        return self.places.read_span(self.holder_of(file), file.offset, file.size_bytes)


class _Member(NamedTuple):
    """One file of an archive: an image with its place, or a sidecar with its bytes."""

    name: str
    offset: int
    size_bytes: int
    sidecar: bytes | None

    @property
    def key(self) -> str:
        """What the members of a sample have in common: the name up to its first dot."""
        folder, slash, base = self.name.rpartition("/")
        return folder + slash + base.partition(".")[0]


def _members(stream: IO[bytes]) -> Iterator[_Member]:
    """The images and sidecars of an archive, in its order.

    Raises:
        OSError: it is damaged, or compressed.
    """
    try:
        yield from _found(stream)
    except (tarfile.TarError, EOFError) as error:
        raise OSError(str(error)) from error


def _found(stream: IO[bytes]) -> Iterator[_Member]:
    start = stream.read(max(map(len, _PACKED)))
    if packing := next((name for magic, name in _PACKED.items() if start.startswith(magic)), None):
        raise tarfile.ReadError(
            f"it is compressed ({packing}), so its members cannot be read one by one; unpack it "
            f"to a plain .tar"
        )
    stream.seek(0)
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        while (found := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # it keeps all that it has seen
            name = found.name.rpartition("/")[2].lower()
            if not found.isreg() or name.startswith("."):
                continue
            if len(found.name) > MAX_NAME_CHARS:
                raise tarfile.ReadError(f"a name of {len(found.name)} characters at {found.offset}")
            if name.endswith(IMAGE_ENDINGS):
                yield _Member(found.name, found.offset_data, found.size, None)
            elif name.endswith(_SIDECARS):
                content = archive.extractfile(found)
                assert content is not None, "a regular file has content"
                text = content.read(MAX_SIDECAR_BYTES + 1)
                yield _Member(found.name, found.offset_data, found.size, text)
        _check_end(stream, archive.offset)


def _check_end(stream: IO[bytes], offset: int) -> None:
    """Tell the end of an archive from a damaged header, for which `tarfile` takes it too."""
    stream.seek(offset)
    if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"damaged at byte {offset}; what follows was not read")


def _sample(members: Iterable[_Member]) -> tuple[list[_Member], Attributes]:
    """The images of a sample, and the attributes that its sidecars give.

    Raises:
        BadRow: a sidecar cannot be used.
    """
    images: list[_Member] = []
    columns: dict[str, Any] = {}
    for member in members:
        if member.sidecar is None:
            images.append(member)
        elif len(member.sidecar) > MAX_SIDECAR_BYTES:
            raise BadRow(f"{member.name!a} has {member.size_bytes} bytes")
        elif member.name.lower().endswith(".json"):
            columns |= flat(_object(member.name, member.sidecar))
        else:
            columns["txt"] = member.sidecar.decode("utf-8", "surrogateescape").strip()
    return images, checked(columns)


def _object(name: str, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{name!a} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRow(f"{name!a} holds no object but {type(value).__name__}")
    return value

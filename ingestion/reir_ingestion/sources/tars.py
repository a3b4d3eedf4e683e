"""Images in tar archives, in the layout of WebDataset.

Members with the same name up to the first dot form one sample, which has images, and the user's
columns in `.json` and `.txt` files. Images are read from the position at which the listing found
them, so archives must not be compressed.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import IO, Any, NamedTuple

from reir.attributes import BadRow, validate_attributes
from reir.records import Attributes
from reir_ingestion.sources.columns import flat
from reir_ingestion.sources.containers import ContainerSource
from reir_ingestion.sources.contract import IMAGE_SUFFIXES, OnError, SourceFile
from reir_ingestion.sources.uri_reader import MAX_NAME_CHARS

# A `.json` or `.txt` file is read as a whole while the archive is listed.
MAX_SIDECAR_BYTES = 1024**2

_COMPRESSION = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
"""First bytes of compressed archives; file names are not reliable."""

_SIDECARS = (".json", ".txt")


@dataclass(frozen=True)
class TarSource(ContainerSource):
    """The images in archives.

    An image is read again if its archive has changed, and encoded again if its own bytes have.
    """

    kind = "tar"

    def images(self, container: SourceFile, on_error: OnError) -> Iterator[SourceFile]:
        """Yield the images of an archive, sample by sample.

        Raises:
            OSError: the archive is damaged or compressed.
        """
        seen: set[str] = set()
        with self.reader.stream(container.uri) as stream:
            # WebDataset stores the members of a sample next to each other, so one sample at a time
            # is in memory.
            for key, members in groupby(_members(stream), lambda member: member.key):
                try:
                    images, attributes = _sample(members)
                except BadRow as error:
                    on_error(f"{container.uri}#{key}", error)
                    continue
                for image in images:
                    uri = self.uri_of(container, image.name)
                    if image.name in seen:  # both would have the same URI, and so one ledger row
                        on_error(
                            uri,
                            BadRow(
                                "the archive has two members of this name; only the first is used"
                            ),
                        )
                        continue
                    seen.add(image.name)
                    yield SourceFile(
                        uri, image.size_bytes, self.time_of(container), attributes, image.offset
                    )

    def read(self, file: SourceFile) -> bytes:
        """Return the bytes of an image.

        Raises:
            ImageError: MISSING, UNREADABLE, UNREACHABLE or TOO_LARGE.
        """
        return self.reader.read_span(self.container_of(file), file.offset, file.size_bytes)


class _Member(NamedTuple):
    """One file of an archive: an image with its position, or a sidecar with its bytes."""

    name: str
    offset: int
    size_bytes: int
    sidecar: bytes | None

    @property
    def key(self) -> str:
        """The part of the name that all members of a sample share, up to the first dot."""
        folder, slash, base = self.name.rpartition("/")
        return folder + slash + base.partition(".")[0]


def _members(stream: IO[bytes]) -> Iterator[_Member]:
    """Yield the images and sidecars of an archive, in their order.

    Raises:
        OSError: the archive is damaged or compressed.
    """
    try:
        yield from _read_members(stream)
    except (tarfile.TarError, EOFError) as error:  # neither of them is an OSError
        raise OSError(str(error)) from error


def _read_members(stream: IO[bytes]) -> Iterator[_Member]:
    start = stream.read(max(map(len, _COMPRESSION)))
    if compression := _compression(start):
        raise tarfile.ReadError(
            f"it is compressed ({compression}), so its members cannot be read one by one; "
            f"decompress it to a plain .tar"
        )
    stream.seek(0)
    # "r:" and not "r": positions must be those in the file, so nothing may be decompressed.
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        while (found := archive.next()) is not None:
            # tarfile would keep the header of every member in memory.
            archive.members.clear()  # type: ignore[attr-defined]
            name = found.name.rpartition("/")[2].lower()
            if not found.isreg() or name.startswith("."):
                continue
            if len(found.name) > MAX_NAME_CHARS:
                raise tarfile.ReadError(
                    f"a name of {len(found.name)} characters at byte {found.offset}"
                )
            if name.endswith(IMAGE_SUFFIXES):
                yield _Member(found.name, found.offset_data, found.size, None)
            elif name.endswith(_SIDECARS):
                content = archive.extractfile(found)
                assert content is not None, "a regular file has content"
                text = content.read(MAX_SIDECAR_BYTES + 1)  # one more, to notice a larger file
                yield _Member(found.name, found.offset_data, found.size, text)
        _check_end(stream, archive.offset)


def _compression(start: bytes) -> str | None:
    return next((name for magic, name in _COMPRESSION.items() if start.startswith(magic)), None)


def _check_end(stream: IO[bytes], offset: int) -> None:
    """Raise an error if the archive does not end here.

    If a header in the middle is damaged, `tarfile` treats it as the end. A real end consists of
    blocks of zeros.
    """
    stream.seek(offset)
    if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"damaged at byte {offset}; what follows was not read")


def _sample(members: Iterable[_Member]) -> tuple[list[_Member], Attributes]:
    """Return the images of a sample, and the attributes from its sidecars.

    Raises:
        BadRow: a sidecar cannot be used.
    """
    images: list[_Member] = []
    columns: dict[str, Any] = {}
    for member in members:
        if member.sidecar is None:
            images.append(member)
        elif len(member.sidecar) > MAX_SIDECAR_BYTES:
            raise BadRow(
                f"{member.name!a} has {member.size_bytes} bytes; the limit is {MAX_SIDECAR_BYTES}"
            )
        elif member.name.lower().endswith(".json"):
            columns |= flat(_object(member.name, member.sidecar))
        else:
            # Invalid bytes become surrogates, which `validate_attributes` rejects with the name of
            # the column.
            columns["txt"] = member.sidecar.decode("utf-8", "surrogateescape").strip()
    return images, validate_attributes(columns)


def _object(name: str, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise BadRow(f"{name!a} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRow(f"{name!a} must contain a JSON object, got {type(value).__name__}")
    return value

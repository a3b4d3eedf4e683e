"""Traces of photos: bytes that only one photo has, and the files in which they are found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from reir.images.decode import path_of_uri
from reir.records import IndexedImage

_CHUNK_BYTES = 96


@dataclass(frozen=True)
class Trace:
    """Something by which a photo can be recognized.

    Attributes:
        image_id: of the photo.
        kind: "id", "content hash", "name", "text", "bytes" or "vector".
        data: the bytes to look for.
    """

    image_id: str
    kind: str
    data: bytes


def traces_of(image: IndexedImage, text: str) -> Iterator[Trace]:
    """Yield the traces of a photo in a file of this machine.

    Args:
        image: the photo; its file still exists.
        text: an expression that describes this photo alone; empty for none.
    """
    record, path = image.record, path_of_uri(image.record.uri)
    found = [
        ("id", record.image_id.encode()),
        ("content hash", record.content_hash.encode()),
        ("name", path.name.encode()),
        ("text", text.encode()),
    ]
    content = path.read_bytes()
    # Away from the start, where many files of one camera are the same.
    places = (len(content) // 3, len(content) // 2, len(content) - _CHUNK_BYTES)
    found += [("bytes", content[place : place + _CHUNK_BYTES]) for place in places]
    if image.instances is not None:
        vectors = (*image.instances.vectors[:2], image.instances.image_vector)
        found += [("vector", vector.tobytes()) for vector in vectors]
    for kind, data in found:
        if data:
            yield Trace(record.image_id, kind, data)


def distinctive(traces: Iterable[Trace], others: Iterable[Trace]) -> list[Trace]:
    """Return the traces that none of the others has, such as those of photos that stay."""
    kept = {(each.kind, each.data) for each in others}
    return [each for each in traces if (each.kind, each.data) not in kept]


def find(folder: Path, traces: Sequence[Trace]) -> list[tuple[Path, Trace]]:
    """Return every file below a folder that has a trace, with the trace."""
    return [
        (path, trace)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        for contents in [_contents(path)]
        for trace in traces
        if any(trace.data in each for each in contents)
    ]


def _contents(path: Path) -> list[bytes]:
    """Return a file as it is on the disk, and the columns of a Parquet file without compression."""
    contents = [path.read_bytes()]
    if path.suffix == ".parquet":
        for column in pq.read_table(path).combine_chunks().itercolumns():
            for chunk in column.chunks:
                contents += [each.to_pybytes() for each in chunk.buffers() if each is not None]
    return contents

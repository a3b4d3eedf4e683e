"""`reir reindex --dry-run`: how many photos would be indexed, how long it takes, and how much disk.

Time is measured: a sample of the photos is indexed into memory, on this machine.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from reir.images.photo_files import BUCKET_SCHEMES
from reir.models.interfaces import InstanceEncoder
from reir.store import InstanceStore, default_location, is_embedded
from reir.store.contract import VersionInfo
from reir.store.memory import MemoryStore
from reir.store.names import images_collection, instances_collection
from reir_ingestion.known_sources import known_sources
from reir_ingestion.pipeline import index
from reir_ingestion.reindex.known_files import KnownFilesSource
from reir_ingestion.reindex.run import ReindexRequest
from reir_ingestion.sources import Source, SourceFile
from reir_ingestion.sources.uri_reader import LOCAL_SCHEME
from reir_ingestion.sources.uri_set import UriSet
from reir_ingestion.stages import IndexOptions

SAMPLE_PHOTOS = 48
SERVER_BYTES_PER_INSTANCE = 10_600
"""Disk of an instance on a Milvus server, minutes after the writes (docs/scale.md). The server
deletes a part of it later."""


@dataclass(frozen=True, kw_only=True)
class ReindexPlan:
    """What a re-indexing job would cost.

    Attributes:
        sources: number of photos of each source.
        others: photos of the gallery that are in none of them.
        photos_per_s: measured on a sample, on this machine without Ray; None if no photo of the
            gallery could be read.
        bytes_needed: on the disk for the candidate, estimated from the live version.
        bytes_free: on the disk of an embedded store; None on a server.
    """

    sources: dict[str, int]
    others: int
    photos_per_s: float | None
    bytes_needed: int
    bytes_free: int | None

    @property
    def num_photos(self) -> int:
        """Photos that would be encoded."""
        return sum(self.sources.values()) + self.others

    @property
    def seconds(self) -> float | None:
        """Estimated time; None if it could not be measured."""
        return self.num_photos / self.photos_per_s if self.photos_per_s else None


def make_plan(  # noqa: PLR0913 - each is needed, and they have no common name
    store: InstanceStore,
    location: str | None,
    gallery: str,
    request: ReindexRequest,
    encoder: InstanceEncoder,
    options: IndexOptions,
) -> ReindexPlan:
    """Estimate the cost of a job; changes nothing.

    Raises:
        SourceError: a source does not exist.
    """
    known = request.sources or tuple(known_sources(store, gallery))
    sources = [each.open() for each in known]
    listed = UriSet(uri for source in sources for uri in source.uris())
    live = store.live_version(gallery)
    (info,) = [each for each in store.versions(gallery) if each.name == live]
    rows = store.iter_images(gallery, live, status="indexed")
    others = sum(
        # The same photos that the job itself takes over in its `_index_others`.
        row.uri not in listed and not any(each.has_lost(row.uri) for each in sources)
        for row in rows
    )
    return ReindexPlan(
        sources={each.text: sum(1 for _ in each.uris()) for each in sources},
        others=others,
        photos_per_s=_measure(_samples(store, gallery, live, sources), encoder, options),
        bytes_needed=_bytes_needed(location, gallery, info),
        bytes_free=shutil.disk_usage(_folder(location)).free if is_embedded(location) else None,
    )


def _measure(
    samples: Iterable[Source], encoder: InstanceEncoder, options: IndexOptions
) -> float | None:
    """Return photos per second of indexing the first sample that can be read into memory."""
    for sample in samples:
        # In memory, so that a dry run leaves the store as it is.
        report = index(sample, "sample", MemoryStore(), encoder, options=options)
        if report.new:
            return report.new / report.seconds
    return None


def _samples(
    store: InstanceStore, gallery: str, version: str, sources: Sequence[Source]
) -> Iterator[Source]:
    """Yield samples of the photos of a gallery; the first one is the most typical."""
    text = f"a sample of gallery {gallery}"
    rows = store.iter_images(gallery, version, status="indexed")
    plain = (row for row in rows if row.uri.startswith((LOCAL_SCHEME, *BUCKET_SCHEMES)))
    files = (SourceFile(row.uri, row.size_bytes, row.mtime_ns, row.attributes) for row in plain)
    yield KnownFilesSource(text, tuple(islice(files, SAMPLE_PHOTOS)))
    # Images in archives and tables, and on the web, can be read by their source alone.
    for source in sources:
        yield KnownFilesSource(text, tuple(islice(source.files(), SAMPLE_PHOTOS)), source)


def _bytes_needed(location: str | None, gallery: str, live: VersionInfo) -> int:
    """Estimate the size of the candidate: it has about as many instances as the live version."""
    if not is_embedded(location):
        return live.num_instances * SERVER_BYTES_PER_INSTANCE
    # Folders and files of an embedded store are named after the collections.
    names = (images_collection(gallery, live.name), instances_collection(gallery, live.name))
    folder = _folder(location)
    return sum(
        path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file()
        and any(part.partition(".")[0] in names for part in path.relative_to(folder).parts)
    )


def _folder(location: str | None) -> Path:
    return Path(location or default_location()).expanduser()


def format_bytes(number: float) -> str:
    """Return a size for people, such as "1.2 GiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} bytes" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"

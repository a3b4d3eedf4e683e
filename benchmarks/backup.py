"""A gallery of real photos that moves from the embedded store to a Milvus server and back.

    pip install --no-deps milvus==2.3.5
    python benchmarks/backup.py                                  10 minutes on two cores
    python benchmarks/backup.py --images 60 --expressions 20     a minute, to try it out

The gallery is indexed, backed up, restored into a real server, backed up from there, and restored
into a new embedded store. At each station the same expressions, which people wrote, are searched.
`backup.different` counts the expressions whose answer in the last store is not the first answer:
other photos or boxes, or scores that differ by more than 1e-5. It also counts those that an exact
scan of the rows on the server answers differently. The server itself searches an approximate index;
`backup.server_different` and `backup.server_recall` say how its answers compare.

MB (1,000,000 bytes) are those of the Parquet files. A restore checks them, and compares the version
that it wrote with them; both are part of its time.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from _indexing import expressions, repeat_photos
from _report import write_report

import reir
from reir.encoders import load_encoder_spec
from reir.models.interfaces import InstanceEncoder
from reir.operations.backup.folder import open_folder
from reir.operations.backup.manifest import read_manifest
from reir.operations.backup.reports import BackupReport, RestoreReport
from reir.operations.backup.restore import RestoreRequest, restore_backup
from reir.operations.backup.write import write_backup
from reir.store import InstanceStore, open_store
from reir.store.memory import MemoryStore
from reir_testing.milvus_server import milvus_server

GALLERY, K, TOLERANCE = "backup", 10, 1e-5
_CHUNK = 512

Answer = dict[str, float]
"""Photo and box of each hit of an expression -> its score."""


def answers(store: InstanceStore, encoder: InstanceEncoder, texts: Sequence[str]) -> list[Answer]:
    """Search as a user does."""
    with reir.open(GALLERY, store=store, encoder=encoder) as gallery:
        return [
            {f"{hit.uri} {hit.instance_id} {hit.box}": hit.score for hit in found}
            for found in gallery.search_batch(texts, k=K)
        ]


def same(one: Answer, other: Answer) -> bool:
    """Whether two answers have the same hits with the same scores."""
    return one.keys() == other.keys() and all(
        abs(score - other[hit]) <= TOLERANCE for hit, score in one.items()
    )


def num_different(some: Sequence[Answer], others: Sequence[Answer]) -> int:
    return sum(not same(*pair) for pair in zip(some, others, strict=True))


def share_found(wanted: Sequence[Answer], found: Sequence[Answer]) -> float:
    """Return the mean share of the hits of `wanted` that `found` has, too."""
    shares = [len(a.keys() & b.keys()) / len(a) for a, b in zip(wanted, found, strict=True)]
    return sum(shares) / len(shares)


def copy_to_memory(store: InstanceStore) -> MemoryStore:
    """Read all rows of the gallery into a store whose search is an exact scan."""
    memory, version = MemoryStore(), store.live_version(GALLERY)
    (spec,) = (each.spec for each in store.versions(GALLERY) if each.name == version)
    memory.create_version(GALLERY, version, spec)
    ids = (record.image_id for record in store.iter_images(GALLERY, version))
    while chunk := list(islice(ids, _CHUNK)):
        memory.upsert_images(
            GALLERY, version, [*store.get_indexed(GALLERY, version, chunk).values()]
        )
    memory.promote(GALLERY, version)
    return memory


def back_up(store: InstanceStore, folder: Path) -> BackupReport:
    report = write_backup(store, GALLERY, store.live_version(GALLERY), str(folder), lambda *_: None)
    print(f"backup: {report.num_bytes / 1e6:.1f} MB in {report.seconds:.1f} s", flush=True)
    return report


def restore(store: InstanceStore, folder: Path) -> RestoreReport:
    report = restore_backup(store, RestoreRequest(source=str(folder)), lambda *_: None)
    if report.problems:
        raise SystemExit(f"the restored gallery differs: {'; '.join(report.problems)}")
    print(f"restore: {report.written} photos in {report.seconds:.1f} s", flush=True)
    return report


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def checksums(folder: Path) -> list[str]:
    return [each.sha256 for each in read_manifest(open_folder(str(folder))).files]


def measure(work: Path, num_photos: int, num_expressions: int) -> dict[str, Any]:
    """Take the gallery from store to store, and return the figures."""
    encoder, texts = load_encoder_spec(""), expressions(num_expressions)
    first, last = work / "first", work / "last"
    with closing(open_store(str(first))) as store:
        photos = repeat_photos(work / "photos", num_photos)
        indexed = reir.index(photos, gallery=GALLERY, store=store, encoder=encoder)
        print(f"{indexed.num_listed} photos in {indexed.seconds:.0f} s", flush=True)
        wanted = answers(store, encoder, texts)
        written = back_up(store, work / "one")
    store_bytes = disk_bytes(first)
    server_folder = work / "server"
    server_folder.mkdir()
    with milvus_server(server_folder) as server, closing(open_store(server.uri)) as store:
        to_server = restore(store, work / "one")
        on_server = answers(store, encoder, texts)
        exact = answers(copy_to_memory(store), encoder, texts)
        from_server = back_up(store, work / "two")
        server_bytes = disk_bytes(server_folder)
    with closing(open_store(str(last))) as store:
        restored = restore(store, work / "two")
        found = answers(store, encoder, texts)
    different = [
        not (same(a, b) and same(a, c)) for a, b, c in zip(wanted, found, exact, strict=True)
    ]
    return {
        "backup.photos": written.counts.photos,
        "backup.instances": written.counts.instances,
        "backup.expressions": len(texts),
        "backup.hits": sum(map(len, wanted)),
        "backup.different": sum(different),
        "backup.identical_files": checksums(work / "one") == checksums(work / "two"),
        "backup.server_different": num_different(wanted, on_server),
        "backup.server_recall": share_found(wanted, on_server),
        "backup.bytes": written.num_bytes,
        "backup.store_bytes": store_bytes,
        "backup.restored_store_bytes": disk_bytes(last),
        "backup.server_bytes": server_bytes,
        "backup.size_ratio": written.num_bytes / store_bytes,
        "backup.write_s": written.seconds,
        "backup.server_restore_s": to_server.seconds,
        "backup.server_write_s": from_server.seconds,
        "backup.restore_s": restored.seconds,
        "backup.write_mb_s": written.num_bytes / 1e6 / written.seconds,
        "backup.server_restore_mb_s": written.num_bytes / 1e6 / to_server.seconds,
        "backup.server_write_mb_s": from_server.num_bytes / 1e6 / from_server.seconds,
        "backup.restore_mb_s": from_server.num_bytes / 1e6 / restored.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=2_300, help="Photos in the gallery.")
    parser.add_argument("--expressions", type=int, default=200, help="Searches to compare.")
    arguments = parser.parse_args()
    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        figures = measure(Path(name), arguments.images, arguments.expressions)
    figures = {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}
    for key, value in figures.items():
        print(f"{key:28} {value}")
    print(f"{time.perf_counter() - started_s:.0f} s")
    write_report("backup", figures)


if __name__ == "__main__":
    main()

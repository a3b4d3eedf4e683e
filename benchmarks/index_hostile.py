"""Hostile files among good photos: each gets its ledger row, and every good photo can be found.

    python benchmarks/index_hostile.py

The hostile files are: photos truncated at random offsets, empty files, text, headers that claim
30,000 x 30,000 px, strips one pixel wide, HEIC and metadata that unpack to more than they declare,
wrong extensions, unreadable files, pipes, broken links, and names with newlines or invalid UTF-8.
Others have hostile sizes: from one pixel to strips of 20,000 px, and headers that claim far more.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections import Counter
from pathlib import Path

from _indexing import copy_photos, encoder_of, parser_of
from _report import write_report

from reir.images.decode import canonical_uri, image_id
from reir.images.zoom import Zoom
from reir.store import InstanceStore, open_store
from reir_ingestion.pipeline import IndexOptions, index
from reir_testing.ingestion import (
    HostileFile,
    write_hostile_files,
    write_hostile_sizes,
    write_scenes,
)

NUM_HITS = 200
"""An instance counts as found if it is among this many hits of a search for its own vector. The
gallery has about 4,000 instances."""


def right_rows(store: InstanceStore, gallery: str, files: list[HostileFile]) -> list[HostileFile]:
    """Return the files whose ledger row is as expected."""
    ids = [image_id(canonical_uri(file.path)) for file in files]
    rows = store.get_images(gallery, store.live_version(gallery), ids)
    return [
        file
        for file, key in zip(files, ids, strict=True)
        if key in rows and rows[key].reason == (file.reason.value if file.reason else "")
    ]


def is_searchable(store: InstanceStore, gallery: str, path: str | Path) -> bool:
    """Return whether a photo is stored and the vectors of its instances find them."""
    version = store.live_version(gallery)
    key = image_id(canonical_uri(path))
    found = store.get_instances(gallery, version, [key], with_vectors=True)
    for row in found.get(key, []):
        assert row.vector is not None
        # Not always the best hit: similar instances of another photo may have longer vectors.
        (hits,) = store.search(gallery, version, row.vector[None], NUM_HITS)
        if row.instance_id not in {hit.instance_id for hit in hits}:
            return False
    return key in found


def sizes(arguments: argparse.Namespace, work: Path) -> dict[str, int]:
    """Index photos of hostile sizes, with a closer look at each, and check every ledger row."""
    files = write_hostile_sizes(work / "sizes", arguments.sizes, seed=arguments.seed)
    store = open_store(str(work / "store of sizes"))
    options = IndexOptions(batch_size=arguments.batch_size, views=Zoom(above_px=1))
    index(work / "sizes", "sizes", store, encoder_of(arguments), options=options)
    right = right_rows(store, "sizes", files)
    store.close()
    return {"index.hostile_sizes": len(files), "index.hostile_sizes_ok": len(right)}


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, int]:
    """Index the mixed folder and check every file."""
    folder = work / "photos"
    if arguments.fake:
        write_scenes(folder, arguments.good)
    else:
        copy_photos(folder, arguments.good)
    good: list[str | Path] = list(folder.iterdir())
    files = write_hostile_files(folder, arguments.hostile, seed=arguments.seed)
    store = open_store(str(work / "store"))
    options = IndexOptions(batch_size=arguments.batch_size)
    report = index(folder, "hostile", store, encoder_of(arguments), options=options)
    right = right_rows(store, "hostile", files)
    for file in files:
        if file not in right:
            print(f"wrong: {file}")
    # A file with an unusual name but a sound photo must be found like any other photo.
    good += [file.path for file in files if file.reason is None]
    searchable = sum(is_searchable(store, "hostile", path) for path in good)
    store.close()
    print(report.failed, Counter(file.kind for file in files))
    return {
        "index.hostile_files": len(files),
        "index.hostile_ok": len(right),
        "index.hostile_good": len(good),
        "index.hostile_good_searchable": searchable,
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--hostile", type=int, default=200)
    parser.add_argument("--good", type=int, default=100)
    parser.add_argument("--sizes", type=int, default=100, help="Number of photos by size.")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    try:
        figures = measure(arguments, work) | sizes(arguments, work)
    finally:
        shutil.rmtree(work)
    for key, value in figures.items():
        print(f"{key:32} {value}")
    write_report("index_hostile", figures)


if __name__ == "__main__":
    main()

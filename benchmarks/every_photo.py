"""Every photo that has the object: decisions compared with a slow reference, and memory.

    python benchmarks/every_photo.py

An embedded store holds galleries of 10,000 and of 100,000 photos with `--per-photo` random unit
vectors each. For every expression and threshold, `Gallery.every_photo` must return the photos that
a full scan in numpy decides for: `all.different` counts the photos in which the two differ. The
thresholds are chosen by the number of photos that reach them, from a few to all.

Each gallery is searched in a process of its own, which first answers ordinary searches until the
index of the store is complete, int8 codes included (`before_mib`, RssAnon). `added_mib` is by how
much its memory rises above that during the searches for every photo. `all.rss_growth` compares the
search in both galleries without what the index takes: (before + added in the large one) / (before +
added in the small one), where `before` is that of the small one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from _report import write_report
from _vectors import memory_mib, print_figures

from reir.images.decode import image_id
from reir.query.search import CheckpointExtras, Gallery
from reir.records import FloatArray, ImageRecord, IndexedImage, Instances
from reir.store import VersionSpec, open_store
from reir_testing.evaluation.calibrations import score_calibration
from reir_testing.lookup_gallery import LookupEncoder

GALLERY, VERSION, DIGEST, DIM = "photos", "v1", "table", 256
WARM_UP_SEARCHES = 100
UPSERT_IMAGES = 512
EXPRESSIONS = 3
FOUND = (10, 1000, 20_000)
"""Numbers of photos that reach the thresholds, besides the threshold 0 that all photos reach."""

CALIBRATION = score_calibration(DIGEST, 20, -4)


def unit_vectors(num: int, seed: int) -> FloatArray:
    """Return (num, DIM) random unit vectors."""
    vectors = np.random.default_rng(seed).normal(size=(num, DIM)).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def uri_of(number: int) -> str:
    """Return the URI of a photo."""
    return f"file:///{number}.jpg"


def images_of(vectors: FloatArray, per_photo: int) -> Iterator[IndexedImage]:
    """Yield one image for each `per_photo` vectors."""
    boxes = np.tile(np.array([0.1, 0.1, 0.6, 0.6], dtype=np.float32), (per_photo, 1))
    for number in range(len(vectors) // per_photo):
        own = vectors[number * per_photo : (number + 1) * per_photo]
        uri = uri_of(number)
        record = ImageRecord(
            image_id=image_id(uri), uri=uri, status="indexed", num_instances=per_photo
        )
        objectness = np.ones(per_photo, dtype=np.float32)
        yield IndexedImage(record, Instances(boxes, objectness, own, own[0]))


def fill(folder: Path, vectors: FloatArray, per_photo: int) -> None:
    """Write a gallery into an embedded store."""
    store = open_store(str(folder))
    store.create_version(GALLERY, VERSION, VersionSpec(dim=DIM, digest=DIGEST))
    images = images_of(vectors, per_photo)
    while batch := list(islice(images, UPSERT_IMAGES)):
        store.upsert_images(GALLERY, VERSION, batch)
    store.promote(GALLERY, VERSION)
    store.close()


def slow_presences(vectors: FloatArray, per_photo: int, query: FloatArray) -> FloatArray:
    """Return the presence in each photo, in the order of the photos, by a scan of all vectors."""
    best = (vectors @ query).reshape(-1, per_photo).max(axis=1)
    return np.array([CALIBRATION.of_photo(float(score), 0.0, 1) for score in best])


def search(folder: Path, thresholds: list[list[float]], found: Path) -> dict[str, float]:
    """Search in this process, and write the ids of the found photos, one search in each file.

    Args:
        folder: the store.
        thresholds: for each expression, those to search with.
        found: folder for the ids.
    """
    encoder = LookupEncoder(unit_vectors(EXPRESSIONS, seed=1))
    encoder.dim = DIM
    store = open_store(str(folder))
    gallery = Gallery(GALLERY, store, encoder, CheckpointExtras(calibration=CALIBRATION))
    for _ in range(WARM_UP_SEARCHES):
        gallery.search("number 0")
    before = memory_mib()
    highest, slowest_s = before["anon"], 0.0
    for expression, several in enumerate(thresholds):
        for number, threshold in enumerate(several):
            started_s = time.perf_counter()
            with (found / f"{expression}-{number}.txt").open("w") as ids:
                photos = gallery.every_photo(f"number {expression}", min_presence=threshold)
                for count, photo in enumerate(photos):
                    ids.write(f"{photo.image_id}\n")
                    if count % 500 == 0:
                        highest = max(highest, memory_mib()["anon"])
            slowest_s = max(slowest_s, time.perf_counter() - started_s)
    store.close()
    return {
        "before_mib": round(before["anon"], 1),
        "added_mib": round(highest - before["anon"], 1),
        "slowest_s": round(slowest_s, 2),
    }


def measure(num_photos: int, per_photo: int) -> dict[str, float]:
    """Return the figures of one gallery: memory, time, and decisions that differ."""
    vectors = unit_vectors(num_photos * per_photo, seed=0)
    queries = unit_vectors(EXPRESSIONS, seed=1)
    presences = [slow_presences(vectors, per_photo, query) for query in queries]
    # Halfway between two photos, where the last bit of a score decides nothing.
    thresholds = [
        [float(np.sort(each)[-num - 1 : -num + 1].mean()) for num in FOUND if num < num_photos]
        + [0.0]
        for each in presences
    ]
    ids = np.array([image_id(uri_of(number)) for number in range(num_photos)])
    with tempfile.TemporaryDirectory() as place:
        folder, found = Path(place) / "store", Path(place) / "found"
        found.mkdir()
        started_s = time.perf_counter()
        fill(folder, vectors, per_photo)
        print(
            f"{num_photos:,} photos written in {time.perf_counter() - started_s:.0f} s", flush=True
        )
        command = [sys.executable, __file__, "--search", str(folder), str(found)]
        done = subprocess.run(
            command, input=json.dumps(thresholds), capture_output=True, text=True, check=True
        )
        figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        different = decisions = 0
        for expression, each in enumerate(presences):
            for number, threshold in enumerate(thresholds[expression]):
                lines = (found / f"{expression}-{number}.txt").read_text().split()
                wanted = set(ids[each >= threshold])
                # A photo that is returned twice is a difference, too.
                different += len(wanted ^ set(lines)) + len(lines) - len(set(lines))
                decisions += num_photos
    return {**figures, "decisions": decisions, "different": different}


def main() -> None:
    """Measure both galleries, or search one of them as a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--per-photo", type=int, default=5, help="Instances of each photo.")
    parser.add_argument("--search", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=int, nargs=2, default=[10_000, 100_000])
    arguments = parser.parse_args()
    if arguments.search:
        print(json.dumps(search(arguments.search[0], json.load(sys.stdin), arguments.search[1])))
        return
    small, large = (measure(size, arguments.per_photo) for size in arguments.sizes)
    growth = (small["before_mib"] + large["added_mib"]) / (small["before_mib"] + small["added_mib"])
    found: dict[str, Any] = {"all.per_photo": arguments.per_photo}
    for size, figures in zip(arguments.sizes, (small, large), strict=True):
        found |= {f"all.{size}.{name}": value for name, value in figures.items()}
    found["all.rss_growth"] = round(growth, 3)
    found["all.different"] = small["different"] + large["different"]
    print_figures(found)
    write_report("every_photo", found)


if __name__ == "__main__":
    main()

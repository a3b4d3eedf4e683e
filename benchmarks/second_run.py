"""What a second run over an unchanged gallery costs, as a share of the first.

    python benchmarks/second_run.py [--images 20000]

The photos are small drawings with different bytes. A fake encoder makes 30 random vectors of 256
numbers from the pixels, so the store holds what a real model would give it, while the first run
costs little more than reading and storing. The time of the shipped model is measured on real photos
and added to the first run for every photo; the second run never calls the model. Each run opens the
embedded store again, and a few additional photos show what a run with little to do costs.

    index.second_run_ratio         second run relative to the first with the shipped model's time
    index.second_run_ratio_bound   the same without the model's time: no model could be faster
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from statistics import median

import numpy as np
from _indexing import encoder_of, parser_of, real_photos
from _report import write_report
from PIL import Image

from reir.images.decode import read_image
from reir.index_report import IndexReport
from reir.records import FloatArray, Instances, RgbImage
from reir.store import open_store
from reir_ingestion.pipeline import IndexOptions, index

DIM = 256
NUM_INSTANCES = 30
FOLDERS = 100
BATCH = 32


class RandomEncoder:
    """Instances drawn from a generator that the pixels seed."""

    dim = DIM
    num_candidates = NUM_INSTANCES
    masks = False
    digest = hashlib.sha256(b"benchmarks/second_run.py").hexdigest()

    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        """Return the instances of each photo."""
        return [self._encode(image) for image in images]

    def encode_expressions(self, expressions: Sequence[str]) -> FloatArray:
        """Not used: this benchmark has no queries."""
        raise NotImplementedError(f"not needed for {len(expressions)} expressions")

    def _encode(self, image: RgbImage) -> Instances:
        rng = np.random.default_rng(image[:2].ravel())
        vectors = rng.standard_normal((NUM_INSTANCES + 1, DIM), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        corners = np.sort(rng.random((NUM_INSTANCES, 2, 2), dtype=np.float32), axis=1)
        return Instances(
            boxes=corners.reshape(-1, 4),
            objectness=np.sort(rng.random(NUM_INSTANCES, dtype=np.float32))[::-1],
            vectors=vectors[1:],
            image_vector=vectors[0],
        )


def write_photos(folder: Path, first: int, count: int) -> None:
    """Write small photos of different noise into a hundred folders."""
    for number in range(first, first + count):
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        place = folder / f"{number % FOLDERS:02}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{number:07}.jpg", quality=60)


def run(folder: Path, store_folder: Path) -> tuple[float, IndexReport]:
    """Open a store, index, close it, and return the wall seconds."""
    started = time.perf_counter()
    with closing(open_store(str(store_folder))) as store:
        report = index(folder, "g", store, RandomEncoder(), options=IndexOptions(batch_size=64))
    return time.perf_counter() - started, report


def model_seconds(arguments: argparse.Namespace) -> float:
    """Return the seconds that the model takes per photo."""
    encoder = encoder_of(arguments)
    photos = [read_image(path) for path in real_photos(arguments.photos)]
    batches = [photos[start : start + BATCH] for start in range(0, len(photos), BATCH)]
    # Warm up, so that the first run is not charged for loading the model.
    encoder.encode_images(batches[0])
    started = time.perf_counter()
    for batch in batches:
        encoder.encode_images(batch)
    return (time.perf_counter() - started) / len(photos)


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, float | int]:
    """Time the first run, several second runs, and one with a few more photos."""
    folder, store_folder = work / "photos", work / "store"
    write_photos(folder, 0, arguments.images)
    first_s, first = run(folder, store_folder)
    print(f"first run: {first_s:.1f} s, {first.new} photos, {first.instances} instances")
    again_s = []
    for _ in range(arguments.repeats):
        seconds, report = run(folder, store_folder)
        # A second run that skips too much or too little would make the ratio meaningless.
        if (report.unchanged, report.read) != (arguments.images, 0):
            raise SystemExit(f"the second run had something to do: {report}")
        again_s.append(seconds)
        print(f"second run: {seconds:.2f} s, listing {report.stage_seconds['list']:.2f} s")
    write_photos(folder, arguments.images, arguments.more)
    more_s, report = run(folder, store_folder)
    if report.new != arguments.more:
        raise SystemExit(f"{arguments.more} photos were new, the run saw {report.new}")
    print(f"{arguments.more} photos more: {more_s:.2f} s")
    model_s = model_seconds(arguments)
    second_s = median(again_s)
    return {
        "index.second_run_images": arguments.images,
        "index.second_run_instances": first.instances,
        "index.first_run_seconds": round(first_s, 2),
        "index.second_run_seconds": round(second_s, 2),
        "index.model_seconds_a_photo": round(model_s, 4),
        "index.second_run_ratio": round(second_s / (first_s + arguments.images * model_s), 4),
        "index.second_run_ratio_bound": round(second_s / first_s, 4),
        "index.more_images": arguments.more,
        "index.more_seconds": round(more_s, 2),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3, help="Second runs, for a median.")
    parser.add_argument("--more", type=int, default=100, help="Photos added at the end.")
    parser.add_argument("--photos", type=int, default=64, help="Photos to time the model.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(arguments, Path(folder))
    for key, value in figures.items():
        print(f"{key:32} {value}")
    write_report("second_run", figures)


if __name__ == "__main__":
    main()

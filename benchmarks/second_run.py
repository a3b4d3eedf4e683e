"""What a second run over an unchanged gallery costs, as a share of the first.

    python benchmarks/second_run.py [--images 20000]

The photos are small drawings, each of other bytes, and the encoder makes 30 random vectors of 256
numbers from the pixels: the store holds what a real model would give it, and the first run costs
next to nothing but reading and storing. What the shipped model takes for a photo is measured on
real ones, alone, and added to the first run for every photo; the second run never asks the model.
Each run opens the embedded store anew, and a few photos more show what a run with little to do
costs.

    index.second_run_ratio         second run over the first one with the shipped model's time
    index.second_run_ratio_bound   the same without it: no model could be faster
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

from reir.images import read_image
from reir.models.seams import RgbImage
from reir.records import FloatArray, Instances
from reir.store import open_store
from reir_ingestion.pipeline import IndexOptions, index
from reir_ingestion.report import IndexReport

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
        """Instances of each photo."""
        return [self._encode(image) for image in images]

    def encode_expressions(self, expressions: Sequence[str]) -> FloatArray:
        """No sentence is asked here."""
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
    """Write small photos of noise, each of its own, in a hundred folders."""
    for number in range(first, first + count):
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        place = folder / f"{number % FOLDERS:02}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{number:07}.jpg", quality=60)


def run(folder: Path, store_folder: Path) -> tuple[float, IndexReport]:
    """Index with a store opened for it; returns wall seconds with opening and closing."""
    started = time.perf_counter()
    with closing(open_store(str(store_folder))) as store:
        report = index(folder, "g", store, RandomEncoder(), options=IndexOptions(batch_size=64))
    return time.perf_counter() - started, report


def model_seconds(arguments: argparse.Namespace) -> float:
    """Seconds that the model takes for a photo."""
    encoder = encoder_of(arguments)
    photos = [read_image(path) for path in real_photos(arguments.photos)]
    batches = [photos[start : start + BATCH] for start in range(0, len(photos), BATCH)]
    encoder.encode_images(batches[0])
    started = time.perf_counter()
    for batch in batches:
        encoder.encode_images(batch)
    return (time.perf_counter() - started) / len(photos)


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, float | int]:
    """Time the first run, some second ones, and one with a few photos more."""
    folder, store_folder = work / "photos", work / "store"
    write_photos(folder, 0, arguments.images)
    first_s, first = run(folder, store_folder)
    print(f"first run: {first_s:.1f} s, {first.new} photos, {first.instances} instances")
    again_s = []
    for _ in range(arguments.repeats):
        seconds, report = run(folder, store_folder)
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
    parser.add_argument("--repeats", type=int, default=3, help="second runs; the median counts")
    parser.add_argument("--more", type=int, default=100, help="photos added at the end")
    parser.add_argument("--photos", type=int, default=64, help="real ones, to time the model")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(arguments, Path(folder))
    for key, value in figures.items():
        print(f"{key:32} {value}")
    write_report("second_run", figures)


if __name__ == "__main__":
    main()

"""Shared by the benchmarks of vector search: vectors, images to store, filters, processes.

The first instance vectors come from real photos through the checkpoint. The queries are the vectors
of sentences that people wrote about such photos. If a benchmark needs more instances than the
photos have, the others are mixtures of real ones: unit vectors of 0.7 of one instance, 0.3 of
another, and noise of a tenth of their length. They are as crowded as the real ones and as far from
the queries, so a graph index meets queries from outside its distribution, as it does in use.
"""

# Shapes: N instances, Q queries, D vector dimension, M instances that a filter keeps

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
from _indexing import encoder_of, expressions, real_photos

from reir.images.decode import image_id, read_image
from reir.records import FloatArray, ImageRecord, IndexedImage, Instances
from reir.store import InstanceRow, InstanceStore, VersionSpec

GALLERY, VERSION = "vectors", "v1"
K = 10
PER_IMAGE = 10
TENANTS = 1000
"""Number of tenants; each owns a thousandth of the photos."""

_BATCH = 16
_MIXED_AT_ONCE = 50_000
_UPSERT_IMAGES = 256


@dataclass(frozen=True)
class Corpus:
    """Instances as arrays.

    Attributes:
        vectors: (N, D) float32, unit length.
        boxes: (N, 4) float32; log-uniform areas from a thousandth of the photo up.
        tenants: (N,) int64.
        queries: (Q, D) float32.
    """

    vectors: FloatArray
    boxes: FloatArray
    tenants: npt.NDArray[np.int64]
    queries: FloatArray

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def areas(self) -> FloatArray:
        """The (N,) areas of the boxes, computed as in every store."""
        sides = self.boxes[:, 2:] - self.boxes[:, :2]
        return np.asarray(sides[:, 0] * sides[:, 1], dtype=np.float32)

    def first(self, count: int) -> Corpus:
        """Return the first `count` instances, and all queries."""
        return Corpus(self.vectors[:count], self.boxes[:count], self.tenants[:count], self.queries)

    def images(self, start: int = 0) -> Iterator[IndexedImage]:
        """Yield images with `PER_IMAGE` instances each, from instance number `start` on."""
        for first in range(start, len(self), PER_IMAGE):
            part = slice(first, first + PER_IMAGE)
            yield indexed_image(first, self.vectors[part], self.boxes[part], self.tenants[first])


def indexed_image(first: int, vectors: FloatArray, boxes: FloatArray, tenant: int) -> IndexedImage:
    """Return an image with the instances from number `first` on."""
    uri = f"file:///{first}.jpg"
    instances = Instances(boxes, np.ones(len(boxes), np.float32), vectors, vectors[0])
    record = ImageRecord(
        image_id=image_id(uri),
        uri=uri,
        status="indexed",
        num_instances=len(instances),
        attributes={"tenant": int(tenant)},
    )
    return IndexedImage(record, instances)


def number_of(row: InstanceRow) -> int:
    """Return the number that a stored instance has in the corpus."""
    first = row.uri.removeprefix("file:///").removesuffix(".jpg")
    return int(first) + int(row.instance_id.rpartition("#")[2])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the option for the number of real photos."""
    parser.add_argument("--photos", type=int, default=300, help="Number of real photos to encode.")
    parser.add_argument("--queries", type=int, default=200)


def make_corpus(arguments: argparse.Namespace, count: int) -> Corpus:
    """Return a corpus of `count` instances, real ones first."""
    rng = np.random.default_rng(0)
    encoder = encoder_of(arguments)
    photos = map(read_image, real_photos(arguments.photos))
    found: list[FloatArray] = []
    while batch := list(islice(photos, _BATCH)):
        found += [instances.vectors for instances in encoder.encode_images(batch)]
    real = np.concatenate(found)[:count]
    vectors = np.concatenate([real, _mixtures(real, count - len(real), rng)])
    print(
        f"{len(real):,} instance vectors of {arguments.photos} photos, {count:,} with mixtures",
        flush=True,
    )
    return Corpus(
        vectors,
        _boxes(count, rng),
        np.arange(count) // PER_IMAGE % TENANTS,
        encoder.encode_expressions(expressions(arguments.queries)),
    )


def _mixtures(real: FloatArray, count: int, rng: np.random.Generator) -> FloatArray:
    mixed = np.empty((count, real.shape[1]), dtype=np.float32)
    for part in np.array_split(mixed, max(1, count // _MIXED_AT_ONCE)):
        one, other = (real[rng.integers(len(real), size=len(part))] for _ in range(2))
        noise = rng.standard_normal(part.shape, dtype=np.float32)
        part[:] = 0.7 * one + 0.3 * other + noise * np.float32(0.1 / np.sqrt(real.shape[1]))
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return mixed


def _boxes(count: int, rng: np.random.Generator) -> FloatArray:
    side = np.sqrt(10 ** rng.uniform(-3, 0, (count, 1)))
    corner = rng.random((count, 2)) * (1 - side)
    boxes = np.concatenate([corner, corner + side], axis=1)
    return np.asarray(np.clip(boxes, 0, 1), dtype=np.float32)


@dataclass(frozen=True)
class Case:
    """One kind of search.

    Attributes:
        name: name of the case in the keys of the figures.
        where: filter of our store; None for none.
        plain: the same filter for a collection with the columns `tenant` and `area`.
        kept: (M,) numbers of the instances that the filter keeps.
    """

    name: str
    where: str | None
    plain: str
    kept: npt.NDArray[np.int64]

    def truth(self, corpus: Corpus) -> npt.NDArray[np.int64]:
        """Return the (Q, K) best instances by a full scan; -1 if there are fewer than K."""
        vectors = corpus.vectors if self.where is None else corpus.vectors[self.kept]
        faiss.omp_set_num_threads(1)
        _, found = faiss.knn(corpus.queries, vectors, K, faiss.METRIC_INNER_PRODUCT)
        return found if self.where is None else np.where(found >= 0, self.kept[found], -1)


EVERYTHING = Case("all", None, "", np.arange(0))


def cases_of(corpus: Corpus) -> list[Case]:
    """Return a search without a filter, and filters by tenant and box size that keep 50 to 0.1%."""
    cases = [Case("all", None, "", np.arange(len(corpus)))]
    for share, name in ((0.5, "50pct"), (0.1, "10pct"), (0.01, "1pct"), (0.001, "01pct")):
        tenants = round(share * TENANTS)
        kept = np.flatnonzero(corpus.tenants < tenants)
        bound = f"tenant < {tenants}" if tenants > 1 else "tenant == 0"
        cases.append(Case(f"tenant_{name}", f"attr.{bound}", bound, kept))
        least = float(np.sort(corpus.areas)[-max(1, round(share * len(corpus)))])
        # `repr`, because a rounded bound would keep other instances than the truth.
        bound = f"area >= {least!r}"
        kept = np.flatnonzero(corpus.areas >= np.float32(least))
        cases.append(Case(f"area_{name}", bound, bound, kept))
    return cases


def recall(found: list[list[int]], truth: npt.NDArray[np.int64]) -> float:
    """Return the mean share of the true best instances that were found."""
    shares = []
    # An arm that ran out of time has answered only the first queries.
    for hits, best in zip(found, truth, strict=False):
        wanted = set(best[best >= 0].tolist())
        shares.append(len(wanted & set(hits)) / len(wanted) if wanted else 1.0)
    return float(np.mean(shares))


def fill(store: InstanceStore, corpus: Corpus, start: int = 0) -> None:
    """Write the instances from number `start` on into our store."""
    spec = VersionSpec(dim=corpus.vectors.shape[1], digest="benchmark")
    store.create_version(GALLERY, VERSION, spec)
    images = corpus.images(start)
    while batch := list(islice(images, _UPSERT_IMAGES)):
        store.upsert_images(GALLERY, VERSION, batch)


def our_search(store: InstanceStore) -> Callable[[FloatArray, Case], list[int]]:
    """Return a search of our store: query vector and case -> numbers of the hits."""

    def search(query_1D: FloatArray, case: Case) -> list[int]:
        (hits,) = store.search(GALLERY, VERSION, query_1D, K, where=case.where)
        return [number_of(hit) for hit in hits]

    return search


def cpu_ms_of(pid: int) -> float:
    """Return the CPU time of all threads of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * 1e3 / os.sysconf("SC_CLK_TCK")


def memory_mib(pid: int | str = "self") -> dict[str, float]:
    """Return the resident MiB of a process: `anon`, its own, and `file`, pages of mapped files."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return {
        name: int(found[key].split()[0]) / 1024
        for name, key in (("anon", "RssAnon"), ("file", "RssFile"))
    }


def disk_mib(folder: Path) -> float:
    """Return the MiB that a folder takes on disk; holes in sparse files do not count."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file()) / 2**20


def print_figures(figures: dict[str, Any]) -> None:
    """Print one figure per line."""
    for key, value in figures.items():
        print(f"{key:44} {value}")

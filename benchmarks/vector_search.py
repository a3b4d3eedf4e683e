"""Time and recall of vector search, with and without filters, compared with plain Milvus Lite.

    python benchmarks/vector_search.py
    python benchmarks/vector_search.py --million

For each size, these ways take turns, with one query at a time and the ten best results: our
embedded store; plain `MilvusClient` searches of Milvus Lite on the same vectors, with a FLAT and
with an HNSW index; and a full scan by faiss on one thread, which is the ground truth. A slow way
gets fewer queries, but at least 20. `vector_search_server.py` does the same with a Milvus server.

`--million` measures a million instances instead, in our reader alone: its files are written without
Milvus Lite, and plain Milvus Lite, which takes long to fill, is left out. It first searches until
all rows have int8 codes (`reir.store.embedded.int8_codes`); `coding_p50_ms` is the time of a search
until then.

Filters keep 50, 10, 1 and 0.1% of the instances, once by an attribute of their photo and once by
the size of their box. A ratio compares our median with that of the faster plain index.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Set
from itertools import islice
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from _arms import Arm, faiss_arm, measure
from _indexing import parser_of
from _plain_milvus import PlainMilvus
from _report import write_report
from _vectors import (
    EVERYTHING,
    GALLERY,
    VERSION,
    Case,
    Corpus,
    K,
    add_arguments,
    disk_mib,
    fill,
    make_corpus,
    memory_mib,
    number_of,
    our_search,
    print_figures,
)

from reir.records import FloatArray
from reir.store import open_store
from reir.store.embedded.journal import Change, JournalImage
from reir.store.embedded.lite_server import LiteServer
from reir.store.embedded.version_journals import VersionJournals
from reir.store.filters import parse
from reir.store.names import instances_collection

MILLION = 1_000_000
SEARCHES = 80
"""Searches that are enough to build the codes of a million rows."""
_FRAME_IMAGES = 48
"""Instances that `reir index` writes at a time: 16 photos of 30."""


def embedded(work: Path, corpus: Corpus, sizes: list[int], budget_s: float) -> dict[str, Any]:
    """Measure our embedded store and plain Milvus Lite at growing sizes."""
    figures: dict[str, Any] = {}
    store = open_store(str(work / "ours"))
    lite = LiteServer(work / "plain")
    address = lite.address()
    plain = {
        "lite_flat": PlainMilvus(address.uri, "flat", "FLAT"),
        "lite_hnsw": PlainMilvus(address.uri, "hnsw", "HNSW"),
    }
    filled, dim = 0, corpus.vectors.shape[1]
    for count in sizes:
        size, part = f"{count // 1000}k", corpus.first(count)
        fill(store, part, filled)
        for each in plain.values():
            each.fill(part, filled)
        filled = count
        arms = {"ours": Arm(our_search(store)), "faiss": faiss_arm(part)}
        arms |= {name: Arm(each.searching(256), address.pid) for name, each in plain.items()}
        figures |= measure(arms, part, budget_s, size)
        # Compared with whichever plain index is faster at this size.
        plain_ms = min(figures[f"p1.{size}.{name}.p50_ms"] for name in plain)
        figures[f"p1.ratio_{size}"] = round(figures[f"p1.{size}.ours.p50_ms"] / plain_ms, 4)
        figures |= first_search(work / "ours", dim, size)
        reader = disk_mib(work / "ours" / "reader")
        figures |= {
            f"p1.{size}.ours.disk_mib": round(disk_mib(work / "ours"), 1),
            f"p1.{size}.ours.reader_disk_mib": round(reader, 1),
            f"p1.{size}.lite.anon_mib": round(memory_mib(_lite_pid(work / "ours"))["anon"], 1),
        }
    store.close()
    lite.close()
    return figures


def _lite_pid(directory: Path) -> int:
    """Return the id of the process that serves an embedded store."""
    return int(json.loads((directory / "server.json").read_text())["pid"])


class JournalOnlySource:
    """A source for `VersionJournals.search` that reports no difference from the journal.

    The reader then uses its journal alone, and no store is needed.
    """

    def __init__(self, dim: int) -> None:
        """Set the dimension of the vectors."""
        self._dim = dim

    def dim(self) -> int:
        """Return the dimension of the vectors."""
        return self._dim

    def difference(self, holders: Mapping[str, JournalImage]) -> str:  # noqa: ARG002 - of the protocol
        """Report no difference."""
        return ""

    def unfinished(self) -> Set[str]:
        """Report no unfinished photos."""
        return set()

    def changes(self) -> Iterable[Change]:
        """Report no changes."""
        return ()


def million(work: Path, corpus: Corpus, budget_s: float) -> dict[str, Any]:
    """Measure our reader alone on a million instances."""
    collection = instances_collection(GALLERY, VERSION)
    dim = corpus.vectors.shape[1]
    journals = VersionJournals(work / "reader")
    with journals.writing(collection):
        journals.create(collection, dim)
        images = corpus.images()
        while batch := list(islice(images, _FRAME_IMAGES)):
            journals.put(collection, dim, batch)

    def search(query_1D: FloatArray, case: Case) -> list[int]:
        tree = None if case.where is None else parse(case.where)
        (hits,) = journals.search(collection, JournalOnlySource(dim), (query_1D, K, tree), VERSION)
        return [number_of(hit) for hit in hits]

    # The first searches build the codes, so they are slower and are reported separately.
    coding = Arm(search)
    for _ in range(SEARCHES):
        coding.ask(corpus.queries[:1], EVERYTHING)
    arms = {"ours": Arm(search), "faiss": faiss_arm(corpus)}
    figures = measure(arms, corpus, budget_s, "1m")
    journals.close()
    figures["p1.1m.ours.coding_p50_ms"] = round(float(np.percentile(coding.times_ms, 50)), 1)
    figures["p1.1m.ours.reader_disk_mib"] = round(disk_mib(work / "reader"), 1)
    return figures | first_search(work, dim, "1m")


def first_search(directory: Path, dim: int, size: str) -> dict[str, Any]:
    """Return the time of the first search of a new process, and the memory of its reader."""
    command = [sys.executable, sys.argv[0], "--first-search", str(directory), str(dim)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {f"p1.{size}.ours.{key}": value for key, value in json.loads(answer).items()}


def run_first_search(directory: Path, dim: int) -> None:
    """Runs in a process of its own: search once, then until all rows have codes; print the cost."""
    journals = VersionJournals(directory / "reader")
    collection = instances_collection(GALLERY, VERSION)
    query = np.full((1, dim), dim**-0.5, dtype=np.float32)

    def search() -> float:
        started = time.perf_counter()
        journals.search(collection, JournalOnlySource(dim), (query, K, None), VERSION)
        return (time.perf_counter() - started) * 1e3

    # The first call of faiss has a cost of its own, which is not that of our reader.
    faiss.knn(query, query, 1, faiss.METRIC_INNER_PRODUCT)
    before = memory_mib()
    first_ms = search()
    once = memory_mib()
    second_ms = search()
    for _ in range(SEARCHES):
        search()
    after = memory_mib()
    figures = {
        "first_search_ms": round(first_ms, 1),
        "second_search_ms": round(second_ms, 2),
        "first_own_mib": round(once["anon"] - before["anon"], 1),
        "own_mib": round(after["anon"] - before["anon"], 1),
        "mapped_mib": round(after["file"] - before["file"], 1),
    }
    print(json.dumps(figures))


def summary(figures: dict[str, Any], size: str, count: int) -> dict[str, Any]:
    """Return the lowest recall of our searches, and the memory per million instances."""
    recalls = [value for key, value in figures.items() if key.endswith(".ours.recall")]
    per_million = {
        f"p1.{name}_per_million": round(figures[f"p1.{size}.ours.{name}"] * MILLION / count, 1)
        for name in ("own_mib", "mapped_mib", "reader_disk_mib")
    }
    return {"p2.min_recall": min(recalls), **per_million}


def main() -> None:
    parser = parser_of(__doc__)
    add_arguments(parser)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--million", action="store_true")
    parser.add_argument("--budget-s", type=float, default=10.0, help="Seconds per case and way.")
    parser.add_argument("--first-search", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.first_search:
        directory, dim = arguments.first_search
        run_first_search(Path(directory), int(dim))
        return
    sizes: list[int] = sorted(arguments.sizes)
    count = MILLION if arguments.million else sizes[-1]
    corpus = make_corpus(arguments, count)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.million:
            figures = million(Path(folder), corpus, arguments.budget_s)
        else:
            figures = embedded(Path(folder), corpus, sizes, arguments.budget_s)
    size = "1m" if arguments.million else f"{count // 1000}k"
    figures |= summary(figures, size, count)
    print_figures(figures)
    write_report("vector_search_million" if arguments.million else "vector_search", figures)


if __name__ == "__main__":
    main()

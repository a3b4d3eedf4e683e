"""P1 and P2 on a real Milvus server: our store beside plain searches, and what `ef` brings.

    pip install --no-deps milvus==2.3.5
    python benchmarks/p1_vector_search_server.py

As `p1_vector_search.py`. The server runs on this machine and shares its cores with the client.
After each size all rows are sealed and indexed before the first search.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from _arms import Arm, faiss_arm, measure
from _indexing import parser_of
from _plain_milvus import PlainMilvus
from _report import write_report
from _vectors import (
    GALLERY,
    VERSION,
    Corpus,
    add_arguments,
    disk_mib,
    fill,
    make_corpus,
    memory_mib,
    our_search,
    print_figures,
)

from reir.store import open_store
from reir.store.names import instances_collection
from reir.testing.milvus_server import RunningServer, milvus_server

EFS = (16, 64, 256)
"""Breadths of the plain searches."""


def on_server(
    server: RunningServer, work: Path, corpus: Corpus, sizes: list[int], budget_s: float
) -> dict[str, Any]:
    """Our store and plain searches, larger and larger."""
    figures: dict[str, Any] = {}
    store = open_store(server.uri)
    plain = PlainMilvus(server.uri, "hnsw", "HNSW")
    filled = 0
    for count in sizes:
        size, part = f"{count // 1000}k", corpus.first(count)
        fill(store, part, filled)
        plain.fill(part, filled)
        plain.settle(instances_collection(GALLERY, VERSION))
        filled = count
        arms = {"ours": Arm(our_search(store), server.pid), "faiss": faiss_arm(part)}
        arms |= {f"ef{ef}": Arm(plain.searching(ef), server.pid) for ef in EFS}
        found = measure(arms, part, budget_s, f"server_{size}")
        ours, other = (found[f"p1.server_{size}.{name}.p50_ms"] for name in ("ours", "ef256"))
        figures |= found
        figures[f"p1.server_ratio_{size}"] = round(ours / other, 4)
        figures[f"p1.server_{size}.anon_mib"] = round(memory_mib(server.pid)["anon"], 1)
        figures[f"p1.server_{size}.disk_mib"] = round(disk_mib(work), 1)
    store.close()
    recalls = [value for key, value in figures.items() if key.endswith(".ours.recall")]
    return figures | {"p2.server_min_recall": min(recalls)}


def main() -> None:
    parser = parser_of(__doc__)
    add_arguments(parser)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--budget-s", type=float, default=10.0, help="per case and way")
    arguments = parser.parse_args()
    sizes: list[int] = sorted(arguments.sizes)
    corpus = make_corpus(arguments, sizes[-1])
    with tempfile.TemporaryDirectory() as folder, milvus_server(Path(folder)) as server:
        figures = on_server(server, Path(folder), corpus, sizes, arguments.budget_s)
    print_figures(figures)
    write_report("p1_vector_search_server", figures)


if __name__ == "__main__":
    main()

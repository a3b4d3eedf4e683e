"""Vector search on a Milvus server: our store, plain searches, and the effect of `ef`.

    pip install --no-deps milvus==2.3.5
    python benchmarks/vector_search_server.py                                      10 minutes
    python benchmarks/vector_search_server.py --sizes 10000 30000 100000 1000000   an hour

Our store and the plain searches have a server each on this machine, and both share its cores with
the client. `anon_mib` and `disk_mib` are those of our store's server. After each size all rows are
indexed before the first search; `growing` is the recall before that. Everything else is as in
`vector_search.py`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _arms import Arm, faiss_arm, measure
from _indexing import parser_of
from _plain_milvus import PlainMilvus
from _report import write_report
from _vectors import (
    GALLERY,
    VERSION,
    Case,
    Corpus,
    add_arguments,
    cases_of,
    disk_mib,
    fill,
    make_corpus,
    memory_mib,
    our_search,
    print_figures,
    recall,
)

from reir.records import FloatArray
from reir.store import open_store
from reir.store.validation import require_server
from reir_testing.milvus_server import RunningServer, milvus_server

INDEX_TIMEOUT_S = 3600.0
EFS = (16, 64, 256)
"""Values of `ef` of the plain searches."""


def on_servers(
    servers: tuple[RunningServer, RunningServer],
    work: Path,
    corpus: Corpus,
    sizes: list[int],
    budget_s: float,
) -> dict[str, Any]:
    """Measure our store and plain searches at growing sizes.

    Args:
        servers: server of our store, which keeps its data in `work`, and server of the plain
            searches.
        work: folder with the data of our store's server.
        corpus: all instances.
        sizes: numbers of instances to measure with, smallest first.
        budget_s: seconds for each case and way.
    """
    figures: dict[str, Any] = {}
    mine, other = servers
    store, plain = require_server(open_store(mine.uri)), PlainMilvus(other.uri, "hnsw", "HNSW")
    search, filled = our_search(store), 0
    for count in sizes:
        size, part = size_name(count), corpus.first(count)
        fill(store, part, filled)
        # Before the final index is built, the server uses an interim index of lower recall.
        figures[f"p1.server_{size}.growing.recall"] = recall_now(search, part)
        plain.fill(part, filled)
        plain.wait_until_indexed()
        if not store.wait_until_indexed(
            GALLERY, VERSION, num_upserted=count - filled, timeout_s=INDEX_TIMEOUT_S
        ):
            raise SystemExit(f"not indexed within {INDEX_TIMEOUT_S:g} s")
        filled = count
        arms = {"ours": Arm(search, mine.pid), "faiss": faiss_arm(part)}
        arms |= {f"ef{ef}": Arm(plain.searching(ef), other.pid) for ef in EFS}
        taken = measure(arms, part, budget_s, f"server_{size}")
        figures |= taken
        # `ef` 256 is the plain search with the highest recall, so it is the fair comparison.
        ours, theirs = (taken[f"p1.server_{size}.{name}.p50_ms"] for name in ("ours", "ef256"))
        figures[f"p1.server_ratio_{size}"] = round(ours / theirs, 4)
        figures[f"p1.server_{size}.anon_mib"] = round(memory_mib(mine.pid)["anon"], 1)
        figures[f"p1.server_{size}.disk_mib"] = round(disk_mib(work), 1)
    store.close()
    recalls = [value for key, value in figures.items() if key.endswith(".ours.recall")]
    return figures | {"p2.server_min_recall": min(recalls)}


def recall_now(search: Callable[[FloatArray, Case], list[int]], corpus: Corpus) -> float:
    """Return the recall of text queries without a filter."""
    case, queries = cases_of(corpus)[0], corpus.queries
    found = [search(queries[number : number + 1], case) for number in range(len(queries))]
    return round(recall(found, case.truth(corpus)), 4)


def size_name(count: int) -> str:
    return f"{count // 1_000_000}m" if count % 1_000_000 == 0 else f"{count // 1000}k"


def main() -> None:
    parser = parser_of(__doc__)
    add_arguments(parser)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--budget-s", type=float, default=10.0, help="Seconds per case and way.")
    arguments = parser.parse_args()
    sizes: list[int] = sorted(arguments.sizes)
    corpus = make_corpus(arguments, sizes[-1])
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as second:
        work = Path(folder)
        with milvus_server(work) as mine, milvus_server(Path(second)) as other:
            figures = on_servers((mine, other), work, corpus, sizes, arguments.budget_s)
    print_figures(figures)
    write_report("vector_search_server", figures)


if __name__ == "__main__":
    main()

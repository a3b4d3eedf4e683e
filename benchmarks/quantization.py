"""What a first pass on quantized vectors with exact re-scoring brings: time, bytes and recall.

    python benchmarks/quantization.py

One thread scans codes for the best candidates, whose exact scores then decide. Two questions: does
this pay inside the exact reader, and how few bytes does an instance need (docs/scale.md)?
"""

from __future__ import annotations

import time
from typing import Any

import faiss
import numpy as np
from _indexing import parser_of
from _report import write_report
from _vectors import Corpus, K, add_arguments, cases_of, make_corpus, print_figures, recall

from reir.records import FloatArray

CANDIDATES = 100
PQ_TRAINING = 20_000


def indexes(dim: int) -> dict[str, Any]:
    """Return indexes by name; `flat` is what the exact reader scans."""
    scalar = faiss.IndexScalarQuantizer
    kinds = faiss.ScalarQuantizer
    inner = faiss.METRIC_INNER_PRODUCT
    return {
        "flat": faiss.IndexFlatIP(dim),
        "bf16": scalar(dim, kinds.QT_bf16, inner),
        "fp16": scalar(dim, kinds.QT_fp16, inner),
        "int8": scalar(dim, kinds.QT_8bit, inner),
        "int4": scalar(dim, kinds.QT_4bit, inner),
        "pq64": faiss.IndexPQ(dim, 64, 8, inner),
        "pq64_fast": faiss.IndexPQFastScan(dim, 64, 4, inner),
    }


def search(index: Any, corpus: Corpus, query_1D: FloatArray) -> list[int]:
    """Return the K best, by exact score, of the candidates that the codes propose."""
    if isinstance(index, faiss.IndexFlat):
        return [int(number) for number in index.search(query_1D, K)[1][0]]
    candidates = index.search(query_1D, CANDIDATES)[1][0]
    scores = corpus.vectors[candidates] @ query_1D[0]
    return [int(number) for number in candidates[np.argsort(-scores)[:K]]]


def main() -> None:
    parser = parser_of(__doc__)
    add_arguments(parser)
    parser.add_argument("--rows", type=int, default=100_000)
    arguments = parser.parse_args()
    corpus = make_corpus(arguments, arguments.rows)
    # As in the exact reader, which has one core per query.
    faiss.omp_set_num_threads(1)
    made = indexes(corpus.vectors.shape[1])
    for index in made.values():
        index.train(corpus.vectors[:PQ_TRAINING])
        index.add(corpus.vectors)
    found: dict[str, list[list[int]]] = {name: [] for name in made}
    times_ms: dict[str, list[float]] = {name: [] for name in made}
    for number in range(len(corpus.queries)):
        for name, index in made.items():
            started = time.perf_counter()
            found[name].append(search(index, corpus, corpus.queries[number : number + 1]))
            times_ms[name].append((time.perf_counter() - started) * 1e3)
    truth = cases_of(corpus)[0].truth(corpus)
    # The spelling of these keys is older than that of the code; results keep their keys.
    figures: dict[str, Any] = {"p1.quantised.rows": arguments.rows}
    for name, index in made.items():
        bytes_each = int(index.sa_code_size())
        figures |= {
            f"p1.quantised.{name}.p50_ms": round(float(np.median(times_ms[name])), 3),
            f"p1.quantised.{name}.bytes": bytes_each,
            f"p1.quantised.{name}.recall": round(recall(found[name], truth), 4),
        }
    print_figures(figures)
    write_report("quantization", figures)


if __name__ == "__main__":
    main()

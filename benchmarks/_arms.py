"""Compares ways to search ("arms") that answer the same queries in turn: time, CPU, recall."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import faiss
import numpy as np
from _vectors import Case, Corpus, K, cases_of, cpu_ms_of, recall

from reir.records import FloatArray

# However slow an arm is, fewer searches would not give a median.
MIN_QUERIES = 20


@dataclass
class Arm:
    """One way to search, and the cost of its searches.

    Attributes:
        search: query (1, D) and case -> numbers of the hits.
        pid: id of its server process; None if it has none.
        filters: whether it also gets filtered queries.
    """

    search: Callable[[FloatArray, Case], list[int]]
    pid: int | None = None
    filters: bool = True
    found: list[list[int]] = field(default_factory=list)
    times_ms: list[float] = field(default_factory=list)
    cpu_ms: float = 0.0

    def ask(self, query_1D: FloatArray, case: Case) -> None:
        """Search once and record the time, including CPU time of the server process."""
        cpu_ms = self._cpu_ms()
        started = time.perf_counter()
        self.found.append(self.search(query_1D, case))
        self.times_ms.append((time.perf_counter() - started) * 1e3)
        self.cpu_ms += self._cpu_ms() - cpu_ms

    def take(self, case: Case, corpus: Corpus) -> dict[str, float | int]:
        """Return the figures of one case, and clear the records."""
        figures = {
            "p50_ms": round(float(np.percentile(self.times_ms, 50)), 3),
            "p95_ms": round(float(np.percentile(self.times_ms, 95)), 3),
            "cpu_ms": round(self.cpu_ms / len(self.times_ms), 2),
            "recall": round(recall(self.found, case.truth(corpus)), 4),
            "queries": len(self.times_ms),
        }
        self.found, self.times_ms, self.cpu_ms = [], [], 0.0
        return figures

    def _cpu_ms(self) -> float:
        server = 0.0 if self.pid is None else cpu_ms_of(self.pid)
        return time.process_time() * 1e3 + server


def measure(
    arms: dict[str, Arm], corpus: Corpus, budget_s: float, size: str
) -> dict[str, float | int]:
    """Run every case with every arm, in turn, so that all run on the machine in the same state."""
    figures: dict[str, float | int] = {}
    for case in cases_of(corpus):
        asked = {name: arm for name, arm in arms.items() if arm.filters or case.where is None}
        # The first search of a case may load or build something, which no arm should be charged
        # for.
        for arm in asked.values():
            arm.search(corpus.queries[:1], case)
        for number in range(len(corpus.queries)):
            query = corpus.queries[number : number + 1]
            for arm in asked.values():
                if number < MIN_QUERIES or sum(arm.times_ms) < budget_s * 1e3:
                    arm.ask(query, case)
        protocol = f"p1.{size}" if case.where is None else f"p2.{size}.{case.name}"
        for name, arm in asked.items():
            taken = arm.take(case, corpus)
            print(f"{protocol}.{name:12} {taken}", flush=True)
            figures |= {f"{protocol}.{name}.{key}": value for key, value in taken.items()}
    return figures


def faiss_arm(corpus: Corpus) -> Arm:
    """The ground truth without filters: a full scan on one thread."""

    def search(query_1D: FloatArray, _: Case) -> list[int]:
        # One thread, as in our search: a replica has only one core for a query.
        faiss.omp_set_num_threads(1)
        found = faiss.knn(query_1D, corpus.vectors, K, faiss.METRIC_INNER_PRODUCT)[1]
        return [int(number) for number in found[0]]

    return Arm(search, filters=False)

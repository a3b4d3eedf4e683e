"""What the service adds (HTTP, Ray Serve and batching) to the functions that answer a query.

    python benchmarks/service_overhead.py

Three servers for one gallery, with one answering process each, loaded in turn by `wrk`:

    ours       `reir serve` as a user starts it
    fastapi    the same application on uvicorn alone, as a service without Ray
    default    the same application on Ray Serve with its default settings, without HAProxy

A no-op is `GET /healthz`, which passes every layer and does no work. A full query is
`POST /v1/search` without the re-ranker. The floor is what no service can avoid: one expression
through the text model, and an exact search of the raw vectors (faiss), called directly. Service and
floor take turns in blocks of `BLOCK` queries, because a change after every query would evict each
other's data from the caches and let their waiting threads compete for the cores. The other servers,
which use the CPU even when idle, start later.

    p3.vs_default     no-op requests per second relative to `default`, at 8 connections: the cost of
                      the layers alone
    p3.vs_default_full, p3.vs_default_full_most
                      full queries per second relative to `default`, lowest and highest ratio over
                      all concurrencies: the difference that a user notices
    p3.vs_fastapi     full queries per second relative to `fastapi`, lowest ratio over all
                      concurrencies
    p3.added_ms       median of a full query at one connection, minus that of `fastapi`
    query.floor_ratio median of a full query at one connection relative to the floor in the same
                      block; median over the blocks
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import faiss
import numpy as np
from _indexing import encoder_of, expressions, parser_of
from _load import Answers, Line, closed_load
from _report import write_report
from _served import GALLERY, VERSION, add_arguments, bodies, fill_gallery, served, wait_for

from reir.records import FloatArray
from reir.store import open_store
from reir_serving.config import Limits, ServeConfig
from reir_testing.serving import free_port

CONCURRENCIES = (1, 8, 32)
ARMS = ("ours", "fastapi", "default")
LIMITS = Limits(max_queued_requests=64)
"""Capacity of all servers: enough for the largest number of connections."""
K = 10
BLOCK = 20


def main() -> None:
    """Measure, print and save the figures; with --arm, run one of the servers."""
    parser = parser_of(__doc__)
    add_arguments(parser)
    parser.add_argument("--seconds", type=float, default=20.0, help="Duration of a load.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arm", choices=ARMS[1:], help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm:
        config = ServeConfig(
            store=arguments.store,
            galleries=(GALLERY,),
            port=arguments.port,
            limits=LIMITS,
            access_log=Path(os.devnull),
        )
        {"fastapi": be_fastapi, "default": be_default}[arguments.arm](config)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = fill_gallery(arguments, folder)
        options = {"limits": LIMITS.model_dump(mode="json")}
        with served(store, folder, free_port(), options) as server:
            # The floor is measured first, because idle servers use the CPU as well.
            figures, urls = against_floor(server.url, store, arguments), {"ours": server.url}
            with ExitStack() as others:
                for arm in ARMS[1:]:
                    urls[arm] = others.enter_context(other(arm, store, folder))
                figures |= overhead(urls, arguments)
    for key, value in figures.items():
        print(f"{key:36} {value}")
    print(f"figures in {write_report('service_overhead', figures).name}")


def be_fastapi(config: ServeConfig) -> None:
    """Serve the application on uvicorn alone."""
    import uvicorn

    from reir_serving.backend.models import ModelCache
    from reir_serving.backend.service import Service
    from reir_serving.backend.workers import SearchWorkers
    from reir_serving.http.app import create_app
    from reir_serving.middleware.logs import open_logs

    open_logs(config.access_log)
    store = open_store(config.store)
    service = Service(
        config, store, SearchWorkers(store, ModelCache(), config.limits), Path("uploads")
    )
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(service, config), port=config.port, log_level="error", access_log=False
        )
    )

    async def serve() -> None:
        await service.warm_up()
        await server.serve()

    asyncio.run(serve())


def be_default(config: ServeConfig) -> None:
    """Serve the application on Ray Serve with its default settings."""
    from reir_serving.ray.lifecycle import serving

    with tempfile.TemporaryDirectory() as folder, serving(config, Path(folder)):
        sys.stdin.read()  # until the benchmark ends


@contextmanager
def other(arm: str, store: str, folder: Path) -> Iterator[str]:
    """Run one of the other servers, and yield its address."""
    port = free_port()
    command = [sys.executable, __file__, "--arm", arm, "--store", store, "--port", str(port)]
    with (
        (folder / f"{arm}.log").open("w") as log,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stderr=log,
            stdout=log,
            # One thread, as in the replicas of `ours`.
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ) as process,
    ):
        try:
            wait_for(f"http://127.0.0.1:{port}/readyz", process)
            yield f"http://127.0.0.1:{port}"
        finally:
            if arm == "fastapi":
                process.terminate()
            process.communicate(timeout=60)


def overhead(urls: dict[str, str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Load the servers in turn, and return medians over the rounds."""
    queries = bodies(arguments.queries, rerank=False)
    taken: dict[tuple[str, str, int], list[Answers]] = {}
    for _ in range(arguments.rounds):
        for connections in CONCURRENCIES:
            for arm, url in urls.items():
                noop = closed_load(f"{url}/healthz", connections, arguments.seconds / 2)
                full = closed_load(f"{url}/v1/search", connections, arguments.seconds, queries)
                taken.setdefault((arm, "noop", connections), []).append(noop)
                taken.setdefault((arm, "full", connections), []).append(full)
    figures: dict[str, Any] = {}
    for (arm, kind, connections), answers in taken.items():
        name = f"p3.{arm}.{kind}.c{connections}"
        figures[f"{name}.per_s"] = round(median(each.good_per_s for each in answers), 1)
        for percent in (50, 95, 99):
            times = [getattr(each, f"p{percent}_ms") for each in answers]
            figures[f"{name}.p{percent}_ms"] = round(median(times), 2)
        figures[f"{name}.failed"] = sum(each.failed for each in answers)

    def per_s(arm: str, kind: str, connections: int) -> float:
        return float(figures[f"p3.{arm}.{kind}.c{connections}.per_s"])

    for connections in CONCURRENCIES:
        for kind in ("noop", "full"):
            for arm in ARMS[1:]:
                ratio = per_s("ours", kind, connections) / per_s(arm, kind, connections)
                figures[f"p3.vs_{arm}.{kind}.c{connections}"] = round(ratio, 3)
    ratios = {
        arm: [figures[f"p3.vs_{arm}.full.c{connections}"] for connections in CONCURRENCIES]
        for arm in ARMS[1:]
    }
    figures["p3.vs_default"] = figures["p3.vs_default.noop.c8"]
    figures["p3.vs_default_full"] = min(ratios["default"])
    figures["p3.vs_default_full_most"] = max(ratios["default"])
    figures["p3.vs_fastapi"] = min(ratios["fastapi"])
    times = [figures[f"p3.{arm}.full.c1.p50_ms"] for arm in ("ours", "fastapi")]
    figures["p3.added_ms"] = round(times[0] - times[1], 2)
    return figures


def against_floor(url: str, store: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Send the same queries to service and floor; return medians, for the service also by stage."""
    encoder, vectors = encoder_of(arguments), all_vectors(store)
    texts = expressions(arguments.queries)
    faiss.omp_set_num_threads(1)
    line = Line(url.removeprefix("http://"))
    floor: list[float] = []
    whole: list[float] = []
    stages: dict[str, list[float]] = {}

    def ask_floor(text: str) -> None:
        started_s = time.perf_counter()
        query = encoder.encode_expressions([text])
        faiss.knn(query, vectors, K, faiss.METRIC_INNER_PRODUCT)
        floor.append((time.perf_counter() - started_s) * 1e3)

    def ask_service(text: str) -> None:
        body = json.dumps({"gallery": GALLERY, "expression": text, "k": K, "rerank": False})
        started_s = time.perf_counter()
        answer = line.post("/v1/search", body.encode())
        whole.append((time.perf_counter() - started_s) * 1e3)
        for stage, ms in json.loads(answer)["timings_ms"].items():
            stages.setdefault(stage, []).append(ms)

    ways = (ask_floor, ask_service)
    blocks = [texts[start : start + BLOCK] for start in range(0, len(texts), BLOCK)]
    # The first block is repeated and not counted: it warms up. The order alternates, so that
    # neither way always finds the caches filled by the other.
    for number, block in enumerate([blocks[0], *blocks]):
        for way in ways[:: 1 if number % 2 else -1]:
            for text in block:
                way(text)
    line.close()
    figures: dict[str, Any] = {"query.instances": len(vectors), "query.queries": len(texts)}
    for name, times in {"": whole, "_floor": floor}.items():
        figures |= _percentiles(f"query.ms{name}", times[BLOCK:])
    for stage, times in stages.items():
        figures |= _percentiles(f"query.ms_{stage}", times[BLOCK:])
    starts = range(BLOCK, len(whole), BLOCK)
    ratios = [median(whole[i : i + BLOCK]) / median(floor[i : i + BLOCK]) for i in starts]
    figures["query.floor_ratio"] = round(median(ratios), 3)
    return figures


def _percentiles(name: str, times: list[float]) -> dict[str, float]:
    return {f"{name}.p{p}": round(float(np.percentile(times, p)), 2) for p in (50, 95, 99)}


def all_vectors(location: str) -> FloatArray:
    """Read the (N, D) vectors of the gallery."""
    store = open_store(location)
    try:
        ids = [row.image_id for row in store.iter_images(GALLERY, VERSION)]
        parts = []
        for start in range(0, len(ids), 512):
            images = store.get_indexed(GALLERY, VERSION, ids[start : start + 512])
            parts += [each.instances.vectors for each in images.values() if each.instances]
    finally:
        store.close()
    return np.concatenate(parts)


if __name__ == "__main__":
    main()

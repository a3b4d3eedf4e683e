"""Time of one query on the embedded store, divided into text, search and ranking.

    python benchmarks/query.py

The gallery consists of real photos encoded by the checkpoint. Realistic expressions are searched
one at a time, as `reir search` does it: with presence, and without the re-ranker
(`query.p50_ms`), which is off by default, or with it (`query.reranked_p50_ms`). In between, a plain
`MilvusClient.search` looks for the same vectors in the same collection, which is what the embedded
store would do without its exact reader. The benchmark also counts how many of the ten best
instances agree.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from _indexing import copy_photos, encoder_of, expressions, parser_of
from _report import write_report
from pymilvus import MilvusClient

from reir.checkpoint import SHIPPED
from reir.models.interfaces import InstanceEncoder
from reir.query.request import Query, Term
from reir.query.search import CheckpointExtras, Gallery, load_extras
from reir.store import InstanceStore, open_store
from reir.store.collection import VECTOR
from reir.store.embedded.lite_server import LiteServer
from reir.store.names import instances_collection
from reir_ingestion.pipeline import index

GALLERY = "photos"
STAGES = ("text", "search", "rank")
WAYS = ("ours", "reranked", "plain")
K = 10


def measure(
    store: InstanceStore,
    encoder: InstanceEncoder,
    extras: CheckpointExtras,
    address: str,
    texts: list[str],
) -> dict[str, float | int]:
    """Search for every expression in our gallery, with and without re-ranker, and in plain Milvus.

    The order of the three rotates from one expression to the next.
    """
    gallery = Gallery(GALLERY, store, encoder, extras)
    collection = instances_collection(GALLERY, gallery.version)
    client = MilvusClient(uri=address)
    # Otherwise, every plain search would copy what was written last, and be slower than it need be.
    client.flush(collection)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    stages: dict[str, list[float]] = {}
    same = 0
    for number, text in enumerate(texts):
        # The plain search gets its vector for free; ours includes the time of the text encoder.
        vector = encoder.encode_expressions([text])
        turn = number % len(WAYS)
        for way in WAYS[turn:] + WAYS[:turn]:
            started = time.perf_counter()
            if way == "plain":
                rows = client.search(
                    collection,
                    data=vector.tolist(),
                    limit=K,
                    anns_field=VECTOR,
                    output_fields=["image_id"],
                )[0]
            else:
                wanted = Query(
                    terms=(Term(expression=text),), k=K, per_image=K, rerank=way == "reranked"
                )
                (result,) = gallery.ask([wanted])
            times[way].append((time.perf_counter() - started) * 1e3)
            if way == "ours":
                ours = result
                for stage in STAGES:
                    stages.setdefault(f"_{stage}", []).append(result.timings_ms[stage])
            elif way == "reranked" and "rerank" in result.timings_ms:
                stages.setdefault("_rerank", []).append(result.timings_ms["rerank"])
        same += len({hit.instance_id for hit in ours.hits} & {row["instance_id"] for row in rows})
    client.close()
    figures: dict[str, float | int] = {"query.queries": len(texts)}
    figures |= percentiles("query.", times["ours"]) | percentiles(
        "query.reranked_", times["reranked"]
    )
    for stage, taken in stages.items():
        figures |= percentiles("query.", taken, stage)
    figures |= percentiles("query.plain_search_", times["plain"])
    # Only the search stage is comparable: the plain search neither encodes nor ranks.
    ratio = np.median(np.array(stages["_search"]) / np.array(times["plain"]))
    figures["query.search_to_plain_ratio"] = round(float(ratio), 3)
    figures["query.same_top10"] = round(same / (K * len(texts)), 4)
    return figures


def percentiles(name: str, times_ms: list[float], end: str = "") -> dict[str, float]:
    """Return median and 95th percentile as `<name>p50_ms<end>` and `<name>p95_ms<end>`."""
    return {f"{name}p{p}_ms{end}": round(float(np.percentile(times_ms, p)), 2) for p in (50, 95)}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--photos", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=300)
    arguments: argparse.Namespace = parser.parse_args()
    encoder = encoder_of(arguments)
    extras = load_extras(arguments.checkpoint or SHIPPED, encoder)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        photos = copy_photos(work / "photos", arguments.photos)
        store = open_store(str(work / "store"))
        index(photos, GALLERY, store, encoder)
        (version,) = store.versions(GALLERY)
        texts = expressions(arguments.queries + 10)
        server = LiteServer(work / "store")
        address = server.address().uri
        measure(store, encoder, extras, address, texts[:10])  # the first ones load and warm up
        figures = measure(store, encoder, extras, address, texts[10:])
        figures |= {"query.photos": version.num_images, "query.instances": version.num_instances}
        server.close()
        store.close()
    for key, value in figures.items():
        print(f"{key:32} {value}")
    write_report("query", figures)


if __name__ == "__main__":
    main()

"""Time of one query, split into text, search and rank, on the embedded store.

    python benchmarks/query.py

Gallery: real photos through the checkpoint; queries: expressions of real people's kind, one at a
time. Beside our search stage, interleaved with it: the plain `MilvusClient.search` of the same
vectors on the same collection, which is what the embedded store would do without its exact reader,
and whether both name the same best ten instances.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from _indexing import encoder_of, expressions, link_photos, parser_of
from _report import write_report
from pymilvus import MilvusClient

from reir.models.seams import InstanceEncoder
from reir.search import Gallery
from reir.store import InstanceStore, open_store
from reir.store.lite_server import LiteServer
from reir.store.names import instances_collection
from reir.store.table import VECTOR
from reir_ingestion.pipeline import index

GALLERY = "photos"
STAGES = ("text", "search", "rank")
K = 10


def measure(
    store: InstanceStore, encoder: InstanceEncoder, address: str, texts: list[str]
) -> dict[str, float | int]:
    """Ask every expression of our gallery and of the bare store, each first in turn."""
    gallery = Gallery(GALLERY, store, encoder)
    collection = instances_collection(GALLERY, gallery.version)
    client = MilvusClient(uri=address)
    client.flush(collection)  # otherwise every plain search copies what was written last
    ours: dict[str, list[float]] = {stage: [] for stage in (*STAGES, "total")}
    plain: list[float] = []
    same = 0
    for number, text in enumerate(texts):
        vector = encoder.encode_expressions([text])
        for way in ("plain", "ours") if number % 2 else ("ours", "plain"):
            started = time.perf_counter()
            if way == "plain":
                rows = client.search(
                    collection,
                    data=vector.tolist(),
                    limit=K,
                    anns_field=VECTOR,
                    output_fields=["image_id"],
                )[0]
                plain.append((time.perf_counter() - started) * 1e3)
            else:
                result = gallery.search(text, k=K, per_image=K)
                ours["total"].append((time.perf_counter() - started) * 1e3)
                for stage in STAGES:
                    ours[stage].append(result.timings_ms[stage])
        same += len({hit.instance_id for hit in result.hits} & {row["instance_id"] for row in rows})
    client.close()
    figures: dict[str, float | int] = {"query.queries": len(texts)}
    for stage, times in ours.items():
        name = "" if stage == "total" else f"_{stage}"
        for percent in (50, 95):
            figures[f"query.p{percent}_ms{name}"] = round(float(np.percentile(times, percent)), 2)
    for percent in (50, 95):
        figures[f"query.plain_search_p{percent}_ms"] = round(
            float(np.percentile(plain, percent)), 2
        )
    ratio = np.median(np.array(ours["search"]) / np.array(plain))
    figures["query.search_to_plain_ratio"] = round(float(ratio), 3)
    figures["query.same_top10"] = round(same / (K * len(texts)), 4)
    return figures


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--photos", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=300)
    arguments: argparse.Namespace = parser.parse_args()
    encoder = encoder_of(arguments)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        photos = link_photos(work / "photos", arguments.photos)
        store = open_store(str(work / "store"))
        index(photos, GALLERY, store, encoder)
        (version,) = store.versions(GALLERY)
        texts = expressions(arguments.queries + 10)
        server = LiteServer(work / "store")
        address = server.address().uri
        measure(store, encoder, address, texts[:10])  # the first queries load and warm up
        figures = measure(store, encoder, address, texts[10:])
        figures |= {"query.photos": version.num_images, "query.instances": version.num_instances}
        server.close()
        store.close()
    for key, value in figures.items():
        print(f"{key:32} {value}")
    write_report("query", figures)


if __name__ == "__main__":
    main()

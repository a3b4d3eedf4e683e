"""Writing to a Milvus server: our store with one writer and several, and what Milvus offers.

    pip install --no-deps milvus==2.3.5
    python benchmarks/store_writes.py

Each way writes the same random instances under keys of its own:

    ours_N        `upsert_images` by N threads, in the batches of `reir index`
    ours_import   `import_images` by 4 threads as in `--bulk-import`, until all can be found
    upsert        the same rows by the client's upsert, in large calls; no ledger
    insert        the same by its insert, which replaces nothing and can write a row twice
    bulk_import   one file per column, written here and read by the server; no ledger

The server shares the cores with its client, so its CPU time matters as much as the rate.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _indexing import parser_of
from _report import write_report
from _vectors import GALLERY, VERSION, cpu_ms_of, indexed_image, print_figures
from pymilvus import DataType, MilvusClient

from reir.records import IndexedImage
from reir.store import VersionSpec, open_store, rows
from reir.store.collection import PAGE_ROWS
from reir.store.names import instances_collection
from reir.store.validation import require_server
from reir_ingestion.stages import IMPORT_IMAGES
from reir_testing.milvus_server import RunningServer, milvus_server

DIM = 256
WRITERS = (1, 4, 8)
_POLL_S = 0.05
_DTYPES: dict[DataType, Any] = {DataType.FLOAT: np.float32, DataType.FLOAT_VECTOR: np.float32}


def some_images(first: int, count: int, per_image: int) -> list[IndexedImage]:
    """Return `count` images from number `first` on."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((count * per_image, DIM), dtype=np.float32)
    boxes = np.tile(np.array([0.1, 0.1, 0.5, 0.5], np.float32), (per_image, 1))
    parts = np.split(vectors, count)
    return [indexed_image(first + n, part, boxes, tenant=0) for n, part in enumerate(parts)]


def measured(server: RunningServer, name: str, num_rows: int, run: Callable[[], None]) -> Any:
    """Return time and CPU time of `run`, under the name of a way."""
    server_ms, own_s, started = cpu_ms_of(server.pid), time.process_time(), time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    figures = {
        f"store_writes.{name}.rows_per_s": round(num_rows / seconds),
        f"store_writes.{name}.server_cpu_s": round((cpu_ms_of(server.pid) - server_ms) / 1e3, 2),
        f"store_writes.{name}.client_cpu_s": round(time.process_time() - own_s, 2),
    }
    print_figures(figures)
    return figures


def ours(server: RunningServer, batches: Sequence[list[IndexedImage]], writers: int) -> None:
    store = open_store(server.uri)
    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(lambda batch: store.upsert_images(GALLERY, VERSION, batch), batches))
    store.close()


def ours_by_file(
    server: RunningServer, batches: Sequence[list[IndexedImage]], storage: Path
) -> None:
    store = require_server(open_store(server.uri))
    with ThreadPoolExecutor(WRITERS[1]) as pool:
        put = partial(store.import_images, GALLERY, VERSION, storage=str(storage))
        list(pool.map(put, batches))
    store.close()


def in_pages(write: Callable[..., Any], collection: str, found: list[dict[str, Any]]) -> None:
    for start in range(0, len(found), PAGE_ROWS):
        write(collection, found[start : start + PAGE_ROWS])


def import_files(client: MilvusClient, collection: str, folder: Path, found: list[Any]) -> None:
    """Write a file for each column, and wait until the server has read them."""
    folder.mkdir()
    for column in client.describe_collection(collection)["fields"]:
        name, kind = column["name"], column["type"]
        values = [row[name] for row in found]
        if kind == DataType.JSON:
            values = [json.dumps(value) for value in values]
        np.save(folder / f"{name}.npy", np.array(values, _DTYPES.get(kind)))
    handler = client._get_connection()  # the client itself lacks the call
    task = handler.do_bulk_insert(collection, "", [str(each) for each in folder.iterdir()])
    while (state := handler.get_bulk_insert_state(task)).state_name != "Completed":
        if "ailed" in state.state_name:
            raise SystemExit(f"the import failed: {state.failed_reason}")
        time.sleep(_POLL_S)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--photos", type=int, default=2_000, help="Photos per way.")
    parser.add_argument("--per-image", type=int, default=30)
    parser.add_argument("--batch", type=int, default=32, help="Photos per batch.")
    parser.add_argument("--imports", type=int, default=4, help="Number of bulk imports.")
    asked = parser.parse_args()
    num_rows = asked.photos * asked.per_image
    figures: dict[str, Any] = {"store_writes.rows": num_rows}
    with tempfile.TemporaryDirectory() as name, milvus_server(Path(name)) as server:
        store = open_store(server.uri)
        store.create_version(GALLERY, VERSION, VersionSpec(dim=DIM, digest="benchmark"))
        for number, writers in enumerate(WRITERS):
            made = some_images(number * asked.photos, asked.photos, asked.per_image)
            batches = [made[at : at + asked.batch] for at in range(0, len(made), asked.batch)]
            ours(server, batches[:1], 1)  # warm
            run = partial(ours, server, batches, writers)
            figures |= measured(server, f"ours_{writers}", num_rows, run)
        # Keys that no other way uses, so that no rows are replaced.
        imported = [
            some_images((len(WRITERS) + 4) * asked.photos + at, IMPORT_IMAGES, asked.per_image)
            for at in range(0, asked.imports * IMPORT_IMAGES, IMPORT_IMAGES)
        ]
        run = partial(ours_by_file, server, imported, Path(name) / "import")
        num_imported = len(imported) * IMPORT_IMAGES * asked.per_image
        figures |= measured(server, "ours_import", num_imported, run)
        client = MilvusClient(server.uri)
        collection = instances_collection(GALLERY, VERSION)
        for number, way in enumerate(("upsert", "insert", "bulk_import"), len(WRITERS)):
            made = some_images(number * asked.photos, asked.photos, asked.per_image)
            found = [
                row
                for image in made
                for row in rows.instance_rows(image, with_masks=False, with_derived=True)
            ]
            if way == "bulk_import":
                run = partial(import_files, client, collection, Path(name) / "files", found)
            else:
                run = partial(in_pages, getattr(client, way), collection, found)
            figures |= measured(server, way, num_rows, run)
        store.close()
    write_report("store_writes", figures)


if __name__ == "__main__":
    main()

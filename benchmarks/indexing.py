"""Indexing real photos, compared with the loops that one would write oneself.

    python benchmarks/indexing.py                                       50 minutes on two cores
    python benchmarks/indexing.py --images 20000 --rounds 1 --many 0    90 minutes more
    python benchmarks/indexing.py --rounds 0                            memory only; 20 minutes

Each way fills a gallery with the same photos, by the same model, in the same kind of store:

    ours    `reir index`, which chooses its runner itself
    bs1     a loop that reads, decodes, encodes and writes one photo at a time
    bs32    the same loop with 32 photos at a time
    recipe  Ray Data as in its guides: read_images, map_batches with an actor, and pymilvus

Each run is a process of its own with a store of its own, timed from its start to its end. The ways
take turns, and ratios are medians over the rounds. `bare` is the model alone on decoded photos, in
the batches of `ours`. If more files are needed than there are photos, the rest are copies with
different bytes. The last part measures the memory of `ours` on few photos and on many
(`indexing_memory.json`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from _indexing import real_photos, repeat_photos
from _report import write_report

from reir.encoders import load_encoder_spec
from reir.images.decode import canonical_uri, content_hash, decode, image_id, read_bytes, read_image
from reir.models.interfaces import InstanceEncoder
from reir.records import ImageRecord, IndexedImage, RgbImage
from reir.store import InstanceStore, open_store
from reir_ingestion.pipeline import version_name, version_spec
from reir_ingestion.stages import IndexOptions
from reir_ingestion.threads import share_cores

RESIDENT_PHOTOS, BARE_S = 256, 60.0
"""Decoded photos that `bare` goes through again and again, and for how long: a core that has been
idle is faster for some seconds than one that works for minutes."""

Figures = dict[str, Any]
Item = TypeVar("Item")


def ours(folder: Path, place: Path) -> Figures:
    """Run `reir index` as a user types it."""
    command = ["index", str(folder), "--gallery", "p4", "--store", str(place), "--json"]
    return json_of([sys.executable, "-c", "from reir.cli.main import main; main()", *command])


def loop(batch_size: int) -> Callable[[Path, Path], Figures]:
    """Return the obvious way: a loop over batches that does one step after the other."""

    def run(folder: Path, place: Path) -> Figures:
        encoder, store = load_encoder_spec(""), open_store(str(place))
        spec = version_spec(encoder, IndexOptions())
        version = version_name(spec.digest, spec.settings)
        store.create_version("p4", version, spec)
        for paths in chunks(sorted(folder.iterdir()), batch_size):
            store.upsert_images("p4", version, encoded(paths, encoder))
        store.promote("p4", version)
        figures = {"instances": num_instances(store)}
        store.close()
        return figures

    return run


def chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def encoded(paths: Sequence[Path], encoder: InstanceEncoder) -> list[IndexedImage]:
    files = [read_bytes(path) for path in paths]
    images = [decode(data) for data in files]
    found = encoder.encode_images([image.pixels for image in images])
    rows = []
    for path, data, image, instances in zip(paths, files, images, found, strict=True):
        status, uri = path.stat(), canonical_uri(path)
        record = ImageRecord(
            image_id=image_id(uri),
            uri=uri,
            status="indexed",
            content_hash=content_hash(data),
            size_bytes=status.st_size,
            mtime_ns=status.st_mtime_ns,
            width_px=image.width_px,
            height_px=image.height_px,
            num_instances=len(instances),
        )
        rows.append(IndexedImage(record, instances))
    return rows


def num_instances(store: InstanceStore) -> int:
    return sum(version.num_instances for version in store.versions("p4"))


class RecipeEncoder:
    """The actor of the recipe; it is allowed to use all cores, which Ray does not do by default."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(os.cpu_count() or 1)
        self.encoder = load_encoder_spec("")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        found = self.encoder.encode_images(list(batch["image"]))
        counts = [len(each) for each in found]
        return {
            "path": np.repeat(batch["path"], counts),
            "number": np.concatenate([np.arange(count) for count in counts]),
            "box": np.concatenate([each.boxes for each in found]),
            "vector": np.concatenate([each.vectors for each in found]),
        }


def recipe(folder: Path, place: Path) -> Figures:
    """Ray Data and pymilvus, with nothing of the platform but its model and its server."""
    import ray
    from pymilvus import DataType, MilvusClient

    from reir.store.embedded.lite_server import LiteServer

    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    server = LiteServer(place)
    client = MilvusClient(server.address().uri)
    schema = MilvusClient.create_schema()
    schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=1024)
    schema.add_field("box", DataType.JSON)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=load_encoder_spec("").dim)
    index = MilvusClient.prepare_index_params()
    index.add_index("vector", index_type="FLAT", metric_type="IP")
    client.create_collection("p4", schema=schema, index_params=index)
    photos = ray.data.read_images(str(folder), mode="RGB", include_paths=True)
    found = photos.map_batches(
        RecipeEncoder, batch_size=32, compute=ray.data.ActorPoolStrategy(size=1)
    )
    count = 0
    for batch in found.iter_batches(batch_size=None):
        columns = (batch["path"], batch["number"], batch["box"], batch["vector"])
        rows = [
            {"id": f"{path}#{number}", "box": box.tolist(), "vector": vector.tolist()}
            for path, number, box, vector in zip(*columns, strict=True)
        ]
        client.insert("p4", rows)
        count += len(rows)
    client.close()
    server.close()
    ray.shutdown()
    return {"instances": count}


def bare(folder: Path, _: Path) -> Figures:
    """The model alone: in parallel threads as in `ours`, and with all cores on one batch."""
    encoder, options = load_encoder_spec(""), IndexOptions()
    # Decoded in advance, so that only the model is timed.
    images = [read_image(path) for path in islice(sorted(folder.iterdir()), RESIDENT_PHOTOS)]
    parts = list(chunks(images, options.batch_size))
    # Whichever is faster on this machine counts, so that the share of `ours` is not flattered.
    rates = [rate_of(encoder, parts, threads) for threads in {options.num_encoders, 1}]
    return {"images_per_s": max(rates)}


def rate_of(
    encoder: InstanceEncoder, parts: Sequence[Sequence[RgbImage]], num_threads: int
) -> float:
    with share_cores(num_threads), ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(encoder.encode_images, parts[: 2 * num_threads]))  # warm
        started_s = time.perf_counter()
        list(pool.map(encoder.encode_images, parts))
        rounds = ceil(BARE_S / (time.perf_counter() - started_s))
        started_s = time.perf_counter()
        list(pool.map(encoder.encode_images, [*parts] * rounds))
        return rounds * sum(map(len, parts)) / (time.perf_counter() - started_s)


WAYS: dict[str, Callable[[Path, Path], Figures]] = {
    "ours": ours,
    "bs1": loop(1),
    "bs32": loop(32),
    "recipe": recipe,
    "bare": bare,
}


def json_of(command: Sequence[str]) -> Figures:
    """Run a command that prints JSON, and add the seconds from its start to its end."""
    # A number of threads in the environment would limit the loops, but not a runner.
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{command} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    answer = done.stdout[("\n" + done.stdout).rindex("\n{") :]  # Ray may have printed before it
    return {**json.loads(answer), "whole_seconds": seconds}


def run_way(way: str, folder: Path, place: Path) -> Figures:
    if way == "ours":
        return ours(folder, place)
    script = str(Path(__file__).resolve())
    return json_of([sys.executable, script, "--child", way, str(folder), str(place)])


def compete(folder: Path, work: Path, num_images: int, rounds: int) -> Figures:
    """Run the ways in turn and return their figures."""
    runs: dict[str, list[Figures]] = {way: [] for way in WAYS}
    ways = list(WAYS)
    for number in range(rounds):
        # Each round starts with another way, since the machine's speed changes over an hour.
        for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
            found = run_way(way, folder, work / f"{way}-{number}")
            runs[way].append(found)
            print(f"round {number}: {way:8} {found['whole_seconds']:8.1f} s", flush=True)
    mine, alone = runs["ours"], runs["bare"]
    against = {
        f"p4.vs_{name}": median(
            # Ratios within a round, in which the machine was about equally fast for all ways.
            theirs["whole_seconds"] / ours["whole_seconds"]
            for theirs, ours in zip(runs[way], mine, strict=True)
        )
        for way, name in (("bs1", "bs1"), ("bs32", "bs32"), ("recipe", "ray_recipe"))
    }
    shares = [a["images_per_s"] / b["images_per_s"] for a, b in zip(mine, alone, strict=True)]
    return {
        "p4.images": num_images,
        "p4.rounds": rounds,
        **against,
        "index.speedup": against["p4.vs_bs1"],
        "p4.model_share": median(shares),
        "index.model_share": median(shares),
        "p4.startup_seconds": median(each["whole_seconds"] - each["seconds"] for each in mine),
        **{
            f"p4.images_per_s_{way}": num_images / median(e["whole_seconds"] for e in found)
            for way, found in runs.items()
            if way != "bare"
        },
        "p4.images_per_s_bare": median(each["images_per_s"] for each in alone),
        **{
            f"p4.busy_seconds_{stage}": median(each["stage_seconds"][stage] for each in mine)
            for stage in mine[0]["stage_seconds"]
        },
        **{f"p4.instances_{way}": runs[way][0]["instances"] for way in runs if way != "bare"},
    }


def grow(work: Path, few: int, many: int) -> Figures:
    """Return the memory of `ours` on few photos and on many."""
    figures: Figures = {}
    peaks = []
    for count in (few, many):
        folder = repeat_photos(work / f"grow-{count}", count)
        first = ours(folder, work / f"grow-{count}.store")
        peaks.append(first["peak_rss_bytes"])
        figures[f"p4.rss_mib_{count}"] = peaks[-1] / 2**20
        figures[f"p4.images_per_s_{count}"] = count / first["whole_seconds"]
        print(f"{count} photos: {first['whole_seconds']:.1f} s, {peaks[-1] / 2**20:.0f} MiB")
    growth = peaks[1] / peaks[0]
    return figures | {"p4.rss_growth": growth, "index.rss_growth": growth}


def rounded(figures: Figures) -> Iterator[tuple[str, Any]]:
    for key, value in figures.items():
        yield key, round(value, 3) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=2_300, help="Photos of each timed run.")
    parser.add_argument("--rounds", type=int, default=3, help="Timed runs per way; 0: none.")
    parser.add_argument("--few", type=int, default=2_000, help="Photos of the small memory run.")
    parser.add_argument(
        "--many", type=int, default=20_000, help="Photos of the large run; 0: none."
    )
    parser.add_argument("--child", nargs=3, metavar=("WAY", "FOLDER", "STORE"))
    arguments = parser.parse_args()
    if arguments.child:
        way, folder, place = arguments.child
        print(json.dumps(WAYS[way](Path(folder), Path(place))))
        return
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        if arguments.rounds:
            folder = repeat_photos(work / "photos", arguments.images)
            repeated = arguments.images > len(real_photos())
            figures = compete(folder, work, arguments.images, arguments.rounds)
            report("indexing_repeated" if repeated else "indexing", figures)
        if arguments.many:
            report("indexing_memory", grow(work, arguments.few, arguments.many))


def report(name: str, figures: Figures) -> None:
    figures = dict(rounded(figures))
    for key, value in figures.items():
        print(f"{key:32} {value}")
    write_report(name, figures)


if __name__ == "__main__":
    main()

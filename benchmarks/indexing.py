"""Speed and memory of indexing real photos.

    python benchmarks/indexing.py

Speed: `reir index` against a plain loop that reads, decodes, runs the model on and stores one photo
at a time; same photos, model and store, in interleaved pairs; the median of the pairs' ratios.
Memory: peak of a run on many photos over that of a run on few, each in a process of its own.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

from _indexing import (
    add_child_arguments,
    encoder_of,
    finish_child,
    link_photos,
    parser_of,
    run_child,
    start_child,
)
from _report import write_report

from reir.images import canonical_uri, content_hash, decode, image_id, read_bytes
from reir.models.seams import InstanceEncoder
from reir.records import ImageRecord, IndexedImage
from reir.store import InstanceStore, VersionSpec, open_store
from reir_ingestion.pipeline import IndexOptions, index, version_name, version_settings
from reir_ingestion.report import IndexReport


def plain_loop(folder: Path, gallery: str, store: InstanceStore, encoder: InstanceEncoder) -> None:
    """The obvious way to fill a gallery: one photo after the other."""
    settings = version_settings(encoder)
    version = version_name(encoder.digest, settings)
    spec = VersionSpec(dim=encoder.dim, digest=encoder.digest, settings=settings)
    store.create_version(gallery, version, spec)
    for path in sorted(folder.iterdir()):
        data = read_bytes(path)
        image = decode(data)
        (instances,) = encoder.encode_images([image.pixels])
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
        store.upsert_images(gallery, version, [IndexedImage(record, instances)])
    store.promote(gallery, version)


def measure_speed(arguments: argparse.Namespace, work: Path) -> dict[str, float | int]:
    """Time pairs of runs, ours and the plain loop, each first in turn."""
    folder = link_photos(work / "speed", arguments.photos)
    encoder = encoder_of(arguments)
    store = open_store(str(work / "speed.store"))
    warm_up(link_photos(work / "warm", arguments.batch_size), store, encoder)
    plain_s: list[float] = []
    reports: list[IndexReport] = []
    options = IndexOptions(batch_size=arguments.batch_size)
    for pair in range(arguments.pairs):
        for way in ("plain", "ours") if pair % 2 else ("ours", "plain"):
            started = time.perf_counter()
            if way == "plain":
                plain_loop(folder, f"plain-{pair}", store, encoder)
                plain_s.append(time.perf_counter() - started)
            else:
                reports.append(index(folder, f"ours-{pair}", store, encoder, options=options))
        print(f"pair {pair}: plain {plain_s[-1]:.1f} s, ours {reports[-1].seconds:.1f} s")
    store.close()
    ratios = [slow / report.seconds for slow, report in zip(plain_s, reports, strict=True)]
    stages = {
        f"index.seconds_{stage}": round(median(each.stage_seconds[stage] for each in reports), 2)
        for stage in reports[0].stage_seconds
    }
    return {
        "index.photos": arguments.photos,
        "index.batch_size": arguments.batch_size,
        "index.pairs": arguments.pairs,
        "index.speedup": round(median(ratios), 2),
        "index.speedup_least": round(min(ratios), 2),
        "index.images_per_s": round(median(each.images_per_s for each in reports), 1),
        "index.plain_images_per_s": round(arguments.photos / median(plain_s), 1),
        **stages,
    }


def warm_up(folder: Path, store: InstanceStore, encoder: InstanceEncoder) -> None:
    """Start the store and run the model once on a whole batch and on one photo."""
    index(folder, "warm-ours", store, encoder)
    plain_loop(folder, "warm-plain", store, encoder)


def measure_memory(arguments: argparse.Namespace, work: Path) -> dict[str, float | int]:
    """Peak memory of the indexing process on few photos and on many."""
    peaks = {}
    for name, count in (("few", arguments.few), ("many", arguments.many)):
        folder = link_photos(work / name, count)
        child = start_child(arguments, folder, work / f"{name}.store", "memory")
        peaks[name] = finish_child(child)["peak_rss_bytes"] / 2**20
        print(f"{count} photos: peak {peaks[name]:.0f} MiB")
    return {
        "index.rss_growth": round(peaks["many"] / peaks["few"], 3),
        f"index.rss_mib_{arguments.few}": round(peaks["few"], 1),
        f"index.rss_mib_{arguments.many}": round(peaks["many"], 1),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--photos", type=int, default=300, help="photos of each timed run")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--few", type=int, default=500, help="photos of the small memory run")
    parser.add_argument("--many", type=int, default=2300, help="photos of the large memory run")
    add_child_arguments(parser)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        figures = measure_speed(arguments, Path(folder)) | measure_memory(arguments, Path(folder))
    for key, value in figures.items():
        print(f"{key:32} {value}")
    write_report("indexing", figures)


if __name__ == "__main__":
    main()

"""Indexing killed at random moments ends with the rows of an uninterrupted run.

    python benchmarks/index_kill.py

Each round fills a gallery of its own: the process is killed (SIGKILL) at a moment drawn over the
whole length of a run, then the same command runs to its end. Every second round the embedded
store's server is killed with it. All ids, boxes and vectors are compared with the uninterrupted
gallery, and the number of stored rows, which would tell of rows that nothing refers to.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from _indexing import (
    add_child_arguments,
    finish_child,
    link_photos,
    parser_of,
    run_child,
    start_child,
)
from _report import write_report

from reir.store import VersionInfo, open_store
from reir_ingestion.testing import stored_rows, write_scenes

WHOLE = "whole"


@dataclass
class Outcome:
    """Sums over the rounds."""

    missing: int = 0
    duplicates: int = 0
    changed: int = 0


def rows_of(store_folder: Path, gallery: str) -> tuple[dict[str, object], VersionInfo]:
    """All rows of a gallery, and what the store itself counts."""
    store = open_store(str(store_folder))
    try:
        (info,) = store.versions(gallery)
        return stored_rows(store, gallery), info
    finally:
        store.close()


def compare(expected: dict[str, object], found: dict[str, object], info: VersionInfo) -> Outcome:
    """Rows that are missing, that are too many, and that differ."""
    unseen = info.num_images + info.num_instances - len(found)
    return Outcome(
        missing=len(expected.keys() - found.keys()),
        duplicates=len(found.keys() - expected.keys()) + unseen,
        changed=sum(expected[key] != found[key] for key in expected.keys() & found.keys()),
    )


def kill_server(store_folder: Path) -> None:
    """Kill the process that serves an embedded store."""
    record = json.loads((store_folder / "server.json").read_text())
    os.kill(record["pid"], signal.SIGKILL)


def killed_round(
    arguments: argparse.Namespace, paths: tuple[Path, Path], gallery: str, moment_s: float
) -> bool:
    """Index until `moment_s`, be killed, index to the end; False when nothing was left to do."""
    folder, store_folder = paths
    child = start_child(arguments, folder, store_folder, gallery)
    time.sleep(moment_s)
    child.kill()
    child.communicate()
    if int(gallery.rpartition("-")[2]) % 2:
        kill_server(store_folder)
    report = finish_child(start_child(arguments, folder, store_folder, gallery))
    print(
        f"{gallery}: killed after {moment_s:.2f} s, {report['unchanged']} photos were done, "
        f"{report['new']} followed in {report['seconds']:.1f} s"
    )
    return bool(report["read"])


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, float | int]:
    """Run the rounds and compare each with the uninterrupted gallery."""
    if arguments.fake:
        folder = work / "photos"
        write_scenes(folder, arguments.photos)
    else:
        folder = link_photos(work / "photos", arguments.photos)
    store_folder = work / "store"
    finish_child(start_child(arguments, folder, store_folder, "warm"))
    whole_s = finish_child(start_child(arguments, folder, store_folder, WHOLE))["seconds"]
    expected, _ = rows_of(store_folder, WHOLE)
    rng = random.Random(arguments.seed)
    total = Outcome()
    kills = rounds = 0
    while kills < arguments.kills:
        gallery = f"killed-{rounds}"
        kills += killed_round(arguments, (folder, store_folder), gallery, rng.uniform(0, whole_s))
        rounds += 1
        outcome = compare(expected, *rows_of(store_folder, gallery))
        total.missing += outcome.missing
        total.duplicates += outcome.duplicates
        total.changed += outcome.changed
    return {
        "index.kill_photos": arguments.photos,
        "index.kill_rows": len(expected),
        "index.kills": kills,
        "index.kill_missing": total.missing,
        "index.kill_duplicates": total.duplicates,
        "index.kill_changed": total.changed,
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--photos", type=int, default=300)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    add_child_arguments(parser)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(arguments, Path(folder))
    for key, value in figures.items():
        print(f"{key:32} {value}")
    write_report("index_kill", figures)


if __name__ == "__main__":
    main()

"""Memory and time that annotations of REIRCOCO's size cost in training, with two CPU workers.

    python benchmarks/train_annotations.py

The benchmark writes a synthetic annotation file of the published size (215,000 instances on 30,000
photos, 613,000 expressions; the photos are a few files under 30,000 names). It runs `reir train`
with a tiny CLARE twice: with this file, and with one of a hundred photos.

    train.start_s                    time from the command to the end of the first step
    train.annotations_gib            how much more memory the run with the large file uses from the
                                     first step on; peak of the summed proportional set sizes (PSS)
                                     of all its processes
    train.annotations_reading_gib    the same before the end of the first step, while a child
                                     process reads the file
    train.annotations_run_gib, train.annotations_few_run_gib
                                     the memory of the two runs, because runs differ by tenths of a
                                     GiB for reasons other than their annotations
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import yaml
from _report import write_report
from PIL import Image

from reir_testing.tiny_clare import tiny_training

NUM_PHOTOS, NUM_INSTANCES, NUM_EXPRESSIONS = 30_000, 215_000, 613_000
FEW_PHOTOS = 100
NUM_FILES = 16
WIDTH, HEIGHT = 640, 480
STEPS = 20
POLL_S = 0.5
KIB, GIB = 2**10, 2**30
COLORS = "red blue green brown white black striped shiny wooden large small"
THINGS = "dog cat man woman child bus table chair cushion laptop mug bicycle umbrella horse train"
PLACES = "left right near behind under beside above holding wearing facing"
WORDS = f"{COLORS} {THINGS} {PLACES}".split(" ")


def write_annotations(folder: Path, photos: int, instances: int, expressions: int) -> None:
    """Write `reircoco_train.json` with one entry per instance, and the photos that it names."""
    rng = np.random.default_rng(0)
    images = folder / "images"
    images.mkdir(parents=True)
    files = [images / f"file_{i}.jpg" for i in range(NUM_FILES)]
    for file in files:
        Image.fromarray(rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(file)
    names = [f"COCO_train2014_{i:012d}.jpg" for i in range(photos)]
    for i, name in enumerate(names):
        # Hard links: the number of names matters for reading annotations, the pixels do not.
        os.link(files[i % NUM_FILES], images / name)
    texts = np.diff(np.linspace(0, expressions, instances + 1).round()).astype(int)
    entries, boxes = [], []
    for i in range(instances):
        words = rng.choice(WORDS, (int(texts[i]), 11))
        said = ["The " + " ".join(row) + "." for row in words]
        size = {"width": WIDTH, "height": HEIGHT}
        entries.append({"id": i, "file_name": names[i % photos], **size, "expressions": said})
        x, y = rng.uniform(0, (WIDTH - 200, HEIGHT - 200)).round(2).tolist()
        box = [x, y, *rng.uniform(20, 200, 2).round(2).tolist()]
        boxes.append({"id": i, "image_id": i, "bbox": box, "area": 1.0, "iscrowd": 0})
    document = {"images": entries, "annotations": boxes, "categories": []}
    (folder / "reircoco_train.json").write_text(json.dumps(document))


def memory_gib(root: psutil.Process) -> float:
    """Return the summed proportional set sizes (PSS) of a process and all its descendants."""
    # PSS divides shared pages among their processes, so mapped annotations are counted only once.
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            # psutil would read the mappings one by one, which slows the run down.
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # the process ended
            continue
        total += sum(KIB * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / GIB


def run(work: Path, data: Path, num_workers: int) -> tuple[float, float, float]:
    """Train; return seconds to the end of the first step, and peak GiB until then and after it."""
    values = tiny_training(
        work, steps_per_epoch=STEPS, clia_epochs=1, log_every_steps=1, save_every_steps=10_000
    )
    values["data"] = [{"format": "reircoco", "path": str(data)}]
    output, settings = work / "run", work / "run.yaml"
    settings.write_text(yaml.safe_dump(values))
    command = [str(Path(sys.executable).with_name("reir")), "train", "--preset", "clare-base"]
    command += ["--stage", "clia", "--data", str(settings), "--output", str(output)]
    command += ["--num-workers", str(num_workers)]
    before, after, first = 0.0, 0.0, None
    with (work / "log").open("w") as log:
        started = time.perf_counter()
        running = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        root, metrics = psutil.Process(running.pid), output / "metrics.jsonl"
        while running.poll() is None:
            if first is None and metrics.exists() and '"progress"' in metrics.read_text():
                first = time.perf_counter() - started
            taken = memory_gib(root)
            if first is None:
                before = max(before, taken)
            else:
                after = max(after, taken)
            time.sleep(POLL_S)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
    if running.returncode or first is None:
        raise SystemExit((work / "log").read_text())
    return first, before, after


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument(
        "--share", type=float, default=1.0, help="Fraction of the published size, for a trial run."
    )
    arguments = parser.parse_args()
    photos, instances, expressions = (
        int(arguments.share * number) for number in (NUM_PHOTOS, NUM_INSTANCES, NUM_EXPRESSIONS)
    )
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, sizes in (
            ("few", (FEW_PHOTOS, 7 * FEW_PHOTOS, 20 * FEW_PHOTOS)),
            ("all", (photos, instances, expressions)),
        ):
            work = Path(folder) / name
            write_annotations(work / "data", *sizes)
            found[name] = run(work, work / "data", arguments.num_workers)
        size = (Path(folder) / "all" / "data" / "reircoco_train.json").stat().st_size
    start_s, reading, training = found["all"]
    figures = {
        "train.annotations_gib": round(training - found["few"][2], 3),
        "train.annotations_reading_gib": round(reading - found["few"][1], 3),
        "train.annotations_run_gib": round(training, 3),
        "train.annotations_few_run_gib": round(found["few"][2], 3),
        "train.start_s": round(start_s, 1),
        "train.start_few_s": round(found["few"][0], 1),
        "train.annotations_file_mb": round(size / 1e6, 1),
        "train.annotations_instances": instances,
        "train.annotations_expressions": expressions,
        "train.annotations_workers": arguments.num_workers,
    }
    for key, value in figures.items():
        print(f"{key:34} {value}")
    write_report("train_annotations", figures)


if __name__ == "__main__":
    main()

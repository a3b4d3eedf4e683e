"""The shipped model indexes as fast as an earlier release, with bf16 and on a CPU with AVX2 only.

    python benchmarks/index_speed.py --earlier 14f0d7f       12 minutes on two cores

Both releases index the same photos with their own checkpoint, in turn, each time in a new store.
The earlier one runs from a worktree of git. AVX2 is imposed by limiting the instructions that
torch, oneDNN and OpenVINO may use. The share of the model's own speed is in `indexing.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from _indexing import repeat_photos
from _report import write_report

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("platform", "training", "ingestion", "serving")
# The limits of oneDNN, of the kernels of torch, and the check that selects bf16.
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
PROGRAM = """
import os, torch
if os.environ.get("ONEDNN_MAX_CPU_ISA") == "AVX2":
    torch.cpu._is_avx512_bf16_supported = lambda: False
from reir.cli.main import main
main()
"""


def index(code: Path, photos: Path, store: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Run `reir index` of the release in the folder `code`, and return its report."""
    paths = os.pathsep.join(str(code / package) for package in PACKAGES)
    command = [sys.executable, "-c", PROGRAM, "index", str(photos)]
    options = ["--gallery", "speed", "--store", str(store), "--runner", "local", "--json"]
    kept = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [*command, *options],
        env={**kept, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{command} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """Check a commit out in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "earlier"
        add = ["git", "-C", str(ROOT), "worktree", "add", "--detach", str(place), commit]
        subprocess.run(add, check=True, capture_output=True)
        try:
            yield place
        finally:
            remove = ["git", "-C", str(ROOT), "worktree", "remove", "--force", str(place)]
            subprocess.run(remove, check=True, capture_output=True)


def compare(
    earlier: Path, photos: Path, environment: dict[str, str], rounds: int
) -> tuple[float, float, float]:
    """Return medians: the ratio of the speeds, the speed now, and that of the earlier release."""
    rates: dict[Path, list[float]] = {ROOT: [], earlier: []}
    for number in range(rounds):
        # Each round starts with another release, since the machine's speed changes.
        for code in (ROOT, earlier) if number % 2 == 0 else (earlier, ROOT):
            with tempfile.TemporaryDirectory() as folder:
                report = index(code, photos, Path(folder) / "store", environment)
            rates[code].append(report["images_per_s"])
            print(f"{code.name:8} {report['images_per_s']:6.1f} photos/s", flush=True)
    now, before = rates[ROOT], rates[earlier]
    ratio = median(new / old for new, old in zip(now, before, strict=True))
    return ratio, median(now), median(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--earlier", default="14f0d7f", help="commit of the earlier release")
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"index.images": arguments.images, "index.rounds": arguments.rounds}
    with worktree(arguments.earlier) as earlier, tempfile.TemporaryDirectory() as work:
        photos = repeat_photos(Path(work) / "photos", arguments.images)
        ratios = {}
        for name, environment in (("native", {}), ("avx2", AVX2)):
            ratio, now, before = compare(earlier, photos, environment, arguments.rounds)
            ratios[name] = ratio
            figures |= {
                f"index.{name}_images_per_s": now,
                f"index.{name}_images_per_s_earlier": before,
                f"index.{name}_speed_vs_old": ratio,
            }
    figures["index.speed_vs_old"] = min(ratios.values())
    print(write_report("index_speed", figures))


if __name__ == "__main__":
    main()

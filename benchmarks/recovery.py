"""How long recovery takes: a rehearsal of docs/operations/disaster-recovery.md.

    python benchmarks/recovery.py                      20 minutes on two cores
    python benchmarks/recovery.py --images 40 --later 8      a few minutes, to try it out

A gallery of real photos is indexed and backed up; then some more photos are indexed. Each scenario
begins in that state, and runs the commands that the page names as an operator types
them. At its end, the answers to expressions that people wrote must be those of before, except for
photos that the backup does not hold and that no command can bring back.

    recovery.<scenario>           seconds from the disaster until searches answer as before
    recovery.<scenario>.steps     command -> seconds
    recovery.different            expressions that are answered otherwise at the end of a scenario

Writes the table of docs/operations/disaster-recovery.md, too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _indexing import expressions, real_photos
from _pages import replace_section
from _report import ROOT, machine, write_report
from _served import served
from safetensors.torch import load_file, save_file

import reir
from reir.checkpoint import SHIPPED
from reir.store.embedded.lite_server_process import SERVER_LOCK
from reir.store.embedded.locks import is_locked
from reir_ingestion.reindex.cli import REJECTED
from reir_testing.serving import free_port

GALLERY, K = "photos", 10
BACKUP = "backups/photos-1"
NOISE = 1.0
"""Noise in the weights of the bad checkpoint, relative to the standard deviation of each tensor."""

PAGE = ROOT / "docs" / "operations" / "disaster-recovery.md"
IDLE_LIMIT_S = 120.0
BEGIN, END = "<!-- rehearsal -->", "<!-- end of rehearsal -->"
_REIR = [sys.executable, "-c", "from reir.cli.main import main; main()"]

Answers = list[list[str]]


@dataclass
class Place:
    """A machine in the rehearsal: a folder with a store, a home and photos.

    Attributes:
        folder: the folder.
        steps: command as an operator types it -> seconds.
    """

    folder: Path
    steps: dict[str, float] = field(default_factory=dict)

    @property
    def store(self) -> Path:
        """The embedded store."""
        return self.folder / "store"

    def run(self, *words: str, status: int = 0) -> Any:
        """Run a `reir` command, note how long it took, and return what it prints as JSON."""
        started_s = time.perf_counter()
        done = subprocess.run(
            [*_REIR, *words, "--json"],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=os.environ | {"REIR_HOME": str(self.folder), "REIR_STORE": str(self.store)},
            check=False,
        )
        if done.returncode != status:
            raise SystemExit(
                f"{' '.join(words)} ended with {done.returncode}, not {status}: {done.stderr}"
            )
        command = re.sub(r"\br\d{8}-\d{6}\b", "VERSION", " ".join(["reir", *words]))
        self.note(command, time.perf_counter() - started_s)
        return json.loads(done.stdout) if done.stdout else done.stderr

    def note(self, step: str, seconds: float) -> None:
        """Note how long a step took."""
        self.steps[step] = self.steps.get(step, 0.0) + seconds
        print(f"{seconds:8.1f} s  {step}", flush=True)

    def answers(self, texts: Sequence[str]) -> Answers:
        """Return the hits of each expression."""
        with reir.open(GALLERY, store=str(self.store)) as gallery:
            return [
                [f"{Path(hit.uri).name} {hit.box}" for hit in found]
                for found in gallery.search_batch(texts, k=K)
            ]

    def wait_until_idle(self) -> None:
        """Wait until the process that serves the store has ended, which it does when unused."""
        until_s = time.monotonic() + IDLE_LIMIT_S
        while self.store.exists() and is_locked(self.store / SERVER_LOCK):
            if time.monotonic() > until_s:
                raise SystemExit(f"the store is still served after {IDLE_LIMIT_S} s")
            time.sleep(0.2)


def lost_store(place: Place) -> None:
    """The folder of the store is gone."""
    shutil.rmtree(place.store)
    place.run("restore", BACKUP)
    place.run("index", "photos", "--gallery", GALLERY)


def damaged_store(place: Place) -> None:
    """Bytes of a file of the store are overwritten."""
    data = place.store.glob("milvus/collections/*instances/**/*.parquet")
    file = max(data, key=lambda each: each.stat().st_size)
    with file.open("r+b") as damaged:
        damaged.seek(file.stat().st_size // 2)
        damaged.write(bytes(range(256)))
    found = place.run("doctor", status=1)
    (problem,) = (each for each in found if each["status"] == "fail")
    if "does not match its checksum" not in problem["detail"]:
        raise SystemExit(f"the damage was not found: {problem}")
    moved_s = time.perf_counter()
    place.store.rename(place.folder / "store.damaged")
    place.note("mv store store.damaged", time.perf_counter() - moved_s)
    place.run("restore", BACKUP)
    place.run("index", "photos", "--gallery", GALLERY)


def wrong_reindex(place: Place) -> None:
    """A worse checkpoint is refused, is made live nevertheless, and is taken back."""
    refused = place.run("reindex", GALLERY, "--checkpoint", "worse", status=REJECTED)
    place.run("promote", GALLERY, refused["candidate"])
    # The recovery begins here.
    before = dict(place.steps)
    place.run("rollback", GALLERY)
    place.steps = {
        **{f"({step})": seconds for step, seconds in before.items()},
        **{step: seconds for step, seconds in place.steps.items() if step not in before},
    }


def lost_machine(place: Place) -> None:
    """A new machine has nothing but the photos and the backup."""
    for name in ("store", "config.yaml", "schedules.yaml"):
        path = place.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    place.run("restore", BACKUP)
    place.run("index", "photos", "--gallery", GALLERY)
    started_s = time.perf_counter()
    with served(str(place.store), place.folder, free_port(), {"galleries": [GALLERY]}) as server:
        place.note("reir serve, until it is ready", time.perf_counter() - started_s)
        if server.get("/readyz")["status"] != "ready":
            raise SystemExit("the server is not ready")


SCENARIOS: Mapping[str, Callable[[Place], None]] = {
    each.__name__: each for each in (lost_store, damaged_store, wrong_reindex, lost_machine)
}


def noised_checkpoint(folder: Path) -> None:
    """Write a copy of the shipped checkpoint with noise in its weights."""
    shutil.copytree(SHIPPED, folder)
    generator = torch.Generator().manual_seed(0)
    weights = load_file(folder / "model.safetensors")
    for name, values in weights.items():
        if values.is_floating_point() and values.numel() > 1:
            noise = torch.randn(values.shape, generator=generator) * values.float().std()
            weights[name] = (values.float() + NOISE * noise).to(values.dtype)
    save_file(weights, folder / "model.safetensors")


def prepare(folder: Path, num_photos: int, num_later: int) -> Place:
    """Index photos, back the gallery up, and index some more photos."""
    place = Place(folder)
    (folder / "photos").mkdir(parents=True)
    photos = real_photos(num_photos + num_later)
    for photo in photos[:num_photos]:
        shutil.copyfile(photo, folder / "photos" / photo.name)
    noised_checkpoint(folder / "worse")
    place.run("index", "photos", "--gallery", GALLERY)
    place.run("backup", GALLERY, BACKUP)
    for photo in photos[num_photos:]:
        shutil.copyfile(photo, folder / "photos" / photo.name)
    place.run("index", "photos", "--gallery", GALLERY)
    return place


def rehearse(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run all scenarios, and return the figures."""
    texts = expressions(options.expressions)
    first = prepare(work / "machine", options.images, options.later)
    wanted = first.answers(texts)
    first.wait_until_idle()
    # Every scenario runs in the folder of the first, since a gallery names photos by their path.
    saved = work / "saved"
    first.folder.rename(saved)
    figures: dict[str, Any] = {
        "recovery.photos": options.images,
        "recovery.later": options.later,
        "recovery.steps": _rounded(first.steps),
        "recovery.different": 0,
    }
    for name in options.scenarios:
        scenario = SCENARIOS[name]
        print(f"{name}: {scenario.__doc__}", flush=True)
        shutil.copytree(saved, first.folder)
        place = Place(first.folder)
        scenario(place)
        different = sum(a != b for a, b in zip(wanted, place.answers(texts), strict=True))
        figures["recovery.different"] += different
        counted = [seconds for step, seconds in place.steps.items() if not step.startswith("(")]
        figures[f"recovery.{name}"] = round(sum(counted), 1)
        figures[f"recovery.{name}.steps"] = _rounded(place.steps)
        print(f"{name}: {sum(counted):.1f} s, {different} different answers", flush=True)
        place.wait_until_idle()
        shutil.rmtree(place.folder)
    # What else the machine did: below the number of cores, it did not slow the commands down.
    figures["recovery.load"] = round(os.getloadavg()[1], 1)
    return figures


def _rounded(steps: Mapping[str, float]) -> dict[str, float]:
    return {step: round(seconds, 1) for step, seconds in steps.items()}


def table(figures: Mapping[str, Any]) -> str:
    """Return the timelines as Markdown."""
    photos, later = figures["recovery.photos"], figures["recovery.later"]
    lines = [
        f"{photos} photos in the backup, {later} indexed since; {machine()['cores']} cores, with a "
        f"load average of {figures['recovery.load']} at the end. Answers that differed from those "
        f"of before: {figures['recovery.different']}.",
        "",
        "| scenario | after, s | step | took, s |",
        "|---|--:|---|--:|",
    ]
    for name, scenario in SCENARIOS.items():
        if f"recovery.{name}" not in figures:
            continue
        total_s, label = 0.0, (scenario.__doc__ or "").rstrip(".")
        for step, seconds in figures[f"recovery.{name}.steps"].items():
            before = step.startswith("(")
            total_s += 0.0 if before else seconds
            after = "before" if before else f"{total_s:.1f}"
            lines.append(f"| {label} | {after} | `{step.strip('()')}` | {seconds:.1f} |")
            label = ""
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=300, help="Photos in the backup.")
    parser.add_argument("--later", type=int, default=50, help="Photos indexed after the backup.")
    parser.add_argument("--expressions", type=int, default=50)
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = rehearse(Path(folder), options)
    print(json.dumps(figures, indent=2))
    write_report("recovery", figures)  # before the page, whose change would make the tree dirty
    PAGE.write_text(replace_section(PAGE.read_text(), BEGIN, END, table(figures)))


if __name__ == "__main__":
    main()

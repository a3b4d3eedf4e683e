"""Does the check of `reir reindex` refuse worse checkpoints, and let good ones pass?

    python benchmarks/reindex_gate.py

A gallery of real photos is indexed with the shipped checkpoint. Its canaries are expressions that
describe objects of these photos, and absent ones about other photos. The commands run as a user
types them.

1. For each level of noise and each seed, a checkpoint with noise in its weights must be refused:
   exit status 3, the live version untouched, its answers the same, the new version kept.
2. With a noised version live, promoted by hand, the shipped checkpoint must become live.
3. A refresh with the same checkpoint must pass.
4. The same with `reir serve` running: a noised checkpoint is refused, promoted by hand, and
   replaced by the shipped one, while clients search without a pause. Every search must be answered.

    reindex.gate_errors       jobs with another end than this, and searches that failed
    reindex.gate_jobs         jobs of `reir reindex`
    reindex.gate_searches     searches during part 4
    reindex.gate_<noise>      BR@1 and BR@10 of the canaries with noise of that level, mean of the
                              seeds; noise 0 is the shipped checkpoint
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _indexing import parser_of
from _load import Line
from _report import write_report
from _served import served
from safetensors.torch import load_file, save_file

import reir
from reir.checkpoint import SHIPPED
from reir.datasets.photos import read_photos
from reir.operations.canary import Canary, to_line
from reir_ingestion.reindex.cli import REJECTED
from reir_testing import data_dir
from reir_testing.serving import free_port

GALLERY = "photos"
CLIENTS = 2
QUESTIONS = 5
CANARIES = "canaries.jsonl"
_REIR = [sys.executable, "-c", "from reir.cli.main import main; main()"]


@dataclass
class Commands:
    """Runs `reir` commands on one store, and notes what ends otherwise than it should.

    Attributes:
        location: of the store.
        folder: for canaries and checkpoints.
        errors: what ended otherwise.
        jobs: number of jobs.
        shares: noise -> BR@1 and BR@10 of the canaries, for each job.
    """

    location: str
    folder: Path
    errors: list[str] = field(default_factory=list)
    jobs: int = 0
    shares: dict[float, list[tuple[float, float]]] = field(default_factory=dict)

    def run(self, *words: str, status: int = 0) -> Any:
        """Run a command with --json; return what it prints."""
        done = subprocess.run(
            [*_REIR, *words, "--store", self.location, "--json"],
            capture_output=True,
            text=True,
            env=os.environ | {"REIR_HOME": str(self.folder / "home")},
            check=False,
        )
        if done.returncode != status:
            raise RuntimeError(
                f"{' '.join(words)} ended with {done.returncode}, not {status}: "
                f"{done.stderr[-1500:]}"
            )
        return json.loads(done.stdout)

    def reindex(self, noise: float, checkpoint: Path, *, passes: bool) -> str:
        """Re-index with a checkpoint, check how that ends, and return the new version."""
        before, answers = self.live(), self.answers()
        name = f"noise {noise:g} over {before}"
        self.jobs += 1
        words = ("reindex", GALLERY, "--checkpoint", str(checkpoint), "--runner", "local")
        try:
            result = self.run(*words, status=0 if passes else REJECTED)
        except RuntimeError as error:
            self.errors.append(f"{name}: {error}")
            return ""
        candidate = str(result["candidate"])
        self._note(noise, result["report"]["checks"])
        live = candidate if passes else before
        if self.live() != live or result["passed"] != passes:
            self.errors.append(f"{name}: {self.live()} is live, passed is {result['passed']}")
        if not passes and self.answers() != answers:
            self.errors.append(f"{name}: the live version answers differently")
        versions = {each["name"]: each["num_images"] for each in self.run("versions", GALLERY)}
        if candidate not in versions or versions[candidate] != versions[live]:
            self.errors.append(f"{name}: the versions are {versions}")
        failed = [c["name"] for c in result["report"]["checks"] if c["verdict"] == "failed"]
        print(f"{name}: {result['state']}; not kept: {', '.join(failed) or 'nothing'}", flush=True)
        return candidate

    def live(self) -> str:
        """Return the live version."""
        return next(str(each["name"]) for each in self.run("versions", GALLERY) if each["live"])

    def answers(self) -> list[Any]:
        """Return the hits of a few expressions."""
        lines = (self.folder / CANARIES).read_text().splitlines()[:QUESTIONS]
        with reir.open(GALLERY, store=self.location) as gallery:
            found = gallery.search_batch([json.loads(line)["expression"] for line in lines])
        return [[(hit.uri, hit.score) for hit in each] for each in found]

    def _note(self, noise: float, checks: list[Mapping[str, Any]]) -> None:
        share = {each["name"]: each["candidate"] for each in checks}
        br = share["BR@1 of canaries"], share["BR@10 of canaries"]
        self.shares.setdefault(noise, []).append(br)


def noised(folder: Path, noise: float, seed: int) -> Path:
    """Write the shipped checkpoint with noise in its weight matrices; return its folder.

    The noise of each matrix has `noise` times the standard deviation of that matrix.
    """
    target = folder / f"noise-{noise:g}-{seed}"
    shutil.copytree(SHIPPED, target)
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(SHIPPED / "model.safetensors")
    for name, value in weights.items():
        if value.is_floating_point() and value.ndim > 1:
            step = torch.randn(value.shape, generator=generator)
            spread = float(value.float().std(correction=0))
            weights[name] = (value.float() + noise * spread * step).to(value.dtype)
    save_file(weights, target / "model.safetensors")
    return target


def write_photos(folder: Path, num_photos: int, num_absent: int) -> Path:
    """Copy photos that no checkpoint was trained on, and write their canaries."""
    data = data_dir()
    if data is None:
        raise SystemExit("no real photos: set REIR_DATA to the folder that holds photos/images")
    dataset = read_photos(data / "photos")
    chosen = sorted(dataset.splits["val"])[:num_photos]
    images = {each.image_id: each for each in dataset.images}
    target = folder / "photos"
    target.mkdir()
    for each in chosen:
        shutil.copyfile(
            data / "photos" / "images" / images[each].file_name, target / images[each].file_name
        )
    boxes = {each.instance_id: each.box_xyxy_px for each in dataset.instances}
    texts = [each for each in dataset.expressions if each.kind == "long" and each.instance_id]
    canaries = []
    for text in texts:
        if text.image_id in chosen and text.instance_id:
            image = images[text.image_id]
            sides = np.array(boxes[text.instance_id]) / np.tile(
                [image.width_px, image.height_px], 2
            )
            x1, y1, x2, y2 = map(float, np.clip(sides, 0, 1))
            photo = str(target / image.file_name)
            canaries.append(Canary(expression=text.text, uri=photo, box=(x1, y1, x2, y2)))
    others = [each for each in texts if each.image_id in dataset.splits["train"]]
    absent = others[:: max(1, len(others) // max(num_absent, 1))][:num_absent]
    canaries += [Canary(expression=each.text, absent=True) for each in absent]
    (folder / CANARIES).write_text("".join(f"{to_line(each)}\n" for each in canaries))
    return target


class Clients:
    """Clients that search over HTTP without a pause."""

    def __init__(self, address: str, expressions: list[str]) -> None:
        self._address, self._expressions = address, expressions
        self._stop = threading.Event()
        self.searches, self.problems = [0] * CLIENTS, list[str]()
        self.slowest_s = 0.0

    @contextmanager
    def searching(self) -> Iterator[None]:
        """Search until the block ends."""
        threads = [
            threading.Thread(target=self._search, args=(number,)) for number in range(CLIENTS)
        ]
        for each in threads:
            each.start()
        try:
            yield
        finally:
            self._stop.set()
            for each in threads:
                each.join()

    def _search(self, number: int) -> None:
        line = Line(self._address)
        while not self._stop.is_set():
            text = self._expressions[self.searches[number] % len(self._expressions)]
            body = json.dumps({"gallery": GALLERY, "expression": text}).encode()
            self.searches[number] += 1
            started_s = time.monotonic()
            try:
                if not json.loads(line.post("/v1/search", body))["hits"]:
                    self.problems.append(f"no hits for {text!r}")
            except (OSError, RuntimeError, ValueError) as error:
                self.problems.append(str(error)[:300])
                line.close()
                line = Line(self._address)
            self.slowest_s = max(self.slowest_s, time.monotonic() - started_s)
        line.close()


def main() -> None:
    """Run all parts, print the figures and save them."""
    parser = parser_of(__doc__)
    parser.add_argument("--photos", type=int, default=240, help="Number of photos.")
    parser.add_argument("--absent", type=int, default=60, help="Number of absent canaries.")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.03, 0.05, 0.1])
    parser.add_argument("--seeds", type=int, default=2, help="Checkpoints for each level of noise.")
    arguments = parser.parse_args()
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos = write_photos(folder, arguments.photos, arguments.absent)
        commands = Commands(str(folder / "store"), folder)
        commands.run("index", str(photos), "--gallery", GALLERY, "--runner", "local")
        commands.run("canary", "add", GALLERY, str(folder / CANARIES))
        for noise in arguments.noise:
            for seed in range(arguments.seeds):
                refuse_and_replace(commands, noise, noised(folder, noise, seed), replace=not seed)
        commands.reindex(0.0, SHIPPED, passes=True)
        last = arguments.noise[-1]
        figures = serve_meanwhile(commands, last, noised(folder, last, arguments.seeds))
    for error in commands.errors:
        print(error)
    figures |= {
        "reindex.gate_errors": len(commands.errors),
        "reindex.gate_jobs": commands.jobs,
        "reindex.gate_seconds": round(time.monotonic() - began_s, 1),
    }
    for noise, found in sorted(commands.shares.items()):
        figures[f"reindex.gate_{noise:g}"] = np.mean(found, axis=0).round(4).tolist()
    for key, value in figures.items():
        print(f"{key:28} {value}")
    print(f"figures in {write_report('reindex_gate', figures).name}")


def refuse_and_replace(
    commands: Commands, noise: float, checkpoint: Path, *, replace: bool
) -> None:
    """A noised checkpoint must be refused; if it is live, the shipped one must replace it."""
    candidate = commands.reindex(noise, checkpoint, passes=False)
    if replace and candidate:
        commands.run("promote", GALLERY, candidate)
        commands.reindex(0.0, SHIPPED, passes=True)


def serve_meanwhile(commands: Commands, noise: float, checkpoint: Path) -> dict[str, Any]:
    """Do the same while clients search over HTTP."""
    lines = (commands.folder / CANARIES).read_text().splitlines()
    options = {"galleries": [GALLERY]}
    with served(commands.location, commands.folder, free_port(), options) as server:
        clients = Clients(
            server.url.removeprefix("http://"), [json.loads(each)["expression"] for each in lines]
        )
        with clients.searching():
            refuse_and_replace(commands, noise, checkpoint, replace=True)
    commands.errors += clients.problems
    return {
        "reindex.gate_searches": sum(clients.searches),
        "reindex.gate_slowest_s": round(clients.slowest_s, 2),
    }


if __name__ == "__main__":
    main()

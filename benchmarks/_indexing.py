"""What the benchmarks of indexing share: the encoder, the photos, a run in a process of its own."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from reir.checkpoint import load_encoder
from reir.models.seams import InstanceEncoder
from reir.store import open_store
from reir.testing import FakeEncoder, data_dir
from reir_ingestion.pipeline import IndexOptions, index
from reir_ingestion.report import Progress

STARTED = "started"


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that knows which encoder to take."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="checkpoint directory; default: shipped")
    parser.add_argument("--fake", action="store_true", help="the fake encoder, for a quick try")
    return parser


def encoder_of(arguments: argparse.Namespace) -> InstanceEncoder:
    """Return the encoder that the command line names."""
    return FakeEncoder() if arguments.fake else load_encoder(arguments.checkpoint)


def encoder_flags(arguments: argparse.Namespace) -> list[str]:
    """Return the flags that name the same encoder to another process."""
    if arguments.fake:
        return ["--fake"]
    return ["--checkpoint", str(arguments.checkpoint)] if arguments.checkpoint else []


def real_photos(count: int) -> list[Path]:
    """The first `count` real photos."""
    data = data_dir()
    if data is None:
        raise SystemExit("no real photos: set REIR_DATA to the folder that holds photos/images")
    photos = list(islice(sorted((data / "photos" / "images").iterdir()), count))
    if len(photos) < count:
        raise SystemExit(f"{count} photos wanted, {len(photos)} found in {data.name}/photos")
    return photos


def expressions(count: int) -> list[str]:
    """So many expressions of the real photos, spread over the whole file."""
    data = data_dir()
    assert data is not None
    content = json.loads((data / "photos" / "expressions.json").read_text(encoding="utf-8"))
    texts = [each["expression"] for each in content["expressions"]]
    return texts[:: max(1, len(texts) // count)][:count]


def link_photos(folder: Path, count: int) -> Path:
    """Fill a new folder with links to the first `count` real photos; returns it."""
    photos = real_photos(count)
    folder.mkdir(parents=True)
    for photo in photos:
        (folder / photo.name).symlink_to(photo.resolve())
    return folder


def add_child_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a benchmark call itself for one indexing run."""
    parser.add_argument("--child", nargs=3, metavar=("SOURCE", "STORE", "GALLERY"))


def run_child(arguments: argparse.Namespace) -> None:
    """Index as `--child` says: print a line when the first batch is about to start, then JSON."""
    source, location, gallery = arguments.child
    encoder = encoder_of(arguments)
    store = open_store(location)
    print(STARTED, flush=True)
    options = IndexOptions(batch_size=arguments.batch_size)
    report = index(source, gallery, store, encoder, options=options, progress=_ignore)
    print(json.dumps(report.to_dict()), flush=True)
    store.close()


def _ignore(_: Progress) -> None:
    """Progress costs what it costs in real use, and is not shown."""


def start_child(
    arguments: argparse.Namespace, source: Path, store: Path, gallery: str
) -> subprocess.Popen[str]:
    """Start one indexing run in a process of its own and wait until it begins to index."""
    script = Path(sys.argv[0]).resolve()
    command = [sys.executable, str(script), *encoder_flags(arguments)]
    command += ["--batch-size", str(arguments.batch_size)]
    command += ["--child", str(source), str(store), gallery]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    if child.stdout.readline().strip() != STARTED:
        raise SystemExit(f"the indexing process ended with {child.wait()} before it began")
    return child


def finish_child(child: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for a run to end and return its report."""
    output, _ = child.communicate()
    if child.returncode != 0:
        raise SystemExit(f"the indexing process ended with {child.returncode}")
    return dict(json.loads(output))

"""`reir doctor`: does this installation work, and if not, what to do."""

from __future__ import annotations

import platform
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer
from rich.text import Text

from reir.cli_common import (
    AsJson,
    Checkpoint,
    Store,
    messages,
    opened,
    output,
    print_json,
    several,
)
from reir.cores import num_cores
from reir.encoders import SHIPPED_KIND
from reir.errors import ConfigError, ReirError, StoreError

if TYPE_CHECKING:
    from reir.models.seams import InstanceEncoder
    from reir.store.contract import InstanceStore, VersionInfo

Status = Literal["ok", "warn", "fail"]
COLOURS: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}

DISTRIBUTION = "reir-platform"
APP_EXTRAS = ("ingestion", "training", "serving")
OLDEST_PYTHON = (3, 11)
LITTLE_DISK_BYTES, NO_DISK_BYTES = 2 * 2**30, 200 * 2**20


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        name: what was looked at.
        status: "ok", "warn" (works, but not well) or "fail".
        detail: what was found.
        advice: what to do; empty when ok.
    """

    name: str
    status: Status
    detail: str
    advice: str = ""


def register(app: typer.Typer) -> None:
    """Add the subcommand to the command line."""
    app.command("doctor", epilog="[bold]Example[/bold]\n\nreir doctor --store ./my-store")(doctor)


def doctor(as_json: AsJson = False, store: Store = None, checkpoint: Checkpoint = None) -> None:
    """Check installation, checkpoint and store, and say what to do.

    Ends with status 1 if anything fails; a warning does not count.
    """
    found = []
    for check in examine(store, checkpoint):
        found.append(check)
        if not as_json:
            output().print(as_line(check), soft_wrap=True)
    if as_json:
        print_json([asdict(check) for check in found])
    if any(check.status == "fail" for check in found):
        raise typer.Exit(1)


def as_line(check: Check) -> Text:
    """Return a check for the terminal; the advice stands on a line of its own."""
    line = Text.assemble((f"{check.status:<5}", COLOURS[check.status]), f"{check.name:<14} ")
    line.append(check.detail)
    if check.advice:
        line.append(f"\n{'':20}-> {check.advice}", style="bold")
    return line


def examine(location: str | None, checkpoint: Path | None) -> Iterator[Check]:
    """Yield one check after the other, the quick ones first."""
    yield _python(sys.version_info[:2])
    yield _torch()
    yield _threads(num_cores())
    yield _disk(_nearest_folder(location))
    yield from map(_app, APP_EXTRAS)
    encoder, check = _load(checkpoint)
    yield check
    try:
        with opened(location) as store:
            yield _round_trip(store)
            yield from _galleries(store, encoder)
    except (StoreError, ConfigError) as error:
        yield Check("store", "fail", str(error), "check --store, or REIR_STORE")


def _python(version: tuple[int, ...]) -> Check:
    detail = f"{'.'.join(map(str, version))} on {platform.platform(terse=True)}"
    if version < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return Check("python", "fail", detail, f"use Python {oldest} or newer")
    return Check("python", "ok", detail)


def _torch() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:
        advice = "reinstall torch for this machine"
        return Check("torch", "fail", f"does not import: {error}", advice)
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    return Check("torch", "ok", f"{torch.__version__}, {device}")


def _threads(cpus: int) -> Check:
    try:
        import torch
    except (ImportError, OSError):
        return Check("threads", "warn", f"{cpus} CPUs; torch is needed to say more", "see torch")
    detail = f"{torch.get_num_threads()} in torch, {cpus} CPUs"
    if torch.get_num_threads() > cpus:
        return Check("threads", "warn", detail, f"export OMP_NUM_THREADS={cpus}")
    return Check("threads", "ok", detail)


def _nearest_folder(location: str | None) -> Path:
    """Return the folder on the disk that an embedded store at `location` fills."""
    from reir.store import default_location

    place = default_location() if location is None else location
    embedded = "://" not in place and place != "memory:"
    folder = Path(place).expanduser().absolute() if embedded else Path.home()
    return next(each for each in (folder, *folder.parents) if each.is_dir())


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    detail = f"{free / 2**30:.1f} GiB free at {folder}"
    if free >= LITTLE_DISK_BYTES:
        return Check("disk", "ok", detail)
    status: Status = "warn" if free >= NO_DISK_BYTES else "fail"
    return Check("disk", status, detail, "free some space, or take another folder with --store")


def _app(extra: str) -> Check:
    """Check that what an app needs is installed."""
    wanted = [
        re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        for requirement in metadata.requires(DISTRIBUTION) or ()
        if re.search(rf"""extra == ['"]{extra}['"]""", requirement)
    ]
    missing = [name for name in wanted if not _is_installed(name)]
    if missing:
        advice = f"pip install '{DISTRIBUTION}[{extra}]', if you need it"
        return Check(extra, "warn", f"not installed: {', '.join(missing)}", advice)
    return Check(extra, "ok", ", ".join(f"{name} {metadata.version(name)}" for name in wanted))


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _load(checkpoint: Path | None) -> tuple[InstanceEncoder | None, Check]:
    """Load the checkpoint and encode one expression with it."""
    try:
        import numpy as np

        from reir.checkpoint import load_encoder

        with messages().status("loading the model"):
            encoder = load_encoder(checkpoint)
            length = float(np.linalg.norm(encoder.encode_expressions(["the red mug"])[0]))
    except (ReirError, ImportError, OSError) as error:
        return None, Check("checkpoint", "fail", str(error), "check --checkpoint, or reinstall")
    detail = f"{encoder.digest[:12]}, dimension {encoder.dim}"
    if abs(length - 1) > 1e-3:
        problem = f"{detail}; its vectors have length {length:.3f} instead of 1"
        return encoder, Check("checkpoint", "fail", problem, "train it again")
    return encoder, Check("checkpoint", "ok", detail)


def _round_trip(store: InstanceStore) -> Check:
    """Write an instance to a gallery of its own, find it, and remove it again."""
    import numpy as np

    from reir.records import ImageRecord, IndexedImage, Instances
    from reir.store.contract import VersionSpec

    gallery, version = f"doctor-{uuid.uuid4().hex[:12]}", "v1"
    vectors = np.eye(4, dtype=np.float32)
    boxes = np.tile(np.array([0, 0, 1, 1], dtype=np.float32), (4, 1))
    instances = Instances(boxes, np.ones(4, dtype=np.float32), vectors, vectors[0])
    record = ImageRecord(image_id="doctor", uri="file:///doctor", status="indexed", num_instances=4)
    store.create_version(gallery, version, VersionSpec(dim=4, digest="doctor"))
    try:
        store.upsert_images(gallery, version, [IndexedImage(record, instances)])
        found = [row.instance_id for row in store.search(gallery, version, vectors[2:3], 1)[0]]
    finally:
        store.drop_version(gallery, version)
    if found != ["doctor#2"]:
        detail = f"instance doctor#2 was written, a search for it found {found}"
        return Check("store", "fail", detail, "index into a new --store and report this")
    return Check("store", "ok", "an instance was written, found and removed again")


def _galleries(store: InstanceStore, encoder: InstanceEncoder | None) -> Iterator[Check]:
    for name in store.galleries():
        live = next((each for each in store.versions(name) if each.live), None)
        yield _gallery(name, live, encoder)


def _gallery(name: str, live: VersionInfo | None, encoder: InstanceEncoder | None) -> Check:
    label = f"gallery {name}"
    if live is None:
        advice = f"reir versions {name}, then reir promote {name} VERSION"
        return Check(label, "warn", "no version is live", advice)
    detail = f"{several(live.num_images, 'photo')}, {several(live.num_instances, 'instance')}"
    own = live.spec.encoder
    if own and own != SHIPPED_KIND:  # a search loads it by itself
        return Check(label, "ok", f"{detail}; indexed with {own}")
    if encoder is not None and live.spec.digest != encoder.digest:
        return Check(
            label,
            "warn",
            f"{detail}; built with checkpoint {live.spec.digest[:12]}",
            f"reir index SOURCE --gallery {name}, or name its own --checkpoint",
        )
    return Check(label, "ok", detail)

"""`reir doctor`: check whether this installation works, and suggest fixes."""

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

from reir.cli.common import (
    AsJson,
    Checkpoint,
    Store,
    connect,
    messages,
    output,
    plural,
    print_json,
)
from reir.cores import num_cores
from reir.encoders import SHIPPED_KIND
from reir.errors import ConfigError, ReirError, StoreError

if TYPE_CHECKING:
    from reir.models.interfaces import InstanceEncoder
    from reir.store.contract import InstanceStore, VersionInfo

Status = Literal["ok", "warn", "fail"]
COLORS: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}

DISTRIBUTION = "reir-platform"
APP_EXTRAS = ("ingestion", "training", "serving")
OLDEST_PYTHON = (3, 11)
# Below the first, the check is a warning, below the second a failure.
LOW_DISK_BYTES, FULL_DISK_BYTES = 2 * 2**30, 200 * 2**20


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: what was checked.
        status: "ok", "warn" (works, but not well) or "fail".
        detail: what was found.
        advice: how to fix it; empty if the status is "ok".
    """

    name: str
    status: Status
    detail: str
    advice: str = ""


def register(app: typer.Typer) -> None:
    """Add the subcommand to the command line."""
    app.command("doctor", epilog="[bold]Example[/bold]\n\nreir doctor --store ./my-store")(doctor)


def doctor(as_json: AsJson = False, store: Store = None, checkpoint: Checkpoint = None) -> None:
    """Check the installation, the checkpoint and the store, and suggest fixes.

    Exits with status 1 if a check fails; warnings do not count.
    """
    checks = []
    for check in run_checks(store, checkpoint):
        checks.append(check)
        if not as_json:
            output().print(as_line(check), soft_wrap=True)
    if as_json:
        print_json([asdict(check) for check in checks])
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(1)


def as_line(check: Check) -> Text:
    """Return a check as text for the terminal, with the advice on a second line."""
    line = Text.assemble((f"{check.status:<5}", COLORS[check.status]), f"{check.name:<14} ")
    line.append(check.detail)
    if check.advice:
        line.append(f"\n{'':20}-> {check.advice}", style="bold")
    return line


def run_checks(location: str | None, checkpoint: Path | None) -> Iterator[Check]:
    """Run all checks, quick ones first, and yield each outcome as soon as it is known."""
    yield _python(sys.version_info[:2])
    yield _torch()
    yield _threads(num_cores())
    yield _disk(_nearest_folder(location))
    yield from map(_app, APP_EXTRAS)
    encoder, check = _load(checkpoint)
    yield check
    try:
        with connect(location) as store:
            yield _round_trip(store)
            yield from _galleries(store, encoder)
    except (StoreError, ConfigError) as error:
        yield Check("store", "fail", str(error), "correct --store or REIR_STORE")


def _python(version: tuple[int, ...]) -> Check:
    detail = f"{'.'.join(map(str, version))} on {platform.platform(terse=True)}"
    if version < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return Check("python", "fail", detail, f"install Python {oldest} or newer")
    return Check("python", "ok", detail)


def _torch() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its shared libraries does not load
        advice = "reinstall the torch build for this machine"
        return Check("torch", "fail", f"importing it failed: {error}", advice)
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    return Check("torch", "ok", f"{torch.__version__}, {device}")


def _threads(cpus: int) -> Check:
    try:
        import torch
    except (ImportError, OSError):
        return Check("threads", "warn", f"{cpus} CPUs; torch does not import", "fix torch first")
    detail = f"{torch.get_num_threads()} torch threads on {cpus} CPUs"
    if torch.get_num_threads() > cpus:
        return Check("threads", "warn", detail, f"export OMP_NUM_THREADS={cpus}")
    return Check("threads", "ok", detail)


def _nearest_folder(location: str | None) -> Path:
    """Return an existing folder on the disk that an embedded store at `location` uses or would use.

    For any other store, this is the home folder.
    """
    from reir.store import default_location

    place = default_location() if location is None else location
    embedded = "://" not in place and place != "memory:"
    folder = Path(place).expanduser().absolute() if embedded else Path.home()
    return next(each for each in (folder, *folder.parents) if each.is_dir())


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    detail = f"{free / 2**30:.1f} GiB free at {folder}"
    if free >= LOW_DISK_BYTES:
        return Check("disk", "ok", detail)
    status: Status = "warn" if free >= FULL_DISK_BYTES else "fail"
    return Check("disk", status, detail, "free up space, or choose another folder with --store")


def _app(extra: str) -> Check:
    """Check that the packages of an app are installed."""
    required = [
        re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        for requirement in metadata.requires(DISTRIBUTION) or ()
        if re.search(rf"""extra == ['"]{extra}['"]""", requirement)
    ]
    missing = [name for name in required if not _is_installed(name)]
    if missing:
        advice = f"pip install '{DISTRIBUTION}[{extra}]', if you need it"
        return Check(extra, "warn", f"not installed: {', '.join(missing)}", advice)
    return Check(extra, "ok", ", ".join(f"{name} {metadata.version(name)}" for name in required))


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _load(checkpoint: Path | None) -> tuple[InstanceEncoder | None, Check]:
    """Load the checkpoint, and check that it encodes one expression to a unit vector."""
    try:
        import numpy as np

        from reir.checkpoint import load_encoder

        with messages().status("loading the model"):
            encoder = load_encoder(checkpoint)
            length = float(np.linalg.norm(encoder.encode_expressions(["the red mug"])[0]))
    except (ReirError, ImportError, OSError) as error:
        return None, Check(
            "checkpoint", "fail", str(error), "correct --checkpoint, or reinstall reir-platform"
        )
    detail = f"{encoder.digest[:12]}, dimension {encoder.dim}"
    if abs(length - 1) > 1e-3:
        problem = f"{detail}; its expression vectors have length {length:.3f} instead of 1"
        return encoder, Check(
            "checkpoint", "fail", problem, "train it again, or use another checkpoint"
        )
    return encoder, Check("checkpoint", "ok", detail)


def _round_trip(store: InstanceStore) -> Check:
    """Write an instance to a temporary gallery, find it with a search, and delete the gallery."""
    import numpy as np

    from reir.records import ImageRecord, IndexedImage, Instances
    from reir.store.contract import VersionSpec

    # A random name, so that no existing gallery is touched. Of four orthogonal vectors, a search
    # for one must return exactly that one.
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
        detail = f"wrote instance doctor#2, but a search for its vector found {found}"
        return Check("store", "fail", detail, "index into a new --store, and report this as a bug")
    return Check("store", "ok", "wrote, found and deleted a test instance")


def _galleries(store: InstanceStore, encoder: InstanceEncoder | None) -> Iterator[Check]:
    for name in store.galleries():
        live = next((each for each in store.versions(name) if each.live), None)
        yield _gallery(name, live, encoder)


def _gallery(name: str, live: VersionInfo | None, encoder: InstanceEncoder | None) -> Check:
    label = f"gallery {name}"
    if live is None:
        advice = f"list them with `reir versions {name}`, then `reir promote {name} VERSION`"
        return Check(label, "warn", "no version is live", advice)
    detail = f"{plural(live.num_images, 'photo')}, {plural(live.num_instances, 'instance')}"
    spec = live.spec.encoder
    if spec and spec != SHIPPED_KIND:  # searches load this encoder, not --checkpoint
        return Check(label, "ok", f"{detail}; indexed with {spec}")
    if encoder is not None and live.spec.digest != encoder.digest:
        return Check(
            label,
            "warn",
            f"{detail}; indexed with another checkpoint, {live.spec.digest[:12]}",
            f"give its --checkpoint, or index it again: `reir index SOURCE --gallery {name}`",
        )
    return Check(label, "ok", detail)

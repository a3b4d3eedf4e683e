"""Checks of the store and of its galleries."""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from reir.cli.common import messages, plural
from reir.cli.doctor.check import Check, age
from reir.encoders import SHIPPED_KIND
from reir.errors import ReirError

if TYPE_CHECKING:
    from reir.models.interfaces import InstanceEncoder
    from reir.store.contract import InstanceStore, VersionInfo

SKEW_S = 5.0
"""Largest difference between two clocks that is not worth a warning."""

RECORDED_TIMES = {
    "source": "indexed_s",
    "reindex": "updated_s",
    "backup": "ended_s",
    "lease": "renewed_s",
}
"""Kinds of documents in the store -> the field with the time at which each was written."""


def load_checkpoint(checkpoint: Path | None) -> tuple[InstanceEncoder | None, Check]:
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


def check_round_trip(store: InstanceStore) -> Check:
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


def check_clock(store: InstanceStore, folder: Path | None) -> Check:
    """Compare the clock of this machine with those of others that use the store.

    Leases of jobs, schedules and the age of backups depend on it.

    Args:
        store: its newest record must not be from the future.
        folder: of an embedded store; a file that is written there gets the time of the machine
            that has the disk. None for a Milvus server.
    """
    # Old records are normal, so only a time that is ahead of this clock shows a difference.
    ahead_s = {"the newest record of the store": newest_record_s(store) - time.time()}
    if folder is not None:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            ahead_s["the disk of the store"] = Path(file.name).stat().st_mtime - time.time()
    what, seconds = max(ahead_s.items(), key=lambda each: each[1])
    return clock_check(what, seconds)


def clock_check(what: str, ahead_s: float) -> Check:
    """Return the check of a clock that another one is ahead of by some seconds."""
    if ahead_s <= SKEW_S:
        return Check("clock", "ok", f"not behind {what}")
    return Check(
        "clock",
        "warn",
        f"this machine is {age(ahead_s)} behind {what}",
        "synchronize the clocks of all machines that use the store (NTP)",
    )


def newest_record_s(store: InstanceStore) -> float:
    """Return the Unix time of the newest record of a job in the store; 0 without any."""
    return max(
        (
            float(each.get(field, 0.0))
            for kind, field in RECORDED_TIMES.items()
            for each in store.find_documents(kind, "").values()
        ),
        default=0.0,
    )


def check_galleries(store: InstanceStore, encoder: InstanceEncoder | None) -> Iterator[Check]:
    """Check that each gallery has a live version, and the checkpoint that searches it."""
    for name in store.galleries():
        live = next((each for each in store.versions(name) if each.live), None)
        yield _check_gallery(name, live, encoder)


def _check_gallery(name: str, live: VersionInfo | None, encoder: InstanceEncoder | None) -> Check:
    label = f"gallery {name}"
    if live is None:
        advice = f"list them with `reir versions {name}`, then `reir promote {name} VERSION`"
        return Check(label, "warn", "no version is live", advice)
    detail = f"{plural(live.num_images, 'photo')}, {plural(live.num_instances, 'instance')}"
    spec = live.spec.encoder
    if spec and spec != SHIPPED_KIND:  # searches load this encoder, not --checkpoint
        return _check_own_encoder(label, f"{detail}; indexed with {spec}", live)
    if encoder is not None and live.spec.digest != encoder.digest:
        return Check(
            label,
            "warn",
            f"{detail}; indexed with another checkpoint, {live.spec.digest[:12]}",
            f"give its --checkpoint, or index it again: `reir reindex {name}`",
        )
    return Check(label, "ok", detail)


def _check_own_encoder(label: str, detail: str, live: VersionInfo) -> Check:
    """Check the weights of a gallery that has an encoder of its own, if they are in a directory."""
    from reir.checkpoint import weights_digest
    from reir.encoders import checkpoint_folder

    folder = checkpoint_folder(live.spec.encoder)
    if folder is None:  # a public model; its library checks the weights when it loads them
        return Check(label, "ok", detail)
    advice = "put the checkpoint back, or index the gallery with another one: `reir reindex`"
    try:
        digest = weights_digest(folder)
    except OSError as error:
        return Check(label, "fail", f"{detail}, which cannot be read: {error.strerror}", advice)
    if digest != live.spec.digest:
        wrong = f"{detail}, whose weights are now {digest[:12]} instead of {live.spec.digest[:12]}"
        return Check(label, "fail", wrong, advice)
    return Check(label, "ok", detail)

"""The faults: what breaks, which alerts must report it, and how an operator repairs it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from reir.checkpoint import SHIPPED
from reir.store import InstanceStore, open_store
from reir.store.embedded.journal import NUM_COLUMNS, Change, Journal, live_changes
from reir.store.embedded.lite_server_process import ADDRESS_FILE
from reir.store.embedded.locks import exclusive
from reir.store.names import instances_collection
from reir_testing.alerting.watched_system import DISK_BYTES, GALLERY, WatchedSystem

DAYS_S = 86_400.0
CROWD = 40
"""Clients that search at the same time in an overload; the server admits 16."""

REJECTED = 3
"""Exit status of a re-indexing whose version failed its check."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault.

    Attributes:
        name: what breaks.
        alerts: names of the alerts that must fire.
        break_it: breaks it, yields once, and repairs it.
        needs_server: whether the alerts come from requests of users.
    """

    name: str
    alerts: tuple[str, ...]
    break_it: Callable[[WatchedSystem], Iterator[None]]
    needs_server: bool = False


def replica_killed(system: WatchedSystem) -> Iterator[None]:
    """Kill a replica; Ray Serve starts another one."""
    os.kill(system.replicas()[0], signal.SIGKILL)
    yield


def server_stopped(system: WatchedSystem) -> Iterator[None]:
    """Stop `reir serve`, and start it again."""
    system.stop("serve")
    yield
    system.start("serve")


def store_gone(system: WatchedSystem) -> Iterator[None]:
    """Move the folder of the store away and kill its server, as if a disk had failed."""
    away = system.store.with_name("away")
    pid = json.loads((system.store / ADDRESS_FILE).read_text())["pid"]
    system.store.rename(away)
    os.kill(pid, signal.SIGKILL)
    yield
    away.rename(system.store)


def keys_broken(system: WatchedSystem) -> Iterator[None]:
    """Make a mistake in the file of API keys, and put back the last good copy."""
    good = system.keys.read_text()
    system.keys.write_text(f"{good}\nkeys: [")
    yield
    system.keys.write_text(good)


def too_many_requests(system: WatchedSystem) -> Iterator[None]:
    """Let more clients search than the server admits."""
    with system.traffic(CROWD, pause_s=0.0):
        yield


def search_log_gone(system: WatchedSystem) -> Iterator[None]:
    """Move the folder of the search log away."""
    away = system.search_log.with_name("searches-away")
    system.search_log.rename(away)
    yield
    away.rename(system.search_log)


def noised_vectors(system: WatchedSystem) -> Iterator[None]:
    """Add noise to the copy of the vectors that searches read; `--verify` rebuilds it."""
    with _opened(system) as store:
        version = store.live_version(GALLERY)
        (dim,) = (each.spec.dim for each in store.versions(GALLERY) if each.live)
    place = system.store / "reader" / instances_collection(GALLERY, version)
    path = place.with_name(f"{place.name}.journal")
    with (
        exclusive(place.with_name(f"{place.name}.lock")),
        closing(Journal(path, dim)) as journal,
    ):
        Journal.create(path, dim, [_noised(change) for change in live_changes(journal)])
    yield
    # The exit status is 1 if there are differences between the source and the gallery as well.
    system.run("index", str(system.photos), "--gallery", GALLERY, "--verify")


def worse_model_promoted(system: WatchedSystem) -> Iterator[None]:
    """Re-index with noised weights, which the check rejects, and promote the version all the same.

    Going back and dropping the version repairs it.
    """
    checkpoint = noised_checkpoint(system.folder / "noised")
    system.run("reindex", GALLERY, "--checkpoint", str(checkpoint), allowed=(REJECTED,))
    with _opened(system) as store:
        candidate = store.find_documents("reindex", GALLERY)[GALLERY]["candidate"]
    system.run("promote", GALLERY, candidate)
    yield
    system.run("rollback", GALLERY)
    system.run("reindex", GALLERY, "--drop")


def reindex_killed(system: WatchedSystem) -> Iterator[None]:
    """Kill a re-indexing job while it indexes, and drop it."""
    process = system.start_command("reindex", GALLERY)
    with _opened(system) as store:
        while store.find_documents("reindex", GALLERY).get(GALLERY, {}).get("state") != "indexing":
            if process.poll() is not None:
                raise RuntimeError(f"reir reindex ended with {process.returncode} too early")
            time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    yield
    system.run("reindex", GALLERY, "--drop")


def broken_photos(system: WatchedSystem) -> Iterator[None]:
    """Index files that are no photos, and remove them."""
    number = max(4, len(list(system.photos.iterdir())) // 8)
    wrong = [system.photos / f"broken-{each}.jpg" for each in range(number)]
    for each in wrong:
        each.write_bytes(f"no photo {each}".encode())
    system.index()
    yield
    for each in wrong:
        each.unlink()
    system.index("--prune")


def index_old(system: WatchedSystem) -> Iterator[None]:
    """Date the last indexing three days back, as if none had run since."""
    _set_back(system, "source", "indexed_s")
    yield
    system.index()


def backup_old(system: WatchedSystem) -> Iterator[None]:
    """Date the last backup three days back, as if none had been made since."""
    _set_back(system, "backup", "ended_s")
    yield
    system.back_up()


def schedule_fails(system: WatchedSystem) -> Iterator[None]:
    """Move the photos away while a schedule indexes them."""
    away = system.photos.with_name("photos-away")
    system.photos.rename(away)
    system.run("schedule", "run-now", "nightly", allowed=(1,))
    yield
    away.rename(system.photos)
    system.run("schedule", "run-now", "nightly")


def scheduler_stopped(system: WatchedSystem) -> Iterator[None]:
    """Stop the scheduler, and start it again."""
    system.stop("schedule")
    yield
    system.start("schedule")


def disk_full(system: WatchedSystem) -> Iterator[None]:
    """Fill the disk of the store but for 5%."""
    ballast = system.disk / "ballast"
    free = shutil.disk_usage(system.disk).free
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free - DISK_BYTES // 20)
    yield
    ballast.unlink()


def monitor_stopped(system: WatchedSystem) -> Iterator[None]:
    """Stop the monitor, and start it again."""
    system.stop("monitor")
    yield
    system.start("monitor")


FAULTS = (
    Fault(
        name="a replica is killed",
        alerts=("ReirReplicaKilled",),
        break_it=replica_killed,
        needs_server=True,
    ),
    Fault(
        name="the server is stopped",
        alerts=("ReirServerDown",),
        break_it=server_stopped,
        needs_server=True,
    ),
    Fault(
        name="the store is gone",
        alerts=(
            "ReirStoreDown",
            "ReirSearchesWithoutStore",
            "ReirErrorBudgetBurnFast",
            "ReirMonitorCheckFailing",
        ),
        break_it=store_gone,
        needs_server=True,
    ),
    Fault(
        name="the file of keys is broken",
        alerts=("ReirKeysUnusable",),
        break_it=keys_broken,
        needs_server=True,
    ),
    Fault(
        name="too many requests",
        alerts=("ReirServerOverloaded",),
        break_it=too_many_requests,
        needs_server=True,
    ),
    Fault(
        name="the search log is gone",
        alerts=("ReirSearchLogDropped",),
        break_it=search_log_gone,
        needs_server=True,
    ),
    Fault(name="searches read noised vectors", alerts=("ReirRecallLow",), break_it=noised_vectors),
    Fault(
        name="a worse model is promoted",
        alerts=("ReirReindexRejected", "ReirCanaryAnswersWorse"),
        break_it=worse_model_promoted,
    ),
    Fault(name="a re-indexing is killed", alerts=("ReirReindexStopped",), break_it=reindex_killed),
    Fault(name="files are no photos", alerts=("ReirIndexFailures",), break_it=broken_photos),
    Fault(name="the index is old", alerts=("ReirIndexStale",), break_it=index_old),
    Fault(name="the backup is old", alerts=("ReirBackupOld",), break_it=backup_old),
    Fault(name="a schedule fails", alerts=("ReirScheduleFailed",), break_it=schedule_fails),
    Fault(
        name="the scheduler is stopped",
        alerts=("ReirSchedulerDown", "ReirScheduleLate"),
        break_it=scheduler_stopped,
    ),
    Fault(
        name="the disk is nearly full",
        alerts=("ReirDiskNearlyFull", "ReirDiskFullSoon"),
        break_it=disk_full,
    ),
    Fault(name="the monitor is stopped", alerts=("ReirMonitorDown",), break_it=monitor_stopped),
)


def noised_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Copy the shipped checkpoint with noise in all weights that make vectors; return the folder.

    The detector is left as it is, so that the photos have the same instances.
    """
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(SHIPPED / name, folder)
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(SHIPPED / "model.safetensors")
    for name, tensor in weights.items():
        if name.startswith(("visual.members", "text.members")) and tensor.dim() > 1:
            spread = tensor.float().std()
            noise = torch.randn(tensor.shape, generator=generator) * spread
            weights[name] = (tensor.float() + 2 * noise).to(tensor.dtype)
    save_file(weights, folder / "model.safetensors")
    return folder


def _noised(change: Change) -> Change:
    """Return a change with noise as large as the vectors themselves."""
    vectors = change.rows[:, NUM_COLUMNS:]
    noise = np.random.default_rng(0).standard_normal(vectors.shape)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    mixed = vectors + noise
    mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
    rows = np.concatenate([change.rows[:, :NUM_COLUMNS], mixed], axis=1).astype(np.float32)
    return Change(change.puts, rows, change.deletes)


def _set_back(system: WatchedSystem, kind: str, field: str) -> None:
    """Set a time in the documents of the gallery back by three days."""
    with _opened(system) as store:
        for name, values in store.find_documents(kind, f"{GALLERY}/").items():
            store.put_document(kind, name, {**values, field: time.time() - 3 * DAYS_S})


@contextmanager
def _opened(system: WatchedSystem) -> Iterator[InstanceStore]:
    with ExitStack() as stack:
        yield stack.enter_context(closing(open_store(str(system.store))))

"""Backups and restores whose process is killed, on a real embedded store."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from reir.errors import ConfigError, DataError
from reir.operations.backup.reports import BackupReport, RestoreReport
from reir.records import IndexedImage
from reir.store import InstanceStore, open_store
from reir.store.memory import MemoryStore
from reir_testing.rewriting import SPEC

G, V = "photos", "v1"

BackUp = Callable[..., BackupReport]
Restore = Callable[..., RestoreReport]
ContentOf = Callable[..., object]

SCRIPT = """
import os, signal, sys
from reir.operations.backup import folder, pairs, restore, sweeps, write
from reir.operations.backup.restore import RestoreRequest, restore_backup
from reir.store import open_store
from reir.store.embedded.embedded_store import EmbeddedStore
from reir.store.milvus import MilvusStore

pairs.FILE_BYTES = 1
sweeps._BATCH_PHOTOS = restore._BATCH_PHOTOS = 8

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def kill_at_call(owner, name, number):
    real, calls = getattr(owner, name), iter(range(number))
    def call(*arguments, **options):
        return real(*arguments, **options) if next(calls, None) is not None else kill()
    setattr(owner, name, call)

command, place, folder_name, point, number = sys.argv[1:]
owner, _, name = point.rpartition(".")
kill_at_call(eval(owner), name, int(number))
store = open_store(place)
if command == "backup":
    write.write_backup(store, "photos", "v1", folder_name, lambda *_: None)
else:
    restore_backup(store, RestoreRequest(source=folder_name), lambda *_: None)
store.close()
"""


def run_killed(command: str, store: Path, folder: Path, point: str, number: int) -> None:
    """Run a command in a process that kills itself at a call of a function."""
    arguments = [command, str(store), str(folder), point, str(number)]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], check=False)
    assert done.returncode == -signal.SIGKILL, f"{point} was called at most {number} times"


@pytest.fixture
def filled(embedded: InstanceStore, every_kind: list[IndexedImage]) -> InstanceStore:
    embedded.create_version(G, V, SPEC)
    embedded.upsert_images(G, V, every_kind)
    embedded.promote(G, V)
    return embedded


@pytest.mark.parametrize(
    ("point", "number"),
    [
        ("os.replace", 0),
        ("os.replace", 5),
        ("os.fsync", 3),
        ("write._check_sizes", 0),
        ("folder.BackupFolder.write", 12),
    ],
)
def test_a_killed_backup_cannot_be_taken_for_a_finished_one(
    filled: InstanceStore,
    tmp_path: Path,
    back_up: BackUp,
    restore: Restore,
    content: ContentOf,
    point: str,
    number: int,
) -> None:
    folder = tmp_path / "b"
    run_killed("backup", tmp_path / "embedded", folder, point, number)
    with pytest.raises(DataError, match="the backup was not finished"):
        restore(MemoryStore(), folder)
    with pytest.raises(ConfigError, match=r"a backup into .* is running, or was interrupted"):
        back_up(filled, folder)
    assert filled.find_documents("backup") == {}
    memory = MemoryStore()
    back_up(filled, tmp_path / "again")
    restore(memory, tmp_path / "again")
    assert content(memory) == content(filled)


@pytest.mark.parametrize(
    ("point", "number"),
    [
        ("MilvusStore.create_version", 0),
        ("MilvusStore._create_instances", 0),
        ("MilvusStore.upsert_images", 0),
        ("MilvusStore.upsert_images", 3),
        ("EmbeddedStore._after_upsert", 2),
        ("restore.verify", 0),
        ("restore.make_live", 0),
        ("MilvusStore.promote", 0),
        ("MilvusStore.delete_documents", 0),
    ],
)
def test_a_killed_restore_continues(
    full_store: MemoryStore,
    tmp_path: Path,
    back_up: BackUp,
    restore: Restore,
    content: ContentOf,
    point: str,
    number: int,
) -> None:
    full_store.put_document("source", f"{G}/1", {"text": "/data"})
    back_up(full_store, tmp_path / "b")
    run_killed("restore", tmp_path / "target", tmp_path / "b", point, number)
    with closing(open_store(str(tmp_path / "target"))) as store:
        report = restore(store, tmp_path / "b")
        assert (report.version, report.problems, report.live) == (V, (), True)
        assert content(store) == content(full_store)
        assert [info.name for info in store.versions(G)] == [V]
        assert store.find_documents("restore") == {}
        assert store.find_documents("source") == {f"{G}/1": {"text": "/data"}}
        if (point, number) == ("MilvusStore.upsert_images", 3):
            assert report.written == 42 - 3 * 8, "it did not continue"
